"""Benchmarks: one script a question, run as `python -m benchmarks.NAME`.

Each script writes one JSON file (by default under benchmarks/results/) that holds the arguments,
the environment and every figure it measured.
"""
