"""`manyheads-bench sharding`: every strategy on the devices at hand, and what it would send on others."""
