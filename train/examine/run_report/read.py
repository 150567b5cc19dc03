"""What the folder of a run says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.config import RunConfig, load
from train.report.metrics import SAMPLES, SKIPPED, STARTS, read_records
from train.run.data_summary import read_data_summary
from train.run.run_files import Curves, config_file, finished_step, read_metrics, read_origin
from transformer.errors import UserError


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
    def step(self) -> int:
        """The last recorded step."""
        return max((step for curve in self.curves.values() for step in curve), default=0)

    def last(self, metric: str) -> float | None:
        """The last value of a metric; None without one."""
        curve = self.curves.get(metric, {})
        return curve[max(curve)] if curve else None


_START = {
    "step": int, "unix_seconds": int | float, "device": str, "devices": int, "processes": int, "host": str,
}  # fmt: skip


def _records(path: Path, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of a file, each with these fields of these types."""
    found = []
    for number, record in read_records(path):
        if not (isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in wanted.items())):
            raise UserError(f"{path}:{number}: not a record with {', '.join(wanted)}; delete this line")
        found.append(record)
    return found


def read_run(folder: Path) -> RecordedRun:
    """The records in a run's folder. Raises `UserError` if there is no run, or a file cannot be read."""
    return RecordedRun(
        folder=folder,
        config=load(config_file(folder)),
        curves=read_metrics(folder),
        origin=read_origin(folder) or {},
        data=read_data_summary(folder),
        starts=_records(folder / STARTS, _START),
        samples=_records(folder / SAMPLES, {"step": int, "text": str}),
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

    @property
    def rest(self) -> float:
        """Compiling, samples, and what else is not counted."""
        return max(self.total - self.steps - self.evaluations - self.checkpoints, 0.0)


def time_spent(run: RecordedRun) -> Spent | None:
    """None for a run that did not record its times."""
    clock = run.curves.get("run/unix_seconds", {})
    if not (run.starts and clock):
        return None
    times = sorted(clock.values())
    began = sorted(record["unix_seconds"] for record in run.starts)
    total = 0.0
    for number, start in enumerate(began):
        until = began[number + 1] if number + 1 < len(began) else float("inf")
        total += max((time - start for time in times if start <= time < until), default=0.0)
    # After the last record comes the evaluation of all held-out documents.
    evaluated = run.curves.get("run/evaluation_seconds", {})
    last = max(clock)
    total += sum(seconds for step, seconds in evaluated.items() if step >= last)
    return Spent(
        total=total,
        steps=_over_steps(run.curves.get("run/step_seconds", {})),
        data=_over_steps(run.curves.get("run/data_wait_seconds", {})),
        evaluations=sum(evaluated.values()),
        checkpoints=sum(run.curves.get("checkpoint/stall_seconds", {}).values()),
    )


def _over_steps(seconds: dict[int, float]) -> float:
    """The sum over all steps of what is recorded at some: each record stands for the steps since the one before."""
    total, before = 0.0, 0
    for step in sorted(seconds):
        total, before = total + (step - before) * seconds[step], step
    return total
