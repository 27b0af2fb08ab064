"""What a step costs: `python -m benchmarks.speed`, `python -m benchmarks.speed.table`."""
