"""Comparison of shardings in time and memory: measured on available devices, or compiled ahead for others."""
