"""`manyheads-bench`: measurements with device, versions and date, stored as JSON in `benchmarks/results/`."""
