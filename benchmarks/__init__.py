"""`manyheads-bench`: measurements with their circumstances, kept as JSON in `benchmarks/results/`."""
