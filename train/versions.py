"""Versions of the software that made a result."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "datasets", "tokenizers"),
    *("torch", "transformers"),
)


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions of Python and of each installed package that a run or a benchmark uses."""
    found = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | {name: number for name, number in found.items() if number}
