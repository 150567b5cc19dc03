"""What a result was made with."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "datasets", "tokenizers"),
    *("torch", "transformers"),
)


def version(package: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python's, and of each installed package that has a part in a run or a benchmark."""
    found = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | {name: number for name, number in found.items() if number}
