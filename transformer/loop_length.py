"""How long a loop will be whose length is only known at run time, for predictions of a compiled program's time."""

from __future__ import annotations

import contextlib

import jax

SCOPE = "expected_trips_"
"""The beginning of the scope's name; the number follows."""


def expected_trips(number: float) -> contextlib.AbstractContextManager[None]:
    """A named scope for a `while` or `fori_loop`: analyses of the compiled program count its body this many times."""
    return jax.named_scope(f"{SCOPE}{number:g}")
