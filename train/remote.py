"""Files in object stores and at other remote addresses that fsspec knows: `s3://`, `gs://`, `memory://`, ...

They are copied to this machine before they are read, and files that were written here are copied there: everything else
reads and writes local files only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from train.files import cache_dir, whole_file, write_whole, writing
from transformer.errors import UserError, first_line
from transformer.paths import expanded, path_inside

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_STATE = r"^checkpoints/\d+/state/"
_MANIFEST = ".remote.json"
"""In a local copy of a folder: what is copied."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address such as `s3://bucket/runs/one`."""
    return _ADDRESS.match(str(path)) is not None


def local_path(path: str | Path) -> Path:
    """The place of a file or folder on this machine: `~` expanded; of an address, where its copy is kept."""
    if not is_remote(path):
        return expanded(path)
    address = str(path).rstrip("/")
    digest = hashlib.blake2b(address.encode(), digest_size=6).hexdigest()
    return cache_dir() / "remote" / f"{digest}-{address.rpartition('/')[2]}"


class RemoteFile(NamedTuple):
    """A file at an address."""

    address: str
    size: int
    version: str
    """Changes with the content."""

    def fetch(self) -> Path:
        """A copy on this machine, which is made once for each version. Raises `UserError`."""
        digest = hashlib.blake2b(f"{self.address}\n{self.version}".encode(), digest_size=12).hexdigest()
        path = cache_dir() / "remote" / digest / self.address.rpartition("/")[2]
        if not path.is_file():
            _download(self.address, path)
        return path


def find_files(pattern: str) -> list[tuple[str, RemoteFile]]:
    """The files that an address or a pattern such as `s3://bucket/texts/**/*.txt` names, sorted; each with its path below the
    part without wildcards.

    Raises:
        UserError: there are none, or the place cannot be reached.
    """
    with _reaching(pattern):
        system, path = _open(pattern)
        found = system.glob(path, detail=True) if _has_wildcard(path) else {path: system.info(path)}
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        protocol = pattern.partition("://")[0]
        root = "" if not _has_wildcard(path) else re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        named = []
        for name, info in sorted(files.items()):
            below = name.removeprefix(root).lstrip("/") if root else name.rpartition("/")[2]
            named.append((below, RemoteFile(f"{protocol}://{name.lstrip('/')}", int(info["size"]), system.ukey(name))))
    if not named:
        raise UserError(f"{pattern}: no such file; correct path")
    return named


class MirroredFolder:
    """A folder at an address, and its copy on this machine.

    Of files that differ, those there are newer if they changed since the two were last the same; else those here are.
    """

    def __init__(self, address: str) -> None:
        self.address, self.local = address.rstrip("/"), local_path(address)

    def fetch(self, *, skip: str | None = None) -> bool:
        """Make the local folder as the remote one, unless that has not changed since it was last the same.

        Args:
            skip: a pattern (`re`) of names that are not needed here.

        Returns:
            Whether there is anything at the address.

        Raises:
            UserError: it cannot be reached, or the disk refuses.
        """
        there, known = self._versions(), self._manifest()
        if not there:
            return False
        # The run went on elsewhere: checkpoints that are only here are not part of it.
        elsewhere = not known or any(there.get(name) != entry["version"] for name, entry in known.items())
        for name in sorted(there):
            is_known = known.get(name, {}).get("version") == there[name]
            if (skip is None or not re.search(skip, name)) and not (is_known and (self.local / name).is_file()):
                path = path_inside(self.local, name, source=self.address)
                _download(f"{self.address}/{name}", path)
                known[name] = self._entry(name, there[name])
        for name in known.keys() - there.keys():
            del known[name]
        for name in self._files().keys() - there.keys() if elsewhere else ():
            if name.startswith("checkpoints/"):
                (self.local / name).unlink(missing_ok=True)
        self._remember(known)
        return True

    def push(self) -> None:
        """Make the remote folder as the local one. A folder's hashes are copied after its other files, so that a part of a
        checkpoint does not count as one.

        Raises:
            UserError: it cannot be reached.
        """
        known, files = self._manifest(), self._files()
        with _reaching(self.address):
            system, root = _open(self.address)
            for name in sorted(files, key=lambda name: (name.endswith("hashes.json"), name)):
                entry = known.get(name, {})
                try:
                    size, changed = files[name]
                    if (entry.get("size"), entry.get("changed")) == (size, changed):
                        continue
                    system.put_file(str(self.local / name), f"{root}/{name}")
                except FileNotFoundError:
                    continue  # removed while the others were copied
                known[name] = {"size": size, "changed": changed, "version": system.ukey(f"{root}/{name}")}
                self._remember(known)
            for name in sorted(known.keys() - self._files().keys()):
                with contextlib.suppress(FileNotFoundError):
                    system.rm_file(f"{root}/{name}")
                del known[name]
        self._remember(known)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of each local file; locks and what is not whole yet are left out."""
        found = {}
        for path in self.local.rglob("*"):
            name = path.relative_to(self.local)
            if any(part.startswith(".") or "orbax-checkpoint-tmp" in part for part in name.parts):
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    found[name.as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _versions(self) -> dict[str, str]:
        """The version of each remote file."""
        with _reaching(self.address):
            system, root = _open(self.address)
            # Another process may have written since this one last listed it.
            system.invalidate_cache()
            if not system.exists(root):
                return {}
            if not system.isdir(root):
                raise UserError(f"{self.address}: this is a file; name a folder")
            names = [name for name, info in system.find(root, detail=True).items() if info["type"] == "file"]
            return {name[len(root.rstrip("/")) + 1 :].lstrip("/"): system.ukey(name) for name in names}

    def _entry(self, name: str, version: str) -> dict[str, Any]:
        stat = (self.local / name).stat()
        return {"size": stat.st_size, "changed": stat.st_mtime_ns, "version": version}

    def _manifest(self) -> dict[str, dict[str, Any]]:
        try:
            return json.loads((self.local / _MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _remember(self, entries: dict[str, dict[str, Any]]) -> None:
        with writing(self.local):
            self.local.mkdir(parents=True, exist_ok=True)
            write_whole(self.local / _MANIFEST, json.dumps(entries))


def local_run(path: str | Path, *, whole: bool = False) -> Path:
    """The folder of a run to use: of an address, its copy.

    Args:
        whole: with what only training needs, such as the optimiser's state.

    Raises:
        UserError: there is no folder at the address.
    """
    if is_remote(path) and not MirroredFolder(str(path)).fetch(skip=None if whole else _STATE):
        raise UserError(f"{path}: no run here")
    return local_path(path)


def _download(address: str, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _reaching(address), whole_file(path) as partial:
            system, name = _open(address)
            system.get_file(name, str(partial))


def _open(address: str) -> Any:
    """The file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    return url_to_fs(address)


def _has_wildcard(path: str) -> bool:
    return any(letter in path for letter in "*?[")


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Turn what a remote file system raises into a `UserError` that names the address."""
    protocol = address.partition("://")[0]
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{address}: no such file or folder") from None
    except ImportError as error:
        package = _PACKAGES.get(protocol, f"the package that fsspec names ({first_line(error)})")
        raise UserError(f"{address}: {protocol}:// needs {package}; pip install it") from None
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise UserError(f"{address}: cannot be reached ({first_line(error)})") from None
        raise UserError(
            f"{address}: {protocol}:// is not known; allowed: a path, or an address such as s3:// or gs://"
        ) from None
    except Exception as error:  # each store has errors of its own
        raise UserError(f"{address}: cannot be reached ({type(error).__name__}: {first_line(error)})") from error
