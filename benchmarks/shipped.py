"""The configs that come with the source, which benchmarks train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train import config
from transformer.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


def load(path: Path, overrides: Sequence[str] = ()) -> config.RunConfig:
    """The config of a file, shipped or another.

    Raises:
        UserError: it is not a valid config, or it is a shipped one of a package that is installed outside a checkout.
    """
    if path.is_relative_to(CONFIGS) and not CONFIGS.is_dir():
        name = path.relative_to(CONFIGS.parent)
        raise UserError(f"{name}: an installed package has no configs; run this benchmark in a checkout of the source")
    return config.load(path, overrides)
