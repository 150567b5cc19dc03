"""Reads the checkpoints of a run, and trusts only what is as it was written."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx

from train.run.integrity import damage
from train.run.selection import ranking_key
from transformer.errors import UserError

FOLDER = "checkpoints"
"""The folder of a run that holds one folder for each, by the number of its step."""
STATE, PARAMS, AVERAGE, META, METRICS = "state", "params", "average", "meta", "metrics"
"""The items of a checkpoint: all but the parameters; the parameters; their moving average, where the run keeps one; what the run
is; and held-out scores, where it was evaluated at this step."""
STORED = {"loss": "nll"}
"""Metrics whose names on disk differ."""
STEP = "step"
"""The other names on disk."""


class StoredCheckpoints:
    """The checkpoints of one run that are on disk, whole or damaged.

    Args:
        directory: the run's folder.

    Raises:
        UserError: it is no run's folder.
    """

    def __init__(self, directory: Path) -> None:
        self.run, self.directory = directory, directory / FOLDER
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no run here (it has no folder `{FOLDER}`)")

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint by `checkpoint.best`, among those written right after an evaluation."""
        scores = {step: found for step in self.steps if (found := self._scores(step)) is not None}
        if not scores:
            return None
        best = max(scores, key=lambda step: rank(self._best_by, scores[step]))
        # Checkpoints written while another metric decided may lack this one.
        return best if STORED.get(self._best_by, self._best_by) in scores[best] else None

    def folder(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.directory / str(step)

    def damage(self, step: int, items: Sequence[str] | None = None) -> str | None:
        """As `train.run.integrity.damage`."""
        return damage(self.folder(step), items)

    def check(self, step: int, items: Sequence[str] | None = None) -> None:
        """Raise a `UserError` that names the file unless the checkpoint of a step is whole."""
        if (found := self.damage(step, items)) is not None:
            raise UserError(f"{self.folder(step)}: this checkpoint is damaged: {found}")

    def meta(self, step: int) -> dict[str, Any]:
        """What the run is, as it was stored. Raises `UserError` if it cannot be read."""
        path = self.folder(step) / META / "metadata"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None

    def restore_params(self, step: int, abstract: nnx.State) -> nnx.State:
        """The parameters to use (their moving average, where the run keeps one), laid out as `abstract` says."""
        average = self.folder(step) / AVERAGE
        return restore(average if average.is_dir() else self.folder(step) / PARAMS, abstract)

    def score(self, step: int, name: str) -> float | None:
        """A held-out score of a checkpoint; None if it was not evaluated."""
        return (self._scores(step) or {}).get(STORED.get(name, name))

    def _scores(self, step: int) -> Mapping[str, float] | None:
        try:
            return json.loads((self.folder(step) / METRICS / METRICS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @functools.cached_property
    def _best_by(self) -> str:
        """The metric by which the run compares its checkpoints."""
        return self.meta(self.steps[-1])["config"]["checkpoint"].get("best", "loss")


def rank(best_by: str, stored: Mapping[str, float]) -> tuple[float, float]:
    """A key that is larger for better scores, as they are on disk."""
    first_names = {stored_name: name for name, stored_name in STORED.items()}
    values = {first_names.get(name, name): value for name, value in stored.items()}
    # Of equal values the first is the best.
    return ranking_key(best_by, values), -values.get(STEP, 0)


def restore(folder: Path, abstract: Any) -> Any:
    """The arrays of one item of a checkpoint, laid out as `abstract` says."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), abstract)
