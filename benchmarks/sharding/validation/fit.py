"""Fits a profile's two efficiencies to measured steps, and holds each step against a fit without it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

_BOUNDS = (0.2, 5.0)
"""Of what the rates of single operations may differ by within a step."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """A step: predicted seconds by part, at efficiencies of 1, and the measured seconds."""

    products: float
    memory: float
    rest: float
    """Exposed communication and gaps, which are not fitted."""
    measured: float
    measured_products: float
    """Of the measured seconds, by a trace."""

    def seconds(self, factors: tuple[float, float]) -> float:
        """Predicted, with each part times its factor."""
        return factors[0] * self.products + factors[1] * self.memory + self.rest


def fitted(steps: Sequence[Parts]) -> tuple[float, float]:
    """Factors of products and of memory-bound work; 1 for too few steps.

    Steps have about the same share of both, so that their seconds alone do not tell one from the other: products are compared
    with the trace's, and memory-bound work with all that the step takes besides. Of the steps' ratios the median counts.
    """
    if len(steps) < 3:
        return 1.0, 1.0
    products = _within(statistics.median(one.measured_products / max(one.products, 1e-12) for one in steps))
    left = [(one.measured - products * one.products - one.rest) / max(one.memory, 1e-12) for one in steps]
    return products, _within(statistics.median(left))


def _within(factor: float) -> float:
    return min(max(factor, _BOUNDS[0]), _BOUNDS[1])


def leave_one_out(steps: Sequence[Parts], used: Sequence[bool]) -> list[float]:
    """The relative error of each step's prediction with factors that are fitted to the others.

    Args:
        used: whether a step takes part in the fits.
    """
    errors = []
    for index, step in enumerate(steps):
        others = [one for place, one in enumerate(steps) if used[place] and place != index]
        errors.append(step.seconds(fitted(others)) / step.measured - 1)
    return errors
