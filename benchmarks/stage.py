"""A training run as a stage of a benchmark: silent, and its figures kept as JSON once it is finished."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.data.cache import writing
from train.loop import train


class Interrupted(Exception):
    """A stage was stopped from the keyboard; its run goes on from there."""


def train_silently(config: RunConfig) -> None:
    """Train to the end, or go on where the run stopped. What it shows goes into output.txt in its folder.

    Raises:
        Interrupted: after a signal; the run is saved.
        UserError: as of `train`.
    """
    with writing(config.directory):
        config.directory.mkdir(parents=True, exist_ok=True)
    try:
        with (
            (config.directory / "output.txt").open("a", encoding="utf-8") as stream,
            contextlib.redirect_stdout(stream),
        ):
            stopped = train(config).interrupted
    except KeyboardInterrupt:
        stopped = True
    if stopped:
        raise Interrupted


def keep(path: Path, figures: Any) -> None:
    """Write figures whole or not at all: where the file is, its stage is finished."""
    with writing(path):
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


def kept(path: Path) -> Any:
    """The figures of a finished stage; None before."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
