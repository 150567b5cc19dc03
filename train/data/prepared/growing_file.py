"""Files that grow in parts, each of which is on the disk, and known by its hash, before the next one begins."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

_CHUNK_BYTES = 1 << 20


class Stretch(NamedTuple):
    """The bytes of a file from `begin` to before `end`."""

    begin: int
    end: int
    digest: str
    """BLAKE2b of the bytes."""


class GrowingFile:
    """A file to write at one position, part after part. A context manager, which closes it."""

    def __init__(self, path: Path, begin: bytes, end: int | None) -> None:
        """Open a file that begins with `begin`, or make it, and continue at byte `end`; what is after it is dropped.

        Raises `OSError`, as do the methods.
        """
        path.parent.mkdir(exist_ok=True)
        self.path = path
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._waiting = bytearray()
        try:
            self._file.write(begin)
            self._file.truncate(len(begin) if end is None else end)
            self.move(len(begin) if end is None else end)
            # The size shows from the beginning that somebody is at work.
            self._file.flush()
        except OSError:
            self._file.close()
            raise

    def move(self, position: int) -> None:
        """Begin a part at byte `position`."""
        self._file.seek(position)
        self._begin = self.position = position
        self._hash = hashlib.blake2b(digest_size=16)

    def write(self, data: bytes) -> None:
        """Append to the part."""
        self._waiting += data
        self.position += len(data)
        if len(self._waiting) >= _CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._file.write(self._waiting)
        self._file.flush()
        self._hash.update(self._waiting)
        self._waiting.clear()

    def end_part(self) -> Stretch:
        """Wait until the part is on the disk, and begin another one after it."""
        self.flush()
        os.fsync(self._file.fileno())
        stretch = Stretch(self._begin, self.position, self._hash.hexdigest())
        self.move(self.position)
        return stretch

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def is_intact(path: Path, stretch: Stretch) -> bool:
    """Whether a file holds these bytes."""
    try:
        return digest_of(path, stretch.begin, stretch.end).hexdigest() == stretch.digest
    except OSError:
        return False


def digest_of(
    path: Path, begin: int, end: int | None = None, *, running: hashlib.blake2b | None = None
) -> hashlib.blake2b:
    """The BLAKE2b, or the `running` one updated, of a file's bytes from `begin` to before `end`; None: to its end.

    Raises `OSError`.
    """
    digest = hashlib.blake2b(digest_size=16) if running is None else running
    with path.open("rb") as stream:
        stream.seek(begin)
        left = path.stat().st_size - begin if end is None else end - begin
        while left > 0 and (data := stream.read(min(left, _CHUNK_BYTES))):
            digest.update(data)
            left -= len(data)
    return digest
