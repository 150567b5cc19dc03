"""Processes of a run that are started to be killed."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.report.metrics import METRICS
from train.run.run_files import read_metrics
from transformer.errors import UserError

MOMENTS = ("start", "step", "save", "evaluation")
"""When a run is killed: at some time before its first step, after a step, while a checkpoint is written, in an evaluation."""
_POLL_SECONDS = 0.005
_FOLLOW_SECONDS = 90.0
"""How long the other processes of a run may take to end by themselves after one of them."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a run computes: virtual CPU devices, divided among processes on this machine."""

    devices: int
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.devices} devices of {self.processes} processes"


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL of all processes of a run."""

    meant: str
    """One of `MOMENTS`, for which it waited."""
    step: int
    """The last step that was recorded before it."""
    while_saving: bool
    """Whether a checkpoint was being written."""
    while_evaluating: bool
    devices: int
    processes: int
    seconds: float
    """After the processes began."""


class Running:
    """A run whose processes are started here. What they say on standard error is kept next to its folder.

    Args:
        config: the file of the config.
        run: the run's folder.
    """

    def __init__(self, config: Path, run: Path, layout: Layout) -> None:
        self.run, self.began = run, time.monotonic()
        command = [sys.executable, "-m", "train.commands.cli", "train", str(config), "--run-dir", str(run)]
        command += ["--devices", str(layout.devices // layout.processes)]
        root = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        several = ["--coordinator", f"127.0.0.1:{_free_port()}", "--num-processes", str(layout.processes)]
        self._processes: list[subprocess.Popen[bytes]] = []
        for index in range(layout.processes):
            own = [*several, "--process-id", str(index)] if layout.processes > 1 else []
            with self._errors(index).open("w", encoding="utf-8") as errors:
                self._processes.append(
                    subprocess.Popen([*command, *own], stdout=subprocess.DEVNULL, stderr=errors, env=environment)
                )

    @property
    def seconds(self) -> float:
        """Since the processes began."""
        return time.monotonic() - self.began

    @property
    def pid(self) -> int:
        """The number of its first process."""
        return self._processes[0].pid

    @property
    def is_alive(self) -> bool:
        """Whether no process has ended."""
        return all(process.poll() is None for process in self._processes)

    def kill(self) -> bool:
        """Kill all processes; False if the run had finished before.

        Raises:
            UserError: it ended with an error before.
        """
        for process in self._processes:
            process.kill()
        statuses = [process.wait() for process in self._processes]
        # Those that were killed have a negative one.
        self._check([max(status, 0) for status in statuses])
        # One process may have finished just before the others were killed; their work is done too.
        return 0 not in statuses

    def finish(self) -> None:
        """Wait until the run ends. Raises `UserError` with its error unless it finished."""
        while self.is_alive:
            time.sleep(0.05)
        statuses = []
        for process in self._processes:
            try:
                statuses.append(process.wait(_FOLLOW_SECONDS))
            except subprocess.TimeoutExpired:
                process.kill()
                statuses.append(process.wait())
        self._check(statuses)

    def _check(self, statuses: Sequence[int]) -> None:
        for index, status in enumerate(statuses):
            if status:
                raise UserError(f"{self.run}: ended with status {status}: {self._last_line(index)}")

    def _errors(self, index: int) -> Path:
        return self.run.with_name(f"{self.run.name}.errors-{index}.txt")

    def _last_line(self, index: int) -> str:
        lines = self._errors(index).read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "without a message")


def seconds_to_first_step(running: Running) -> float:
    """Wait for the first recorded step of a new run, or its end; the seconds from its start."""
    while running.is_alive and not last_step(running.run):
        time.sleep(_POLL_SECONDS)
    return running.seconds


class Killer:
    """Starts a run again and again, and kills it at random moments.

    Args:
        config: the file of the config.
        run: the run's folder.
        starting: seconds until the first step of a run; corrected by what is seen.
        every: steps between evaluations.
        seed: of the moments.
    """

    def __init__(self, config: Path, run: Path, starting: float, every: int, seed: int) -> None:
        self._config, self._run, self._starting, self._every = config, run, starting, every
        self._random = np.random.default_rng(seed)

    def kill(self, meant: str, layout: Layout) -> Kill | None:
        """Start or resume the run, and kill it at a moment as `meant`, in `Kill`; None if it finished before.

        Raises:
            UserError: the run ended with an error.
        """
        random, run = self._random, self._run
        moment, steps, more = random.uniform(0.0, self._starting), random.integers(1, 8), random.uniform(0.0, 0.05)
        records, base = _identity_of(run / METRICS), None
        running = Running(self._config, run, layout)
        while running.is_alive:
            if meant == "start" and running.seconds >= moment:
                break
            # A run that resumes writes the file of its records anew.
            if base is None and _identity_of(run / METRICS) != records:
                base = last_step(run)
            if base is not None and (step := last_step(run)) > base:
                self._starting = min(self._starting, running.seconds)
                if meant != "start" and step >= base + steps:
                    break
            time.sleep(_POLL_SECONDS)
        if meant in ("save", "evaluation"):
            while running.is_alive and not (is_saving(run) if meant == "save" else is_evaluating(run, self._every)):
                time.sleep(_POLL_SECONDS)
        if meant != "start":
            time.sleep(more)
        saving, evaluating, seconds = is_saving(run), is_evaluating(run, self._every), running.seconds
        if not running.kill():
            return None
        return Kill(meant, last_step(run), saving, evaluating, layout.devices, layout.processes, round(seconds, 3))


def _identity_of(file: Path) -> int | None:
    """Another one for a file that was written anew; None if there is none."""
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return None


def last_step(run: Path) -> int:
    """The last step that a run recorded; 0 before the first."""
    return max(read_metrics(run).get("train/loss", {}), default=0)


def is_saving(run: Path) -> bool:
    """Whether a run has a checkpoint that is not whole yet."""
    folder = run / "checkpoints"
    return folder.is_dir() and any("tmp" in name for name in os.listdir(folder))


def is_evaluating(run: Path, every: int) -> bool:
    """Whether the evaluation of a run's last recorded step is due and not recorded."""
    metrics = read_metrics(run)
    step = max(metrics.get("train/loss", {}), default=0)
    return bool(every and step and step % every == 0 and step not in metrics.get("eval/loss", {}))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
