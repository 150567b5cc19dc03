"""Archives of files (.zip, .tar, and compressed .tar): unpacked once into the cache, and read from there."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from train.files import cache_dir, locked, whole_folder, writing
from transformer.errors import UserError, first_line
from transformer.paths import path_inside

ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
_LATEST = float(2**33)
"""The latest time, in seconds since 1970, that a file gets."""
_HIDDEN = (".", "__MACOSX")
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    OverflowError,
)


def archive_in(path: Path) -> Path | None:
    """The archive that a path is, or leads into; None if there is none."""
    for part in (path, *path.parents):
        if part.name.lower().endswith(ARCHIVES) and os.path.isfile(part):
            return part
    return None


def unpacked(archive: Path) -> Path:
    """The folder with an archive's files, unpacked unless they are there from before.

    Raises:
        UserError: an archive that is damaged, encrypted, or has names that lead out of it; a disk that is full.
    """
    about = archive.stat()
    key = repr((str(archive.resolve()), about.st_size, about.st_mtime_ns))
    folder = (
        cache_dir() / "archives" / hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    )
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock"), waiting=lambda: None):
        if not folder.is_dir():
            with whole_folder(folder) as partial:
                _unpack(archive, partial)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with contextlib.closing(_members(archive)) as members:
            for name, seconds, stream in members:
                path = path_inside(folder, name, source=str(archive))
                with writing(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with stream, path.open("wb") as out:
                        shutil.copyfileobj(stream, out)
                    os.utime(path, (seconds, seconds))
    except _DAMAGED as error:
        raise UserError(f"{archive}: cannot be unpacked ({first_line(error)})") from None


def _members(archive: Path) -> Generator[tuple[str, float, IO[bytes]], None, None]:
    """The name, the time and the content of each file that is not hidden."""
    if archive.suffix.lower() == ".zip":
        # A time of a zip file has no time zone: the archive's own is as good.
        seconds = archive.stat().st_mtime
        with zipfile.ZipFile(archive) as packed:
            for one in packed.infolist():
                is_link = stat.S_ISLNK(one.external_attr >> 16)
                if not one.is_dir() and not is_link and not _is_hidden(one.filename):
                    yield one.filename, seconds, packed.open(one)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            content: Any = (
                tar.extractfile(member) if (member.isfile() or member.islnk()) and not _is_hidden(member.name) else None
            )
            if content is not None:
                yield member.name, min(max(float(member.mtime), 0.0), _LATEST), content


def _is_hidden(name: str) -> bool:
    return any(part.startswith(_HIDDEN) and part not in (".", "..") for part in name.split("/"))
