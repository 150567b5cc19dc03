"""Checkpoints: a run's state with everything needed to resume from it, or to use it elsewhere.

A checkpoint holds three items: `params` (the parameters, or their moving average, for use), `state` (the whole TrainState,
to resume), and `meta` (step, config, tokenizer, versions). orbax writes it to a temporary folder and renames it last, so a
kill at any moment leaves the previous one whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from train.config import RunConfig, difference, parse, to_data
from train.config.sections import CheckpointConfig
from train.run.selection import Selection, ranking_key
from train.run.state import TrainState
from train.versions import versions
from transformer.errors import UserError
from transformer.pipeline import in_order

RESUMABLE = (
    *("name:", "run_dir:", "steps:", "max_skipped:", "data.num_workers:", "data.prefetch:"),
    *("evaluation.", "checkpoint.", "log.", "sample.", "mesh."),
)
"""Config fields that may differ between a checkpoint and the run that resumes from it.

Only `steps` affects what is computed; it may be raised to continue training, which also extends the schedule.
"""

_BACKEND = re.compile(r"model\.(attention|pattern\.\d+)\.backend:")

_STORED = {"loss": "nll"}
"""Metrics whose names on disk differ."""
_STEP = "step"
"""The other names on disk."""
_SMALL = 2**20
"""Bytes below which an array is written by one device."""


def is_resumable(difference: str) -> bool:
    """Whether a difference between two configs is allowed between a checkpoint and the run that resumes it."""
    return difference.startswith(RESUMABLE) or _BACKEND.match(difference) is not None


class Checkpoints:
    """The checkpoints of one run, newest last. Use it as a context manager: leaving it waits for what is being written.

    Args:
        directory: the run's folder.
        config: how many to keep.
    """

    def __init__(self, directory: Path, config: CheckpointConfig | None = None) -> None:
        policies = ocp.checkpoint_managers
        keep = None if config is None else config.keep
        self._config = config
        options = ocp.CheckpointManagerOptions(
            best_fn=self._ranking_key,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(
                        get_metric_fn=self._ranking_key,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            read_only=config is None,
            save_interval_steps=0 if config is None else 1,
            create=config is not None,
            cleanup_tmp_directories=config is not None,
        )
        self.directory = (directory / "checkpoints").absolute()
        if config is None and not self.directory.is_dir():
            raise UserError(f"{directory}: no run here (it has no folder `checkpoints`)")
        quiet = _without_warnings() if config is None else contextlib.nullcontext()
        with _disk_errors(self), quiet:
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            with _disk_errors(self):
                self._manager.close()
        elif isinstance(error, Exception):
            # The error's message may name the checkpoint being written as the one to resume from; its own error adds nothing.
            with contextlib.suppress(Exception):
                self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint by `checkpoint.best`, among those written right after an evaluation."""
        step = self._manager.best_step()
        # Checkpoints written while another metric decided may lack this one.
        known = None if step is None else self._manager.metrics(step)
        return step if known is not None and _STORED.get(self._best_by, self._best_by) in known else None

    def _ranking_key(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        first_names = {stored: name for name, stored in _STORED.items()}
        values = {first_names.get(name, name): value for name, value in metrics.items()}
        # Of equal values the first is the best.
        return ranking_key(self._best_by, values), -values.get(_STEP, 0)

    @functools.cached_property
    def _best_by(self) -> str:
        """The metric by which checkpoints are compared: the config's, or the run's own if it is only read."""
        if self._config is not None:
            return self._config.best
        return self.meta(self.steps[-1])["config"]["checkpoint"].get("best", "loss")

    def save(
        self,
        state: TrainState,
        step: int,
        config: RunConfig,
        tokenizer: dict[str, str],
        values: Mapping[str, float] | None,
        *,
        labels: Sequence[str] = (),
        selection: Selection | None = None,
    ) -> None:
        """Write in the background; returns once the arrays are copied off the devices.

        Args:
            tokenizer: its files by name, so that a checkpoint is enough to generate.
            values: held-out loss and metrics at this step, on the batches by which checkpoints are compared, if they were
                evaluated.
            labels: the names of the classes, or tags, that the model predicts.
            selection: the best evaluation so far.

        Raises:
            UserError: the disk is full or read-only, now or while the previous checkpoint was written.
        """
        # On disk a stack has its layers in order, whatever the mesh.
        state = jax.tree.map(_one_copy, in_order(state))
        meta = {
            "step": step,
            "config": to_data(config),
            "tokenizer": tokenizer,
            "labels": list(labels),
            "selection": None if selection is None else dataclasses.asdict(selection),
            "versions": versions(),
        }
        stored = {_STORED.get(name, name): value for name, value in (values or {}).items()}
        with _disk_errors(self):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params if state.ema is None else state.ema),
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics=None if values is None else stored | {_STEP: step},
            )

    def save_params(
        self, params: nnx.State, config: RunConfig, tokenizer: dict[str, str], source: str, labels: Sequence[str] = ()
    ) -> None:
        """Write parameters that were trained elsewhere, as step 0, and wait until they are written.

        Args:
            source: where they come from.
            labels: as in `save`.
        """
        meta = {
            "step": 0, "config": to_data(config), "tokenizer": tokenizer, "labels": list(labels),
            "versions": versions(), "source": source,
        }  # fmt: skip
        params = jax.tree.map(_one_copy, params)
        with _disk_errors(self):
            self._manager.save(
                0, args=ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
            )
        self.wait()

    def wait(self) -> None:
        """Block until the newest checkpoint is written."""
        with _disk_errors(self):
            self._manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata that `save` stored next to the arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, abstract: TrainState, config: RunConfig) -> TrainState:
        """The state of `step`, laid out as `abstract` says, whatever mesh it was written from.

        Raises:
            UserError: the checkpoint belongs to another config; the fields that differ are named.
        """
        meta = self.meta(step)
        if "source" in meta:
            raise UserError(
                f"{self.directory.parent}: holds imported weights ({meta['source']}), not a resumable run; name it "
                "in init_from and train in another folder"
            )
        # A field that an older version lacks takes its default, which is the behaviour of that version.
        stored = to_data(parse(meta["config"], f"{self.directory.parent}: the config of step {step}"))
        changed = [line for line in difference(stored, to_data(config)) if not is_resumable(line)]
        if changed:
            raise UserError(
                f"{self.directory.parent}: its checkpoint at step {step} was made with a different config: "
                f"{'; '.join(changed)}. Undo the change, or start a new run with --run-dir FOLDER"
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))  # pyright: ignore[reportCallIssue]
        return self._manager.restore(step, args=args)["state"]

    def restore_params(self, step: int, abstract: nnx.State) -> nnx.State:
        """The parameters to use (their moving average, where the run keeps one), laid out as `abstract` says."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))  # pyright: ignore[reportCallIssue]
        return self._manager.restore(step, args=args)["params"]


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
    """Turn a full or read-only disk into a `UserError` that names the last good checkpoint."""

    checkpoints: Checkpoints

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not is_disk_error(error):
            return
        manager = getattr(self.checkpoints, "_manager", None)
        last = None if manager is None else manager.latest_step()
        good = "there is no earlier one" if last is None else f"the one of step {last} is intact"
        raise UserError(
            f"{self.checkpoints.directory}: cannot write a checkpoint ({_first_line(error)}); {good}. "
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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that a folder that is opened to read is opened to read."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
