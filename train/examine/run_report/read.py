"""What the folder of a run says of it."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.config import RunConfig, load
from train.report.metrics import SAMPLES, SKIPPED, STARTS, TIME, read_records
from train.run.data_summary import read_data_summary
from train.run.run_files import Curves, config_file, finished_step, read_metrics, read_origin
from transformer.errors import UserError, printable


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """The records of a run."""

    folder: Path
    config: RunConfig
    curves: Curves
    origin: dict[str, Any]
    """Id and versions; empty if they are not recorded."""
    data: dict[str, Any] | None
    starts: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    finished: int | None
    """The step with which it ended; None if it has not."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def title(self) -> str:
        """Its folder, as text that every encoding has."""
        return printable(str(self.folder))

    @functools.cached_property
    def spent(self) -> Spent | None:
        """Where its time went; None if it did not record its times."""
        return time_spent(self)

    @property
    def step(self) -> int:
        """The last recorded step."""
        return max((step for curve in self.curves.values() for step in curve), default=0)

    def last(self, metric: str) -> float | None:
        """The last value of a metric; None without one."""
        curve = self.curves.get(metric, {})
        return curve[max(curve)] if curve else None


_LATEST = 4e9
"""A time in seconds that no run reaches before the year 2096."""
_START = {
    "step": int, "unix_seconds": int | float, "device": str, "devices": int, "processes": int, "host": str,
}  # fmt: skip


def _records(path: Path, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of a file, each with these fields of these types."""
    found = []
    for number, record in read_records(path):
        if not (isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in wanted.items())):
            raise UserError(f"{path}:{number}: not a record with {', '.join(wanted)}; delete this line")
        if not all(
            _is_time(record[name]) for name in ("unix_seconds", "previous_until") if record.get(name) is not None
        ):
            raise UserError(f"{path}:{number}: not a time in seconds since 1970; delete this line")
        found.append(record)
    return found


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= _LATEST


def read_run(folder: Path) -> RecordedRun:
    """The records in a run's folder. Raises `UserError` if there is no run, or a file cannot be read."""
    return RecordedRun(
        folder=folder,
        config=load(config_file(folder)),
        curves=read_metrics(folder),
        origin=read_origin(folder) or {},
        data=read_data_summary(folder),
        starts=_records(folder / STARTS, _START),
        # The last of a step: at its end a run samples once more.
        samples=list({one["step"]: one for one in _records(folder / SAMPLES, {"step": int, "text": str})}.values()),
        skipped=_records(folder / SKIPPED, {"step": int, "reason": str, "examples": list}),
        finished=finished_step(folder),
    )


@dataclasses.dataclass(frozen=True)
class Spent:
    """Where the time of a run went, in seconds."""

    total: float
    """From each start to the last record before the next one."""
    steps: float
    data: float
    """Of `steps`, waiting for the next batch."""
    evaluations: float
    checkpoints: float
    lost: float
    """Steps that were taken again, since an interruption came after the last checkpoint."""

    @property
    def rest(self) -> float:
        """Compiling, samples, and what else is not counted."""
        return max(self.total - self.steps - self.evaluations - self.checkpoints - self.lost, 0.0)


def time_spent(run: RecordedRun) -> Spent | None:
    """None for a run that did not record its times."""
    times = sorted(run.curves.get(TIME, {}).values())
    if not (run.starts and times):
        return None
    starts = sorted(run.starts, key=lambda start: start["unix_seconds"])
    total = lost = 0.0
    for start, after in itertools.zip_longest(starts, starts[1:]):
        began = start["unix_seconds"]
        place = bisect.bisect_left(times, float("inf") if after is None else after["unix_seconds"])
        kept = max(times[place - 1] if place else began, began)
        # Records after the checkpoint that the next start resumed from are not there any more.
        until = max((after or {}).get("previous_until") or kept, kept)
        total, lost = total + until - began, lost + until - kept
    evaluations = sum(run.curves.get("run/evaluation_seconds", {}).values())
    # It comes after the last record.
    final = sum(run.curves.get("run/final_evaluation_seconds", {}).values())
    return Spent(
        total=total + final,
        steps=_over_steps(run.curves.get("run/step_seconds", {})),
        data=_over_steps(run.curves.get("run/data_wait_seconds", {})),
        evaluations=evaluations + final,
        checkpoints=sum(run.curves.get("checkpoint/stall_seconds", {}).values()),
        lost=lost,
    )


def _over_steps(seconds: dict[int, float]) -> float:
    """The sum over all steps of what is recorded at some: each record stands for the steps since the one before."""
    total, before = 0.0, 0
    for step in sorted(seconds):
        total, before = total + (step - before) * seconds[step], step
    return total
