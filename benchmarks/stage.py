"""A training run as a stage of a benchmark, of a shipped config or another: without output, with figures stored as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.config import load as load_config
from train.config.sections import CheckpointConfig, EvaluationConfig, LogConfig
from train.files import write_whole, writing
from train.run.loop import train
from transformer.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a file, shipped or another.

    Raises:
        UserError: it is not a valid config, or it is a shipped one of a package that is installed outside a checkout.
    """
    if path.is_relative_to(CONFIGS) and not CONFIGS.is_dir():
        name = path.relative_to(CONFIGS.parent)
        raise UserError(f"{name}: an installed package has no configs; run this benchmark in a checkout of the source")
    return load_config(path, overrides)


class Interrupted(Exception):
    """A stage was stopped from the keyboard; its run can be resumed."""


def train_silently(config: RunConfig) -> None:
    """Train to the end, or resume the run. Its output goes into output.txt in its folder.

    Raises:
        Interrupted: after a signal; the run is saved.
        UserError: as in `train`.
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
    """Write figures atomically: if the file exists, its stage is finished."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(figures, indent=1) + "\n")


def kept(path: Path) -> Any:
    """The figures of a finished stage; None if it is not finished."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def once(path: Path, work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The stored figures if there are any; else those that `work` returns, with its seconds."""
    if (figures := kept(path)) is None:
        start = time.monotonic()
        figures = work()
        figures |= {"seconds": time.monotonic() - start}
        keep(path, figures)
    return figures


def folder_of(directory: str, *settings: Any) -> Path:
    """The folder for results with these settings (JSON) only."""
    content = json.dumps(settings, sort_keys=True).encode()
    return Path(directory) / hashlib.blake2b(content, digest_size=6).hexdigest()


def scored_at_the_end(config: RunConfig) -> RunConfig:
    """The run with a single evaluation, so that no step is selected by its score on the held-out documents."""
    return dataclasses.replace(
        config,
        evaluation=EvaluationConfig(every=0),
        checkpoint=CheckpointConfig(every=0, keep=1),
        log=LogConfig(every=config.log.every, trackers=()),
    )


def train_to_the_end(config: RunConfig, benchmark: str) -> dict[str, Any]:
    """The scores that a run records at its end.

    Raises:
        UserError: as in `train`, or an interruption, with how to resume.
    """
    try:
        train_silently(config)
    except Interrupted:
        raise UserError(f"{benchmark}: stopped in {config.directory}; run the same command again to resume") from None
    return metrics_of(config.directory)[-1]


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """All records of a run, in order."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def train_for_scores(config: RunConfig, benchmark: str) -> dict[str, Any]:
    """The newest value of each metric of a fully trained run. Its checkpoints are deleted: dozens would fill a disk.

    Raises:
        UserError: as in `train_to_the_end`.
    """
    train_to_the_end(config, benchmark)
    shutil.rmtree(config.directory / "checkpoints")
    return {name: value for one in metrics_of(config.directory) for name, value in one.items()}


def classify(config: RunConfig, benchmark: str) -> dict[str, float]:
    """Accuracy and loss of a fully trained classifier."""
    last = train_for_scores(config, benchmark)
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
