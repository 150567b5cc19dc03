"""By which value checkpoints are compared, and when a run has not become better for too long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from train.data.prepared.store import Prepared
from train.objectives import objectives
from transformer.errors import UserError

if TYPE_CHECKING:
    from train.config import RunConfig


def ranking_key(name: str, values: Mapping[str, float]) -> float:
    """A number that is higher for what is better by the metric `name`; what lacks it is worse than all."""
    if name not in values:
        return float("-inf")
    return -values[name] if any(name in one.lower_is_better for one in objectives()) else values[name]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The best evaluation of a run, and how many came after it. A checkpoint holds it, so that a resumed run knows it."""

    name: str
    """Of the metric."""
    value: float | None = None
    """Of the best evaluation; None before the first."""
    step: int = 0
    """Of the best evaluation."""
    since: int = 0
    """Evaluations after it, none of which was better."""
    counted: int = 0
    """Step of the last evaluation that was counted."""

    @classmethod
    def from_data(cls, name: str, data: Mapping[str, Any] | None) -> Selection:
        """What a checkpoint holds; a fresh one where it holds that of another metric, or none."""
        return cls(**data) if data is not None and data["name"] == name else cls(name)

    def after(self, step: int, value: float) -> Selection:
        """The same after one more evaluation, at `step`. Of equal ones the first is the best."""
        if self.value is None or self._key(value) > self._key(self.value):
            return Selection(self.name, value, step, counted=step)
        return dataclasses.replace(self, since=self.since + 1, counted=step)

    def _key(self, value: float) -> float:
        return ranking_key(self.name, {self.name: value})

    def is_over(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row were no better."""
        return patience is not None and self.since >= patience

    def __str__(self) -> str:
        return f"the best {self.name}, {self.value:.4f}, is that of step {self.step}, and {self.since} evaluations were no better"


def is_selective(config: RunConfig) -> bool:
    """Whether the best evaluation decides something that was asked for."""
    return config.checkpoint.best != "loss" or config.evaluation.patience is not None


def check_selection(config: RunConfig, prepared: Prepared) -> None:
    """Raise a `UserError` where checkpoints are to be compared by what is not known."""
    if is_selective(config) and not prepared.validation:
        field = "evaluation.patience" if config.checkpoint.best == "loss" else "checkpoint.best"
        raise UserError(f"{field}: there is no held-out text; set data.validation_fraction above 0, or {field} back")
    if config.objective.translates and config.checkpoint.best != "loss":
        if jax.process_count() > 1:
            raise UserError("checkpoint.best: translations are made by one process; set it to loss")
        if not config.evaluation.translations:
            raise UserError(f"checkpoint.best: {config.checkpoint.best} needs evaluation.translations above 0")
