"""Watches a call: how long it takes, and what it writes outside the folders that are its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1, "os.rename": 2, "os.link": 2,
           "os.symlink": 2}  # fmt: skip
"""Events of changes to the file system → how many of their first arguments are paths."""
_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Late(BaseException):
    """A call took too long. Code that turns errors into messages does not catch it."""


class Guard:
    """Records what is written outside some folders, by Python's audit events: of this process, from now on.

    Args:
        always: folders in which every call may write.
    """

    def __init__(self, always: tuple[Path, ...]) -> None:
        self._always = tuple(map(str, always))
        self._allowed: tuple[str, ...] | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self, place: Path, seconds: float) -> Iterator[None]:
        """Allow writing in `place`, and end the block after some seconds. Raises `Late`."""
        self.outside, self._allowed = [], (*self._always, str(place))
        previous = signal.signal(signal.SIGALRM, _late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
            self._allowed = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._allowed is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if mode is not None else bool(flags & _FLAGS)
            paths = (path,) if writes else ()
        elif event in _WRITES:
            paths = arguments[: _WRITES[event]]
            if event == "os.symlink":
                paths = paths[1:]
        else:
            return
        folder = next((one for one in arguments[1:] if event != "open" and isinstance(one, int) and one >= 0), None)
        for path in paths:
            self._check(event, path, folder if event in ("os.mkdir", "os.remove", "os.rmdir") else None)

    def _check(self, event: str, path: Any, descriptor: int | None) -> None:
        if isinstance(path, int):
            return
        text = os.fsdecode(path)
        if descriptor is not None and event != "os.mkdir" and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), text)
        whole = os.path.abspath(text)
        allowed = self._allowed or ()
        if whole.startswith("/dev/") or any(whole == one or whole.startswith(f"{one}/") for one in allowed):
            return
        self.outside.append(f"{event} {whole}")


def _late(number: int, frame: object) -> None:
    raise Late


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder: its size and time."""
    found = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            about = os.lstat(os.path.join(directory, name))
            found[os.path.join(directory, name)] = (about.st_size, about.st_mtime_ns)
    return found
