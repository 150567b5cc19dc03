"""Reads the checkpoints of a run, and trusts only what is as it was written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from train.checkpoints.integrity import damage
from train.checkpoints.selection import ranking_key
from train.program.state import TrainState
from transformer.errors import UserError, first_line
from transformer.paths import check_file

FOLDER = "checkpoints"
"""The folder of a run that holds one folder for each, by the number of its step."""
STATE, PARAMS, AVERAGE, META = "state", "params", "average", "meta"
"""The items of a checkpoint: all but the parameters; the parameters; their moving average, where the run keeps one; and what the
run is."""
SCORES = "scores.json"
"""The file of a run with the held-out scores of its checkpoints, which are evaluated after they are written."""
Scores = dict[int, dict[str, float]]
"""Step → name → value."""


class StoredCheckpoints:
    """The checkpoints of one run that are on disk, whole or damaged.

    Args:
        directory: the run's folder.

    Raises:
        UserError: it is not the folder of a run.
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
        """Step of the best checkpoint by `checkpoint.best`, among those that were evaluated."""
        return best_of(read_scores(self.run), self.steps, self._best_by) if self.steps else None

    def folder(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.directory / str(step)

    def damage(self, step: int, items: Sequence[str] | None = None) -> str | None:
        """As `train.checkpoints.integrity.damage`."""
        return damage(self.folder(step), items)

    def check(self, step: int, items: Sequence[str] | None = None) -> None:
        """Raise a `UserError` that names the file unless the checkpoint of a step is whole."""
        if (found := self.damage(step, items)) is not None:
            raise UserError(f"{self.folder(step)}: this checkpoint is damaged: {found}")

    def meta(self, step: int) -> dict[str, Any]:
        """What the run is, as it was stored. Raises `UserError` if it cannot be read."""
        path = self.folder(step) / META / "metadata"
        check_file(path)
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
        kinds = {"config": dict, "tokenizer": dict, "labels": list}
        wrong = [
            name for name, kind in kinds.items() if not isinstance(meta, dict) or not isinstance(meta.get(name), kind)
        ]
        if wrong:
            raise UserError(f"{path}: not what a run stores: {', '.join(wrong)} missing or of another type")
        return meta

    def restore_params(self, step: int, abstract: nnx.State) -> nnx.State:
        """The parameters to use (their moving average, where the run keeps one), laid out as `abstract` says."""
        average = self.folder(step) / AVERAGE
        folder = average if average.is_dir() else self.folder(step) / PARAMS
        otherwise = "restore the folder from a copy, or choose another checkpoint with --step"
        with _refusing(f"{folder}: the parameters cannot be read, or do not fit the run's config", otherwise):
            return restore(folder, abstract)

    @functools.cached_property
    def _best_by(self) -> str:
        """The metric by which the run compares its checkpoints, as the newest one that can be read has it."""
        for step in reversed(self.steps):
            with contextlib.suppress(UserError, KeyError, TypeError):
                return str(self.meta(step)["config"]["checkpoint"]["best"])
        return "loss"


def read_scores(run: Path) -> Scores:
    """The held-out scores of a run's checkpoints; empty if there are none."""
    if not (run / SCORES).is_file():
        return {}
    try:
        stored = json.loads((run / SCORES).read_text(encoding="utf-8"))
        return {
            int(step): {str(name): float(value) for name, value in scores.items()} for step, scores in stored.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def best_of(scores: Mapping[int, Mapping[str, float]], steps: Sequence[int], name: str) -> int | None:
    """The step with the best value of a metric, the first of equal ones; None if no step has one."""
    known = [step for step in sorted(steps) if name in scores.get(step, {})]
    return max(known, key=lambda step: ranking_key(name, scores[step]), default=None)


@contextlib.contextmanager
def _refusing(what: str, otherwise: str) -> Iterator[None]:
    """Turn whatever orbax and the library below it run into into a `UserError`: what is wrong, why, and what to do."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        # One of Python's own is about orbax's code.
        is_own = isinstance(error, AttributeError | TypeError | LookupError | AssertionError)
        raise UserError(f"{what}{'' if is_own else f' ({first_line(error)})'}; {otherwise}") from error


def restore(folder: Path, abstract: Any) -> Any:
    """The arrays of one item of a checkpoint, laid out as `abstract` says."""
    # It takes half a second to import, which commands that read no checkpoint need not wait for.
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), abstract)


def restore_state(folder: Path, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, laid out as `abstract` says, whatever mesh it was written from.

    Raises:
        UserError: the state has other parts, such as the momentum of another optimiser.
    """
    otherwise = "undo the change of the model or the optimiser, or start a new run with --run-dir FOLDER"
    with _refusing(f"{folder}: the state does not fit this config, or cannot be read", otherwise):
        params = restore(folder / PARAMS, abstract.params)
        average = None if abstract.ema is None else restore(folder / AVERAGE, abstract.ema)
        return dataclasses.replace(restore(folder / STATE, without_params(abstract)), params=params, ema=average)


def without_params(state: TrainState) -> TrainState:
    """What is stored apart from the parameters."""
    return dataclasses.replace(state, params=nnx.State({}), ema=None)
