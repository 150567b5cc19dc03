"""`manyheads-bench history`: attention through history, every mechanism trained on the same pairs at the same budget."""
