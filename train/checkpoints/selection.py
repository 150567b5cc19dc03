"""Selection of the best checkpoint, and early stopping."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from train.data.prepared.store import Prepared
from train.objectives import objectives
from transformer.errors import UserError

if TYPE_CHECKING:
    from train.config import RunConfig


def ranking_key(name: str, values: Mapping[str, float]) -> float:
    """A number that is higher for better values of the metric `name`; a missing value, or NaN, is the worst."""
    if name not in values or math.isnan(values[name]):
        return float("-inf")
    return -values[name] if any(name in one.lower_is_better for one in objectives()) else values[name]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The best evaluation of a run, and how many came after it. A checkpoint holds it, so that a resumed run knows it."""

    name: str
    """Name of the metric."""
    value: float | None = None
    """Value of the best evaluation; None before the first."""
    step: int = 0
    """Step of the best evaluation."""
    since: int = 0
    """Number of evaluations since the best one."""
    counted: int = 0
    """Step of the last counted evaluation."""

    @classmethod
    def from_data(cls, name: str, data: Mapping[str, Any] | None) -> Selection:
        """The selection that a checkpoint holds; a fresh one if it holds none, or one for another metric."""
        return cls(**data) if data is not None and data["name"] == name else cls(name)

    def after(self, step: int, value: float) -> Selection:
        """The selection after one more evaluation, at `step`. Of equal values the first is the best."""
        if self.value is None or self._key(value) > self._key(self.value):
            return Selection(self.name, value, step, counted=step)
        return dataclasses.replace(self, since=self.since + 1, counted=step)

    def _key(self, value: float) -> float:
        return ranking_key(self.name, {self.name: value})

    def is_over(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row brought no improvement."""
        return patience is not None and self.since >= patience

    def __str__(self) -> str:
        return f"best {self.name} {self.value:.4f} at step {self.step}; no improvement in {self.since} evaluations"


def is_selective(config: RunConfig) -> bool:
    """Whether the config uses the best evaluation."""
    return config.checkpoint.best != "loss" or config.evaluation.patience is not None


def check_selection(config: RunConfig, prepared: Prepared) -> None:
    """Raise a `UserError` if checkpoints cannot be compared by the chosen metric."""
    if is_selective(config) and not prepared.validation:
        field = "evaluation.patience" if config.checkpoint.best == "loss" else "checkpoint.best"
        raise UserError(f"{field}: there is no held-out text; set data.validation_fraction above 0, or remove {field}")
    if config.objective.translates and config.checkpoint.best != "loss":
        if jax.process_count() > 1:
            raise UserError("checkpoint.best: translation needs a single process; set it to loss")
        if not config.evaluation.translations:
            raise UserError(f"checkpoint.best: {config.checkpoint.best} needs evaluation.translations above 0")
