"""Whether a checkpoint on disk is what was written: the hashes of its files, stored with them before it counts as one."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.files import sync, write_whole

HASHES = "hashes.json"
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Files that orbax writes last. Nothing of the state is in them, but orbax does not see a checkpoint without them."""
_THREADS = 8


def write_hashes(folder: Path, later: Sequence[str] = ()) -> None:
    """Store the hash of every file under `folder` in it, and wait until all of them are on the disk. Raises `OSError`.

    Args:
        later: names of files whose content is not fixed yet.
    """
    left_out = {folder / name for name in (*later, HASHES)}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in left_out)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        hashes = dict(zip((path.relative_to(folder).as_posix() for path in paths), pool.map(_hash, paths), strict=True))
        list(pool.map(sync, paths))
    content = {"files": hashes, "later": list(later)}
    write_whole(folder / HASHES, json.dumps(content | {"all": _hash_of_all(content)}, indent=1) + "\n")
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync(inner)
    sync(folder)


def damage(folder: Path, items: Sequence[str] | None = None) -> str | None:
    """The first file of a checkpoint that is not as it was written, with what is wrong; None for a whole one.

    Args:
        items: look at the files of these of its folders only; None: at all.
    """
    if (stranger := _stranger(folder, items)) is not None:
        return f"{stranger} is not a file"
    try:
        stored = json.loads((folder / HASHES).read_bytes())
        if stored.pop("all") != _hash_of_all(stored):
            return f"{HASHES} has changed"
        hashes, later = stored["files"], stored["later"]
    except FileNotFoundError:
        return f"{HASHES} is missing"
    except OSError:
        return f"{HASHES} cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{HASHES} has changed"
    if items is None and (lost := [name for name in later if not (folder / name).is_file()]):
        return f"{lost[0]} is missing"
    names = [name for name in hashes if items is None or name.split("/")[0] in items]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for name, (found, wrong) in zip(names, pool.map(lambda name: _found(folder / name), names), strict=True):
            if found != hashes[name]:
                return f"{name} {wrong}"
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _stranger(folder: Path, items: Sequence[str] | None) -> str | None:
    """A named pipe, a device or a socket in a checkpoint, which no run writes: reading one may go on for ever."""
    for directory, _, names in os.walk(folder):
        for path in (Path(directory, name) for name in names):
            name = path.relative_to(folder).as_posix()
            wanted = items is None or name == HASHES or name.split("/")[0] in items
            if wanted and path.exists() and not path.is_file():
                return name
    return None


def _found(path: Path) -> tuple[str | None, str]:
    """A file's hash, and what is wrong if it is not the expected one."""
    try:
        return _hash(path), "has changed"
    except FileNotFoundError:
        return None, "is missing"
    except OSError:
        return None, "cannot be read"


def _hash_of_all(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
