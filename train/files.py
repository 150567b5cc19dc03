"""Where downloaded and prepared data lives on this machine, and what to say when the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from transformer.errors import UserError

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
    errno.ENOTDIR: "a part of this path is a file",
    errno.EEXIST: "a part of this path is a file",
}


def cache_dir() -> Path:
    """The folder for everything that can be made again.

    `$MANYHEADS_CACHE`, else `$XDG_CACHE_HOME/manyheads`, else `~/.cache/manyheads`. It may not exist yet.
    """
    if chosen := os.environ.get("MANYHEADS_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "manyheads"
    return Path.home() / ".cache" / "manyheads"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block, which writes under `path`, into a `UserError` of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = _ADVICE.get(error.errno or 0, "look at the disk")
        in_cache = path.absolute().is_relative_to(cache_dir().absolute())
        other = "set MANYHEADS_CACHE to another folder" if in_cache else "choose another place"
        raise UserError(f"cannot write {error.filename or path}: {reason}; {advice}, or {other}") from error


def check_new(directory: Path) -> None:
    """Raise a `UserError` where a folder to make is there already."""
    if directory.exists():
        raise UserError(f"{directory}: it exists already; choose another folder, or delete it")


def check_place(file: Path) -> None:
    """Raise a `UserError` where a file cannot be written, before anything is computed for it."""
    if file.is_dir():
        raise UserError(f"{file}: this is a folder; name a file")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{file}: the folder {file.absolute().parent} does not exist; make it first")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` once the block has ended well and it is on the disk.

    A reader, or a process that is killed, finds the old file or the new one, never a part. Raises `OSError`.
    """
    # A random name: processes of different machines may have the same number.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file by `whole_file`, in UTF-8. Raises `OSError`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


class Busy(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock file. The system releases it when its holder dies.

    Args:
        waiting: called once where another process holds the lock, which is then waited for; None: raise `Busy` instead.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with writing(path.parent):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                raise Busy from None
            waiting()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def run_lock(directory: Path, process: int = 0) -> Path:
    """The lock file that a process holds while it trains in a run's folder."""
    return directory / f".lock-{process}"


@contextlib.contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `directory` once the block has ended well, and is gone where it has not.

    Raises:
        UserError: it cannot be written.
    """
    with writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with writing(directory):
            yield partial
            # A temporary folder is its owner's alone.
            partial.chmod(0o755)
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not just in memory. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
