"""Values of the command line."""

from __future__ import annotations

import argparse

from transformer.errors import is_number


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not is_number(text.strip()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: 1 or more")
    return int(text)


def amount(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a number above 0, such as 3e11")
    return number


def names(text: str | None) -> list[str] | None:
    """Names with commas between them."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
