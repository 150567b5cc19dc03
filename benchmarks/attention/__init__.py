"""Benchmarks of attention: exactness, speed, and sequence length."""
