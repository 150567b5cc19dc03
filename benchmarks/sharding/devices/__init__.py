"""Devices to plan for: chips, how many of them, how they are linked, and their measured rates."""
