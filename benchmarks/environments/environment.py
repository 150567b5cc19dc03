"""Environments of their own, in the user's cache, for what cannot be installed next to this program: compilers for absent
accelerators, and peers that need other versions of the same packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from train.files import cache_dir, writing
from transformer.errors import UserError

_COMPLETE = ".complete"
_NO_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeout|NameResolutionError|name resolution|Network is unreachable|ProxyError|Connection refused"
)


def folder_of(kind: str, name: str) -> Path:
    """The folder of an environment.

    Args:
        kind: what it is for, such as compilers or peers.
        name: of what is in it, with versions; that of Python is added.
    """
    return cache_dir() / kind / f"{name}-python{sys.version_info.major}.{sys.version_info.minor}"


def installed(folder: Path) -> str | None:
    """The interpreter of an environment that was made before; None if it was not, or not completely."""
    return str(_python(folder)) if (folder / _COMPLETE).exists() else None


def install(
    folder: Path,
    wanted: Sequence[str],
    advice: str,
    *,
    size: float = 0.0,
    check: Callable[[str], None] = lambda python: None,
) -> str:
    """Make an environment with packages; its interpreter.

    Args:
        wanted: the packages, as pip takes them.
        advice: what to do if it cannot be made.
        size: bytes that it takes, downloads included.
        check: raises a `UserError` if the environment does not work.

    Raises:
        UserError: the disk has too little space, the network cannot be reached, pip could not install them, or it does not work.
    """
    check_space(folder, size)
    print(f"installing {wanted[0]} into {folder}; this happens once", flush=True)
    with writing(folder):
        venv.create(folder, with_pip=True, clear=True)
    python = str(_python(folder))
    # Isolated: packages next to the current folder are not in the environment, and pip would say what they lack.
    options = ["--quiet", "--disable-pip-version-check", "--retries", "2"]
    done = subprocess.run(
        [python, "-I", "-m", "pip", "install", *options, *wanted],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        reason = errors[0].removeprefix("ERROR:").strip()[:200] if errors else f"exit status {done.returncode}"
        if _NO_NETWORK.search(done.stderr):
            reason = "the package index cannot be reached; connect to the network"
        raise UserError(f"{folder}: pip could not install {wanted[0]}: {reason}; {advice}")
    check(python)
    (folder / _COMPLETE).touch()
    return python


def check_space(folder: Path, size: float) -> None:
    """Raise a `UserError` where the disk of a folder, which need not exist, has fewer free bytes than `size`."""
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    if (free := shutil.disk_usage(existing).free) < size:
        raise UserError(
            f"{folder}: it needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; free some space, or set MANYHEADS_CACHE "
            "to a folder on another disk"
        )


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
