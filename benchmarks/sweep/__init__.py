"""Many trainings, question by question: `python -m benchmarks.sweep`, then `.sweep.table`."""
