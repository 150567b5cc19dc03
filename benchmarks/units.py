"""Formats seconds and bytes in suitable units."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Three figures, such as 584 ms, 38.7 µs or 1.61 s."""
    if seconds == 0:
        return "0 s"
    unit, factor = next(((u, f) for u, f in (("s", 1.0), ("ms", 1e3)) if seconds * f >= 1), ("µs", 1e6))
    value = seconds * factor
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def amount(count: float) -> str:
    """Bytes of communication, in powers of 1000, as in the specifications of links."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.1 * factor:
            return f"{count / factor:,.3f} {unit}" if unit == "GB" else f"{count / factor:,.1f} {unit}"
    return f"{count:,.0f} B"
