"""Seconds and bytes for people, in the unit that leaves something to read."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Such as 584 ms, 38.7 µs or 12.3 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        value = seconds * factor
        if value >= (10 if unit == "s" else 1) or unit == "µs":
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    raise AssertionError


def traffic(count: float) -> str:
    """Bytes that are sent, in powers of 1000, as links are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.1 * factor:
            return f"{count / factor:,.3f} {unit}" if unit == "GB" else f"{count / factor:,.1f} {unit}"
    return f"{count:,.0f} B"
