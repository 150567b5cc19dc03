"""Handling of Ctrl-C by the console commands. Imports nothing slow."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def exit_on_sigint(program: str) -> Iterator[None]:
    """Let SIGINT end the process with one line, whatever it is doing.

    While libraries load and start, Python's own KeyboardInterrupt may be lost in one of their callbacks. Unfinished files
    are never mistaken for finished ones, so a process may end anywhere.
    """

    def leave(number: int, frame: object) -> None:
        os.write(2, f"{program}: interrupted\n".encode())
        os._exit(128 + number)

    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
