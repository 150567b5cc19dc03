"""Fits the formula's two efficiencies, of products and of all other work, to published runs, and holds runs against it.

An efficiency belongs to a family of chips, never to a run. A run that was left out shows what a fit is worth for other runs:
each in turn (leave-one-out), and one half after a fit to the other half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from benchmarks.sharding.predict.analytic import OVERLAP, Estimate

_START = (0.75, 0.5)
_LEAST, _MOST = (0.2, 0.05), (1.0, 1.0)
_TYPICAL = 0.1
"""An error beyond which a run pulls less on the fit: others' software is not all equally well tuned."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A run's predicted seconds by part, with products and all other work at efficiencies of 1, and the published seconds."""

    arithmetic: float
    traffic: float
    hideable: float
    shown: float
    published: float

    @classmethod
    def of(cls, estimate: Estimate, used: tuple[float, float], published: float) -> Step:
        """From an estimate that was made with the efficiencies `used`, of a mesh without a pipeline."""
        shown = estimate.sent - estimate.hideable
        return cls(estimate.arithmetic * used[0], estimate.traffic * used[1], estimate.hideable, shown, published)

    def error(self, efficiencies: tuple[float, float]) -> float:
        """Relative error of the predicted seconds."""
        arithmetic, traffic = self.arithmetic / efficiencies[0], self.traffic / efficiencies[1]
        sending = self.shown + max(self.hideable - OVERLAP * arithmetic, 0)
        return (arithmetic + traffic + sending) / self.published - 1


def fitted(steps: Sequence[Step]) -> tuple[float, float]:
    """Efficiencies of products and of all other work with the least squares of the logarithms of predicted over published."""

    def errors(logs: np.ndarray) -> list[float]:
        efficiencies = float(np.exp(logs[0])), float(np.exp(logs[1]))
        return [float(np.log1p(step.error(efficiencies))) for step in steps]

    bounds = (np.log(_LEAST), np.log(_MOST))
    found = least_squares(errors, np.log(_START), bounds=bounds, loss="soft_l1", f_scale=_TYPICAL).x
    return float(np.exp(found[0])), float(np.exp(found[1]))


def leave_one_out(steps: Sequence[Step]) -> list[float]:
    """The error of each with efficiencies that are fitted to the others."""
    return [step.error(fitted([*steps[:place], *steps[place + 1 :]])) for place, step in enumerate(steps)]


def by_halves(steps: Sequence[Step]) -> list[float]:
    """The error of each with efficiencies that are fitted to the half that it is not in: every second one."""
    halves = [fitted(steps[1::2]), fitted(steps[0::2])]
    return [step.error(halves[place % 2]) for place, step in enumerate(steps)]
