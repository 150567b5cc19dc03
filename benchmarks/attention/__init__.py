"""Attention measured: certificates of exactness, speed, and length."""
