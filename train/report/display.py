"""The display of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def console() -> Console:
    """A console for tables: as wide as the terminal; unlimited in a file or a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


class Display:
    """The status line of a run. Use it as a context manager.

    Args:
        num_steps: length of the run.
        start_step: where it begins.
        unit: the unit of a step's predictions.
    """

    def __init__(self, num_steps: int, start_step: int, console: Console | None = None, *, unit: str = "tok") -> None:
        # Files and pipes get no wrapping and no cursor movements.
        self.console = console or Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
        self._num_steps, self._unit = num_steps, unit
        self._first: tuple[int, float] | None = None
        """The first step that was shown, and when."""
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            # What a run ends with is its last word, and not the bar once more.
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=num_steps, completed=start_step, status="compiling ...")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def step(self, step: int, values: dict[str, float | None], *, record: bool) -> None:
        """Show the values of a step; without a terminal, only those of recorded steps."""
        status = self._status(step, values)
        if self.console.is_terminal:
            self._progress.update(self._task, completed=step, status=status)
        elif record:
            self.console.print(f"step {step}/{self._num_steps}  {status}", markup=False)

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(text, markup=False)

    def _status(self, step: int, values: dict[str, float | None]) -> str:
        speed, mfu = values.get("tokens_per_second"), values.get("mfu")
        parts = [
            f"loss {values['loss']:.4f}",
            f"lr {values['learning_rate']:.2e}",
            f"grad {values['grad_norm']:.2f}",
            f"{'–' if speed is None else _short(speed)} {self._unit}/s",
            f"MFU {'–' if mfu is None else f'{mfu:.1%}'}",
            f"left {self._left(step)}",
        ]
        return "  ".join(parts)

    def _left(self, step: int) -> str:
        """The time left at the mean speed so far: that of evaluations and checkpoints too, and not that of compiling."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first, began = self._first
        return "–" if step == first else clock((self._num_steps - step) * (now - began) / (step - first))


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
