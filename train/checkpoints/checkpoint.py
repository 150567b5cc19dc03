"""Writes the checkpoints of a run: its state, with everything needed to resume from it, or to use it elsewhere.

orbax writes each to a temporary folder in the background. The hashes of its files are stored in it, all of it is synced to the
disk, and only then is it renamed: a kill at any moment leaves the previous one whole, and a later change does not pass unseen.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from train.checkpoints.integrity import LATER, write_hashes
from train.checkpoints.stored import (
    AVERAGE,
    FOLDER,
    META,
    PARAMS,
    SCORES,
    STATE,
    Scores,
    StoredCheckpoints,
    best_of,
    read_scores,
    restore_state,
    without_params,
)
from train.config.sections import CheckpointConfig
from train.files import sync, write_whole, writing
from train.parallel.processes import is_first, process_zero_first
from train.program.state import TrainState
from transformer.errors import UserError, first_line
from transformer.pipeline import in_order

DAMAGED = "damaged"
"""The folder of a run for checkpoints that were set aside."""
_SMALL = 2**20
"""Bytes below which an array is written by one device."""


class Checkpoints:
    """The checkpoints of a run that is trained, newest last. Use it as a context manager: leaving it waits for what is being
    written. Newest ones that are damaged are set aside first.

    Args:
        directory: the run's folder.
        config: how many to keep, and which one is best.
        rolls_back: whether the run may go back to one of them.

    Raises:
        UserError: all there are are damaged, or the folder cannot be written.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, *, rolls_back: bool = False) -> None:
        self._config, self._rolls_back = config, rolls_back
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self),
            save_interval_steps=1,
            create=True,
            cleanup_tmp_directories=True,
            temporary_path_class=_HashedTemporaryPath,
        )
        with writing(directory):
            (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        self._stored = StoredCheckpoints(directory)
        with _disk_errors(self):
            with process_zero_first():
                if is_first():
                    set_aside_damaged(self._stored)
                    _forget_scores(self._stored)
            self._scores = read_scores(directory)
            self._manager = ocp.CheckpointManager(self._stored.directory.absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _disk_errors(self, quiet=error is not None):
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def to_roll_back_to(self) -> int | None:
        """Step of the newest checkpoint that is due by steps, once what is being written is whole; None before the first.

        Those of interruptions do not count: a run that was interrupted rolls back as one that was not. Raises `UserError` as
        `save`.
        """
        self.wait()
        every = self._config.every
        return max((step for step in self._manager.all_steps() if not every or step % every == 0), default=None)

    def drop_after(self, step: int) -> None:
        """Remove later checkpoints, and their scores: their steps will be taken in another way. Raises `UserError` as `save`."""
        with _disk_errors(self):
            for later in self._manager.all_steps():
                if later > step:
                    self._manager.delete(later)
            self._scores = {one: known for one, known in self._scores.items() if one <= step}
            if is_first():
                _write_scores(self._stored, self._scores)

    def scores(self, step: int) -> Mapping[str, float] | None:
        """The held-out scores at a step, on the batches by which checkpoints are compared; None if they are not known."""
        return self._scores.get(step)

    def record(self, step: int, scores: Mapping[str, float]) -> None:
        """Store held-out scores of a step: its checkpoint may be the best one, and is kept. Raises `UserError` as `save`."""
        kept = {*self._manager.all_steps(), step}
        self._scores = {one: known for one, known in self._scores.items() if one in kept} | {step: dict(scores)}
        if is_first():
            with _disk_errors(self):
                _write_scores(self._stored, self._scores)

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Which of the checkpoints there are stay: the newest ones, the best one, and those that are kept for good; in a run that
        may roll back also the one that it would roll back to, and the best one up to there."""
        config, best = self._config, best_of(self._scores, steps, self._config.best)
        for_good = [step for step in steps if config.keep_every and step % config.keep_every == 0]
        kept = {*sorted(steps)[-config.keep :], *for_good, *([] if best is None else [best])}
        scheduled = max((step for step in steps if config.every and step % config.every == 0), default=None)
        if self._rolls_back and scheduled is not None:
            before = best_of(self._scores, [step for step in steps if step <= scheduled], config.best)
            kept |= {scheduled, scheduled if before is None else before}
        return kept

    def save(self, state: TrainState, step: int, meta: Mapping[str, Any]) -> None:
        """Write in the background; returns once the arrays are copied off the devices.

        Args:
            meta: what the run is, as JSON values.

        Raises:
            UserError: the disk is full or read-only, now or while the previous checkpoint was written.
        """
        # On disk a stack has its layers in order, whatever the mesh.
        state = jax.tree.map(_one_copy, in_order(state))
        items = {PARAMS: state.params, STATE: without_params(state)}
        items |= {} if state.ema is None else {AVERAGE: state.ema}
        self._save(step, items, meta)

    def save_params(self, params: nnx.State, meta: Mapping[str, Any]) -> None:
        """Write parameters that were trained elsewhere, as step 0, and wait until they are written. Raises as `save`."""
        self._save(0, {PARAMS: jax.tree.map(_one_copy, params)}, meta)
        self.wait()

    def _save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        arguments: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        arguments[META] = ocp.args.JsonSave(dict(meta))
        with _disk_errors(self):
            self._manager.save(step, args=ocp.args.Composite(**arguments))

    def after_failure(self) -> None:
        """Look at the disk anew: orbax forgets old checkpoints before a new one is whole; and remove what is left of that."""
        self._manager.reload()
        if is_first():
            for partial in self._stored.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)

    def wait(self) -> None:
        """Block until the newest checkpoint is written."""
        with _disk_errors(self):
            self._manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """What the run is, as `save` stored it."""
        return self._stored.meta(step)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, laid out as `abstract` says, whatever mesh it was written from.

        Raises:
            UserError: the state has other parts, such as the momentum of another optimiser.
        """
        return restore_state(self._stored.folder(step), abstract)


class _HashedTemporaryPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A folder that orbax fills, which gets its hashes before it is renamed to a checkpoint, and is on the disk afterwards."""

    async def finalize(self) -> None:
        await asyncio.to_thread(write_hashes, Path(self.get()), LATER)
        await super().finalize()
        await asyncio.to_thread(self._sync_names)

    def _sync_names(self) -> None:
        final = Path(self.get_final())
        for path in (*(final / name for name in LATER if (final / name).exists()), final, final.parent):
            sync(path)


@dataclasses.dataclass
class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    checkpoints: Checkpoints

    def should_preserve(
        self, checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo], *, context: Any
    ) -> Sequence[bool]:
        kept = self.checkpoints.kept([one.step for one in checkpoints])
        return [one.step in kept for one in checkpoints]


def set_aside_damaged(stored: StoredCheckpoints) -> None:
    """Move the newest checkpoints out of the way as long as they are damaged, with a line for each.

    Raises:
        UserError: none is left, or one cannot be read; then all stay where they are.
    """
    steps, damaged = stored.steps, dict[int, str]()
    while steps and (found := stored.damage(steps[-1])) is not None:
        damaged[steps.pop()] = found
    lines = [f"the checkpoint of step {step} is damaged ({found})" for step, found in damaged.items()]
    # A disk that cannot be read now may be read later.
    if damaged and (not steps or any(found.endswith("cannot be read") for found in damaged.values())):
        left = "no other is left" if not steps else "try again when the disk can be read"
        raise UserError(f"{stored.run}: {'; '.join(lines)}; {left}, or start a new run with --run-dir FOLDER")
    for step, line in zip(damaged, lines, strict=True):
        place = stored.run / DAMAGED / str(step)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        stored.folder(step).rename(place)
        print(f"{stored.run}: {line}; it was moved to {place}, and that of step {steps[-1]} is the newest")


def _forget_scores(stored: StoredCheckpoints) -> None:
    """Drop the scores of checkpoints that are not there: their steps will be taken and evaluated again."""
    steps, scores = stored.steps, read_scores(stored.run)
    left = {step: found for step, found in scores.items() if step in steps}
    if left != scores:
        _write_scores(stored, left)


def _write_scores(stored: StoredCheckpoints, scores: Scores) -> None:
    write_whole(stored.run / SCORES, json.dumps(scores) + "\n")


def _one_copy(array: jax.Array) -> jax.Array:
    """A small array as a copy on one device, if all its devices belong to this process and hold all of it.

    orbax writes a slice of a replicated array from each device, which needs a program for each slice and pays only if the
    array is large.
    """
    if array.is_fully_addressable and array.is_fully_replicated and array.nbytes < _SMALL:
        return array.addressable_data(0)
    return array


@dataclasses.dataclass
class _disk_errors:
    """Turn a full or read-only disk into a `UserError` that names the last good checkpoint.

    `quiet` drops errors: one that is on its way may name the checkpoint being written, and its own error adds nothing.
    """

    checkpoints: Checkpoints
    quiet: bool = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if self.quiet and isinstance(error, Exception):
            return True
        if error is None or not is_disk_error(error):
            return False
        manager = getattr(self.checkpoints, "_manager", None)
        last = None if manager is None else manager.latest_step()
        good = "there is no earlier one" if last is None else f"the one of step {last} is intact"
        raise UserError(
            f"{self.checkpoints._stored.directory}: cannot write a checkpoint ({first_line(error)}); {good}. "
            "Free some space or choose another --run-dir, then run the same command again to resume"
        ) from None


def is_disk_error(error: BaseException) -> bool:
    """Whether `error` was caused by a full, read-only or missing disk."""
    phrases = ("No space left", "Read-only file system", "Disk quota", "File too large", "Not a directory",
               "Permission denied")  # fmt: skip
    while error is not None:
        if any(phrase in str(error) for phrase in phrases):
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False
