"""`manyheads-bench plan`: layouts ranked for a target, explained, compared and enlarged."""
