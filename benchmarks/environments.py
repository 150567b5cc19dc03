"""Environments of their own, in the user's cache, for what cannot be installed next to this program: compilers for absent
accelerators, and peers that need other versions of the same packages."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from train.files import cache_dir, writing
from transformer.errors import UserError

_COMPLETE = ".complete"


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


def install(folder: Path, wanted: Sequence[str], advice: str) -> str:
    """Make an environment with packages; its interpreter.

    Args:
        wanted: the packages, as pip takes them.
        advice: what to do if it cannot be made.

    Raises:
        UserError: pip could not install them.
    """
    print(f"installing {wanted[0]} into {folder}; this happens once", flush=True)
    with writing(folder):
        venv.create(folder, with_pip=True, clear=True)
    python = str(_python(folder))
    # Isolated: packages next to the current folder are not in the environment, and pip would say what they lack.
    done = subprocess.run([python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted])
    if done.returncode:
        raise UserError(f"{folder}: pip could not install {' '.join(wanted)}; {advice}")
    (folder / _COMPLETE).touch()
    return python


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
