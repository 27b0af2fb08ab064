"""How long an analysis takes: `python -m benchmarks.analysis`."""
