"""Fits a profile's two efficiencies to measured steps, and holds each step against a fit without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

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

    def seconds(self, factors: tuple[float, float]) -> float:
        """Predicted, with each part times its factor."""
        return factors[0] * self.products + factors[1] * self.memory + self.rest


def fitted(steps: Sequence[Parts]) -> tuple[float, float]:
    """Factors of products and of memory-bound work with the least squares of the relative errors; 1 for too few steps."""
    if len(steps) < 3:
        return 1.0, 1.0
    left = np.array([[one.products / one.measured, one.memory / one.measured] for one in steps])
    right = np.array([1 - one.rest / one.measured for one in steps])
    factors = np.clip(np.linalg.lstsq(left, right, rcond=None)[0], *_BOUNDS)
    return float(factors[0]), float(factors[1])


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
