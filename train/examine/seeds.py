"""One config trained with several seeds: the variation of its scores."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.table import Table

from train.config import RunConfig, to_data
from train.files import writing
from train.parallel.processes import is_first
from train.report.display import console
from train.run.loop import train
from train.run.run_files import NO_SCORES, read_metrics
from train.run.session import Finished
from transformer.errors import UserError

FILE = "seeds.json"
_SUMMARIES: dict[str, Callable[[list[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.mean,
    "deviation": lambda values: statistics.stdev(values) if len(values) > 1 else 0.0,
}


def train_seeds(config: RunConfig, count: int, *, hang_seconds: float = 0.0) -> Finished:
    """Train with `count` seeds from the config's on, one after the other, each in its own folder (seed-K) inside the run's;
    then print and write all final held-out scores and their summary. A finished run is not repeated.

    Raises:
        UserError: errors of `train`, too few seeds, or a run without held-out scores.
    """
    if count < 1:
        raise UserError(f"seeds: got {count}; allowed: 1 or more")
    found: dict[int, dict[str, float]] = {}
    for seed in range(config.seed, config.seed + count):
        folder = f"seed-{seed}"
        one = dataclasses.replace(
            config, name=f"{config.name}-{folder}", seed=seed, run_dir=f"{config.run_dir or config.directory}/{folder}"
        )
        directory = one.directory
        finished = train(one, hang_seconds=hang_seconds)
        if finished.interrupted:
            return finished
        if is_first():
            found[seed] = final_scores(directory, finished.step)
    if not is_first():
        return finished
    summary = {
        name: {score: how([one[score] for one in found.values()]) for score in found[config.seed]}
        for name, how in _SUMMARIES.items()
    }
    _show(config, found, summary)
    result = {"config": to_data(config), "seeds": {str(seed): scores for seed, scores in found.items()}, **summary}
    with writing(config.directory):
        (config.directory / FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to: {config.directory / FILE}")
    return finished


def final_scores(directory: Path, step: int) -> dict[str, float]:
    """The scores on all held-out text that a run recorded at its last step, by name."""
    curves = read_metrics(directory)
    found = {
        name.removeprefix("eval/"): curve[step]
        for name, curve in curves.items()
        if name.startswith("eval/") and name not in NO_SCORES and step in curve
    }
    if not found:
        raise UserError(
            f"{directory}: no held-out scores of its last step, {step}; --seeds needs held-out text: set "
            "data.validation_fraction above 0, or give data.validation a source"
        )
    return found


def _show(config: RunConfig, found: dict[int, dict[str, float]], summary: dict[str, dict[str, float]]) -> None:
    title = f"{config.name}: held-out scores at the end"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("seed")
    names = list(found[config.seed])
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    rows = [(str(seed), scores) for seed, scores in found.items()]
    for index, (label, scores) in enumerate([*rows, *summary.items()]):
        table.add_row(label, *(f"{scores[name]:.4f}" for name in names), end_section=index == len(rows) - 1)
    console().print(table)
