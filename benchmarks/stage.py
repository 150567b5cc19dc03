"""A training run as a stage of a benchmark: silent, and its figures kept as JSON once it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.config.sections import CheckpointConfig, EvaluationConfig, LogConfig
from train.files import write_whole, writing
from train.run.loop import train
from transformer.errors import UserError


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
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(figures, indent=1) + "\n")


def kept(path: Path) -> Any:
    """The figures of a finished stage; None before."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def once(path: Path, work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures that `work` finds, with its seconds; where they are kept already, those."""
    if (figures := kept(path)) is None:
        start = time.monotonic()
        figures = work()
        figures |= {"seconds": time.monotonic() - start}
        keep(path, figures)
    return figures


def folder_of(directory: str, *settings: Any) -> Path:
    """A folder for what is made with these settings (JSON), and with no others."""
    content = json.dumps(settings, sort_keys=True).encode()
    return Path(directory) / hashlib.blake2b(content, digest_size=6).hexdigest()


def scored_at_the_end(config: RunConfig) -> RunConfig:
    """The same run with one evaluation: no step is chosen by what it makes of the held-out documents."""
    return dataclasses.replace(
        config,
        evaluation=EvaluationConfig(every=0),
        checkpoint=CheckpointConfig(every=0, keep=1),
        log=LogConfig(every=config.log.every, tensorboard=False),
    )


def train_to_the_end(config: RunConfig, benchmark: str) -> dict[str, Any]:
    """The scores that a run records at its end.

    Raises:
        UserError: as of `train`, and an interruption, with how to go on.
    """
    try:
        train_silently(config)
    except Interrupted:
        raise UserError(f"{benchmark}: stopped in {config.directory}; run the same command again to go on") from None
    return metrics_of(config.directory)[-1]


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """All that a run has recorded, in its order."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def classify(config: RunConfig, benchmark: str) -> dict[str, float]:
    """Accuracy and loss of a classifier that is trained to its end. Its checkpoints are deleted: dozens would fill a disk."""
    last = train_to_the_end(config, benchmark)
    shutil.rmtree(config.directory / "checkpoints")
    return {"accuracy": last["eval/accuracy"], "loss": last["eval/loss"]}


def over_seeds(values: list[float]) -> dict[str, float]:
    """Median, mean and sample standard deviation of a figure over the seeds."""
    return {
        "median": statistics.median(values),
        "mean": statistics.mean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "seeds": len(values),
    }
