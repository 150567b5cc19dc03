"""Writers of a run's metrics: metrics.jsonl always, and trackers of experiments by config."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.config import RunConfig
from train.config.sections import LogConfig
from train.files import write_whole, writing
from train.parallel.processes import is_first
from train.report.trackers import Tracked, Tracker, start_all
from transformer.errors import UserError, first_line

METRICS = "metrics.jsonl"
"""The file of a run for its metrics."""
SKIPPED = "skipped.jsonl"
"""The file of a run for the steps whose updates were skipped."""
TIME = "run/unix_seconds"
"""The metric that is the time of a record."""
SAMPLES = "samples.jsonl"
"""The file of a run for what its model wrote, with the step."""
STARTS = "starts.jsonl"
"""The file of a run for its beginning and each time that it was resumed."""
EXAMPLES = "examples"
"""The folder of a run for the ids of the examples of each step."""


class JsonlWriter:
    """One JSON object per line. Records after the step that a run resumes from are dropped: they will be written again.

    Records that cannot be written, such as on a full disk, are kept and written with the next.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path, self._waiting = path, ""
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= start_step]
            write_whole(path, "".join(f"{line}\n" for line in kept))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._waiting += json.dumps({"step": step, **values}) + "\n"
        self.close()

    def close(self) -> None:
        if not self._waiting:
            return
        # Opened anew each time, since a network's file system may have been away. A part of a line that is left ends there.
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                file.write(self._waiting.encode())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            raise
        self._waiting = ""


class MetricLog:
    """All writers of a run together, as a context manager. Names are `train/loss`, `eval/bits_per_byte` and so on.

    Args:
        start_step: the step after which the run begins or resumes.
        run_id: by which a service recognises the run when it resumes, and no other run of the same name.
    """

    def __init__(self, config: RunConfig, directory: Path, start_step: int, run_id: str) -> None:
        self._log: LogConfig = config.log
        self._directory = directory
        self._refused = dict[object, str]()
        self._trackers: list[Tracker] = []
        self.until: float | None = None
        """When the newest record was made that is there, those after `start_step` included; None without one."""
        self._kept = dict[str, JsonlWriter]()
        if is_first():
            with writing(directory):
                self.until = _last_time(directory / METRICS)
                self._kept = {name: JsonlWriter(directory / name, start_step) for name in (SKIPPED, SAMPLES)}
                # A start after which no step was kept is one all the same.
                self._kept[STARTS] = JsonlWriter(directory / STARTS, sys.maxsize)
                self._trackers = start_all(Tracked(config, directory, run_id, start_step))
        self._begin(start_step)

    def _begin(self, step: int) -> None:
        """Make the writers of all that is recorded anew when training goes back to `step`."""
        self._steps: JsonlWriter | None = None
        self._examples = None
        with writing(self._directory):
            if self._log.examples:
                self._examples = _example_writer(self._directory / EXAMPLES, step)
            if is_first():
                self._steps = JsonlWriter(self._directory / METRICS, step)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`: its next steps are taken once more. Of the trackers, TensorBoard drops them too."""
        if self._steps is not None:
            self._try(self._steps, self._steps.close)
        self._begin(step)
        for tracker in self._trackers:
            self._try(tracker, functools.partial(tracker.rewind, step))

    def write(self, step: int, **groups: Mapping[str, Any]) -> None:
        """Record the values of groups as `group/name`; None is left out. A disk that refuses does not end the run."""
        given = [(f"{group}/{name}", value) for group, values in groups.items() for name, value in values.items()]
        named = {name: float(value) for name, value in given if value is not None}
        for writer in (self._steps, *self._trackers):
            if writer is not None:
                self._try(writer, functools.partial(writer.write, step, named))

    def record(self, file: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a record to `SKIPPED`, `SAMPLES` or `STARTS`, which keep it when training goes back to an earlier step."""
        if (writer := self._kept.get(file)) is not None:
            self._try(writer, functools.partial(writer.write, step, values))

    def write_examples(self, step: int, ids: np.ndarray) -> None:
        """Record which examples a step took, those of this process, if the config asks for it."""
        if self._examples is not None:
            self._try(self._examples, functools.partial(self._examples.write, step, {"examples": ids.tolist()}))

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An interrupt ends a run that goes on later.
        failed = kind is not None and issubclass(kind, Exception)
        for writer in (self._steps, *self._kept.values(), self._examples):
            if writer is not None:
                self._try(writer, writer.close)
        for tracker in self._trackers:
            self._try(tracker, functools.partial(tracker.close, failed=failed))

    def _try(self, writer: JsonlWriter | Tracker, act: Callable[[], None]) -> None:
        try:
            act()
            self._refused.pop(writer, None)
        except Exception as error:
            # A service may fail in its own way.
            if isinstance(writer, JsonlWriter) and not isinstance(error, OSError):
                raise
            if (reason := first_line(error)) != self._refused.get(writer):
                self._refused[writer] = reason
                where = "" if isinstance(writer, JsonlWriter) else f" by {type(writer).__name__}"
                print(f"metrics cannot be written{where} ({reason}); training continues without them", file=sys.stderr)


def _example_writer(folder: Path, start_step: int) -> JsonlWriter:
    """The writer of this process. Process 0 also drops later records of processes that the run had before."""
    folder.mkdir(exist_ok=True)
    if is_first():
        own = {f"{index}.jsonl" for index in range(jax.process_count())}
        for path in folder.glob("*.jsonl"):
            if path.name not in own:
                JsonlWriter(path, start_step)
    return JsonlWriter(folder / f"{jax.process_index()}.jsonl", start_step)


def read_examples(directory: Path) -> dict[int, list[int]]:
    """The ids of each step's examples, in the order of the batch, as the processes of a run recorded them."""
    found = dict[int, list[int]]()
    for path in sorted((directory / EXAMPLES).glob("*.jsonl"), key=lambda path: int(path.stem)):
        for _, record in read_records(path):
            found.setdefault(record["step"], []).extend(record["examples"])
    return found


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line of a file that `JsonlWriter` wrote, and its record; none without a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    for number, line in enumerate(lines, start=1):
        # A kill may have truncated the last line.
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        yield number, record


def _last_time(path: Path) -> float | None:
    """The time of the last record of a step; of a long file only the end is parsed. Raises `OSError`."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(seconds := record.get(TIME), int | float):
                return float(seconds)
    return None


def _step_of(line: str) -> float:
    """A record's step, or of a rollback the first step after it; infinite for a truncated line, so that it is dropped."""
    try:
        record = json.loads(line)
        back_to = record.get("rolled_back_to")
        return record["step"] if back_to is None else back_to + 1
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return float("inf")
