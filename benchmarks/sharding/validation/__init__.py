"""Predictions held against measurement: rates of a device, steps measured and predicted, and their errors."""
