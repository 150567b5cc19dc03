"""Files in object stores and at other remote addresses that fsspec knows: `s3://`, `gs://`, `memory://`, ...

They are copied to this machine before they are read, and files that were written here are copied there: everything else
reads and writes local files only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from train.files import Busy, cache_dir, locked, run_lock, whole_file, write_whole, writing
from transformer.errors import UserError, first_line
from transformer.paths import expanded, path_inside

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_STATE = r"^checkpoints/\d+/state/"
_MANIFEST = ".remote.json"
"""In a local copy of a folder: what is copied."""
FETCH_LOCK = ".fetch"
"""In a local copy of a folder: the lock file of a process that fetches it."""
_OWNER = "owner.json"
"""In a folder at an address: who writes it."""
_CHECKPOINTS = "checkpoints/"
_HASHES = "hashes.json"
"""The file of a checkpoint that is written last."""


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
        # What was listed before may have changed.
        system.invalidate_cache()
        found = system.glob(path, detail=True) if _has_wildcard(path) else {path: system.info(path)}
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        protocol = pattern.partition("://")[0]
        root = "" if not _has_wildcard(path) else re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        named = []
        for name, info in sorted(files.items()):
            below = name.removeprefix(root).lstrip("/") if root else name.rpartition("/")[2]
            named.append((below, RemoteFile(f"{protocol}://{name.lstrip('/')}", int(info["size"]), _version(info))))
    if not named:
        raise UserError(f"{pattern}: no such file; correct path")
    return named


class MirroredFolder:
    """A folder at an address, and its copy on this machine.

    Who writes the folder leaves a token of its own there. As long as it is the newest, the copy here is at least as new as the
    folder there, whatever an interruption left undone; else the folder there is newer.
    """

    def __init__(self, address: str) -> None:
        self.address, self.local = address.rstrip("/"), local_path(address)

    def fetch(self, *, skip: str | None = None) -> bool:
        """Make the local folder as the remote one; where this machine was the last to write, get only what is missing here.

        Args:
            skip: a pattern (`re`) of names that are not needed here.

        Returns:
            Whether there is anything at the address.

        Raises:
            UserError: it cannot be reached, or the disk refuses.
        """
        there, manifest = self._versions(), self._manifest()
        if not there:
            self._remember(_Manifest())
            return False
        owner = self._owner()
        is_newest = bool(manifest.token) and owner in (manifest.token, manifest.previous) and manifest.writes
        for name in sorted(there):
            if skip is not None and re.search(skip, name):
                continue
            path = path_inside(self.local, name, source=self.address)
            if path.is_file() and (is_newest or manifest.files.get(name, {}).get("version") == there[name]):
                continue
            with contextlib.suppress(_Missing):  # a run that goes on has removed it by now
                _download(f"{self.address}/{name}", path)
                manifest.files[name] = self._entry(name, there[name])
        if not is_newest:
            self._drop_checkpoints(there)
            manifest = _Manifest(
                token=owner, files={name: manifest.files[name] for name in there if name in manifest.files}
            )
        self._remember(manifest)
        return True

    def claim(self) -> None:
        """Become the one that writes the folder. Raises `UserError` if it cannot be reached."""
        manifest = self._manifest()
        manifest.previous, manifest.token, manifest.writes = self._owner(), secrets.token_hex(8), True
        self._remember(manifest)
        with _reaching(self.address):
            system, root = _open(self.address)
            _make_folder(system, root)
            system.pipe_file(f"{root}/{_OWNER}", json.dumps({"token": manifest.token}).encode())

    def push(self) -> None:
        """Make the remote folder as the local one. A folder's hashes are copied after its other files, so that a part of a
        checkpoint does not count as one; old checkpoints are removed only once a newer one is there.

        Raises:
            UserError: it cannot be reached, or another process writes it.
        """
        manifest, files = self._manifest(), self._files()
        if self._owner() != manifest.token:
            raise UserError(f"{self.address}: another process has begun to write there; end one of them")
        try:
            with _reaching(self.address):
                self._push(manifest.files, files)
        finally:
            # What is copied and not remembered would be copied again.
            self._remember(manifest)

    def _push(self, known: dict[str, dict[str, Any]], files: Mapping[str, tuple[int, int]]) -> None:
        system, root = _open(self.address)
        for name in sorted(files, key=lambda name: (name.endswith(_HASHES), name)):
            size, changed = files[name]
            entry = known.get(name, {})
            if (entry.get("size"), entry.get("changed")) == (size, changed):
                continue
            try:
                _make_folder(system, f"{root}/{name}".rpartition("/")[0])
                system.put_file(str(self.local / name), f"{root}/{name}")
            except FileNotFoundError:
                if (self.local / name).exists():
                    raise
                continue  # removed while the others were copied
            known[name] = {"size": size, "changed": changed, "version": _version(system.info(f"{root}/{name}"))}
        files = self._files()
        gone = known.keys() - files.keys()
        if not any(name.endswith(_HASHES) for name in known.keys() & files.keys()):
            gone = {name for name in gone if not name.startswith(_CHECKPOINTS)}
        for name in sorted(gone, key=lambda name: (not name.endswith(_HASHES), name)):
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(f"{root}/{name}")
            del known[name]

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of each local file; locks and what is not whole yet are left out."""
        found = {}

        def refused(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        for folder, folders, names in os.walk(self.local, onerror=refused):
            folders[:] = [name for name in folders if _is_kept(name)]
            for path in (Path(folder, name) for name in names if _is_kept(name)):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    found[path.relative_to(self.local).as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _versions(self) -> dict[str, str]:
        """The version of each remote file, without those of parts of checkpoints."""
        with _reaching(self.address):
            system, root = _open(self.address)
            # Another process may have written since this one last listed it.
            system.invalidate_cache()
            if not system.exists(root):
                return {}
            if not system.isdir(root):
                raise UserError(f"{self.address}: this is a file; name a folder")
            found, start = {}, len(root.rstrip("/")) + 1
            for path, info in system.find(root, detail=True).items():
                name = path[start:].lstrip("/")
                if info["type"] == "file" and name != _OWNER and all(map(_is_kept, name.split("/"))):
                    found[name] = _version(info)
        return {name: version for name, version in found.items() if _whole_checkpoint(name, found)}

    def _owner(self) -> str:
        """The token of who writes the remote folder; empty if nobody has."""
        try:
            with _reaching(self.address):
                system, root = _open(self.address)
                system.invalidate_cache()
                return str(json.loads(system.cat_file(f"{root}/{_OWNER}"))["token"])
        except (_Missing, KeyError, TypeError):
            return ""

    def _drop_checkpoints(self, there: Mapping[str, str]) -> None:
        """Remove local checkpoints that are not part of the run any more, which went on elsewhere."""
        for name in self._files().keys() - there.keys():
            if name.startswith(_CHECKPOINTS):
                (self.local / name).unlink(missing_ok=True)
        for folder, _, _ in os.walk(self.local / "checkpoints", topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _entry(self, name: str, version: str) -> dict[str, Any]:
        stat = (self.local / name).stat()
        return {"size": stat.st_size, "changed": stat.st_mtime_ns, "version": version}

    def _manifest(self) -> _Manifest:
        try:
            return _Manifest(**json.loads((self.local / _MANIFEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return _Manifest()

    def _remember(self, manifest: _Manifest) -> None:
        with writing(self.local):
            self.local.mkdir(parents=True, exist_ok=True)
            write_whole(self.local / _MANIFEST, json.dumps(dataclasses.asdict(manifest)))


@dataclasses.dataclass
class _Manifest:
    """What a local copy knows of its address."""

    token: str = ""
    """Of who wrote there when the two were last compared."""
    previous: str = ""
    """That before: the token may be here and not yet there."""
    writes: bool = False
    """Whether the token is this machine's own."""
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Size, time and remote version of each file when it was last the same in both places."""


class _Missing(UserError):
    """No such file or folder at an address."""


def local_run(path: str | Path, *, whole: bool = False) -> Path:
    """The folder of a run; for an address, that of its copy, which is not fetched while this machine trains the run.

    Args:
        whole: with what only training needs, such as the optimiser's state.

    Raises:
        UserError: there is no folder at the address.
    """
    if not is_remote(path):
        return local_path(path)
    folder = MirroredFolder(str(path))
    with writing(folder.local):
        folder.local.mkdir(parents=True, exist_ok=True)
    with (
        locked(folder.local / FETCH_LOCK, waiting=lambda: None),
        contextlib.suppress(Busy),
        locked(run_lock(folder.local)),
    ):
        if not folder.fetch(skip=None if whole else _STATE):
            raise UserError(f"{path}: no run here")
    return folder.local


def _download(address: str, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _reaching(address), whole_file(path) as partial:
            system, name = _open(address)
            system.get_file(name, str(partial))


def _version(info: Mapping[str, Any]) -> str:
    """A text that changes with a file's content, from what a store says about it, in a listing or for the file alone."""
    names = ("ETag", "etag", "md5Hash", "generation", "content_md5", "mtime", "created", "LastModified")
    return f"{info['size']}-" + next((str(info[name]) for name in names if info.get(name)), "")


def _is_kept(part: str) -> bool:
    """Whether a file or folder is copied, by a part of its name: not a lock, and not what is being written."""
    return not part.startswith(".") and "orbax-checkpoint-tmp" not in part


def _whole_checkpoint(name: str, names: Container[str]) -> bool:
    """Whether a file is of no checkpoint, or of one that was copied to its end."""
    parts = name.split("/")
    return not name.startswith(_CHECKPOINTS) or f"{_CHECKPOINTS}{parts[1]}/{_HASHES}" in names


def _make_folder(system: Any, path: str) -> None:
    # Object stores have none.
    if "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        system.makedirs(path, exist_ok=True)


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
        raise _Missing(f"{address}: no such file or folder") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise  # of this machine's disk
        raise UserError(f"{address}: cannot be reached ({first_line(error)})") from error
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
