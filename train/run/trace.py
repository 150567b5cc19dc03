"""Traces some of a run's steps for TensorBoard or Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax


class Trace:
    """A context manager over the steps of a run.

    Args:
        steps: the first and the last step to trace; None: none.
        directory: the run's folder.
        start: the step that the run resumes after. Steps before it cannot be traced any more.
        say: takes a line for the user.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, start: int, say: Callable[[str], None]) -> None:
        self._steps = None if steps is None or steps[0] <= start else steps
        self._folder, self._say = directory / "profile", say
        self._first: int | None = None
        self._last = start

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def step(self, step: int) -> None:
        """To be called before each step."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._first, self._steps = step, (0, self._steps[1])
        elif self._steps is not None and step > self._steps[1]:
            self.end()
        self._last = step

    def end(self) -> None:
        """End the trace, if there is one."""
        if self._first is None:
            return
        jax.profiler.stop_trace()
        self._say(f"profile of steps {self._first} to {self._last}: {self._folder}")
        self._first = None
