"""Checkpoints: a run's state with everything needed to go on from it, or to use it elsewhere.

A checkpoint holds three items: `params` (the parameters, or their moving average, to use), `state` (the whole TrainState,
to go on), and `meta` (step, config, tokenizer, versions). orbax writes it beside its place and renames it last, so a kill at
any moment leaves the previous one whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
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
"""Config fields that may differ between a checkpoint and the run that goes on from it.

None but `steps` has a part in what is computed; that one may be raised to train on, and its schedule with it.
"""

_BACKEND = re.compile(r"model\.(attention|pattern\.\d+)\.backend:")

_STORED = {"loss": "nll"}
"""Names that metrics have on disk where those are others."""
_STEP = "step"
"""What stands beside them there."""
_SMALL = 2**20
"""Bytes below which an array is written by one device."""


def is_resumable(difference: str) -> bool:
    """Whether a difference between two configs may be between a checkpoint and the run that continues it."""
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
            create=config is not None,
            cleanup_tmp_directories=config is not None,
        )
        self.directory = (directory / "checkpoints").absolute()
        if config is None and not self.directory.is_dir():
            raise UserError(f"{directory}: no run here (it has no folder `checkpoints`)")
        with _disk_errors(self):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            with _disk_errors(self):
                self._manager.close()
        elif isinstance(error, Exception):
            # What is being written may be what the error's message tells to go on from; a fault of its own is no news then.
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
        # What was written while another metric decided may lack this one.
        known = None if step is None else self._manager.metrics(step)
        return step if known is not None and _STORED.get(self._best_by, self._best_by) in known else None

    def _ranking_key(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        first_names = {stored: name for name, stored in _STORED.items()}
        values = {first_names.get(name, name): value for name, value in metrics.items()}
        # Of equal ones the first is the best.
        return ranking_key(self._best_by, values), -values.get(_STEP, 0)

    @functools.cached_property
    def _best_by(self) -> str:
        """The metric by which checkpoints are compared: the config's, or of a run that is only read its own."""
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
            values: held-out loss and metrics at this very step, on the batches that all checkpoints are compared on, when they
                were taken.
            labels: the names of the classes, or tags, that the model tells.
            selection: the best evaluation up to now.

        Raises:
            UserError: the disk is full or read-only, now or while the previous checkpoint was written.
        """
        # Whatever a mesh makes of it, on disk a stack has its layers in their order.
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
        """Write parameters that were trained elsewhere, as step 0, and wait until they are whole.

        Args:
            source: where they come from.
            labels: as of `save`.
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
        """Block until the newest checkpoint is whole."""
        with _disk_errors(self):
            self._manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` stored beside the arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, abstract: TrainState, config: RunConfig) -> TrainState:
        """The state of `step`, laid out as `abstract` says, whatever mesh it was written from.

        Raises:
            UserError: the checkpoint belongs to another config; the fields that differ are named.
        """
        meta = self.meta(step)
        if "source" in meta:
            raise UserError(
                f"{self.directory.parent}: this folder has the weights of {meta['source']}, and no run to go on with; name it "
                "in init_from, and train in a folder of its own"
            )
        # A field that an older version did not have has its default, which is what that version did.
        stored = to_data(parse(meta["config"], f"{self.directory.parent}: the config of step {step}"))
        changed = [line for line in difference(stored, to_data(config)) if not is_resumable(line)]
        if changed:
            raise UserError(
                f"{self.directory.parent}: its checkpoint at step {step} was made with another config: "
                f"{'; '.join(changed)}. Undo the change, or start anew with --run-dir FOLDER"
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))  # pyright: ignore[reportCallIssue]
        return self._manager.restore(step, args=args)["state"]

    def restore_params(self, step: int, abstract: nnx.State) -> nnx.State:
        """The parameters to use (their moving average, where the run keeps one), laid out as `abstract` says."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))  # pyright: ignore[reportCallIssue]
        return self._manager.restore(step, args=args)["params"]


def _one_copy(array: jax.Array) -> jax.Array:
    """A small array as one device has it, where all of them are of this process and have all of it.

    Of copies, orbax writes a slice from each device, which is worth its program for each slice only where the array is large.
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
        good = "none was written before" if last is None else f"the one of step {last} is whole"
        raise UserError(
            f"{self.checkpoints.directory}: cannot write a checkpoint ({_first_line(error)}); {good}. "
            "Free some space or choose another --run-dir, then run the same command again to go on"
        ) from None


def is_disk_error(error: BaseException) -> bool:
    """Whether a full, read-only or missing disk is at the bottom of `error`."""
    phrases = ("No space left", "Read-only file system", "Disk quota", "File too large", "Not a directory",
               "Permission denied")  # fmt: skip
    while error is not None:
        if any(phrase in str(error) for phrase in phrases):
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
