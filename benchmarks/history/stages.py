"""The stages of the comparison: each trains a model on a task as an ordinary run, evaluates it, and stores JSON.

    DIRECTORY/FINGERPRINT/settings.json
    DIRECTORY/FINGERPRINT/TASK/MODEL/         the run: checkpoints, metrics.jsonl, what it printed
DIRECTORY/FINGERPRINT/TASK/MODEL.json     its figures; exists once the stage is finished
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.history import measure
from benchmarks.history.models import ENTRIES, TOLERANCE, solve
from benchmarks.history.tasks import SHAPES, Task
from benchmarks.stage import keep, kept, metrics_of, train_silently
from train.config import RunConfig, to_data
from train.config.sections import CheckpointConfig, EvaluationConfig, LogConfig, SampleConfig
from train.data.loader import train_batches
from train.data.prepared.prepare import fingerprint
from train.data.prepared.store import Prepared
from train.optimizer import OptimizerConfig
from train.parallel.mesh import use_mesh
from train.run.run_files import load_run
from transformer.models.families import count_parameters

BATCH_SIZE = 32
"""Pairs in a step."""
WARMUP = 10
"""One in this many steps is warm-up."""
POINTS = 10
"""Number of evaluations during training."""
EVALUATION_BATCHES = 4
"""Batches of each of them; the last evaluation uses all held-out pairs."""
READINGS = 100
"""Points of a training curve, at most."""
_VERSION = 1
"""Version of the benchmark: changes when the same settings give different figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by all models."""

    tasks: tuple[Task, ...]
    parameters: int
    """Number of parameters of each model."""
    steps: int
    seed: int

    def as_data(self) -> dict[str, Any]:
        """Everything that the figures depend on, as JSON values; the choice of models is not included."""
        return {
            "version": _VERSION,
            "tasks": {task.name: [fingerprint(task.data), task.length] for task in self.tasks},
            "parameters": self.parameters,
            "steps": self.steps,
            "seed": self.seed,
            "batch_size": BATCH_SIZE,
            "shapes": SHAPES,
            "tolerance": TOLERANCE,
            "models": {name: to_data(entry.config.model) for name, entry in ENTRIES.items()},
            "learning_rates": {name: entry.learning_rate for name, entry in ENTRIES.items()},
        }

    def folder(self, directory: Path) -> Path:
        """The folder of the stages with these settings only."""
        content = json.dumps(self.as_data(), sort_keys=True).encode()
        return directory / hashlib.blake2b(content, digest_size=6).hexdigest()

    def run_config(self, name: str, task: Task, prepared: Prepared, directory: Path) -> RunConfig:
        """An ordinary run's config. Raises `UserError` where no size of the model meets the budget."""
        size = prepared.tokenizer.vocab_size
        model = solve(
            name, self.parameters, source_vocab_size=size, vocab_size=prepared.target_tokenizer.vocab_size,
            max_length=task.length,
        )  # fmt: skip
        return RunConfig(
            name=f"history-{task.name}-{name}",
            run_dir=str(directory),
            seed=self.seed,
            steps=self.steps,
            batch_size=BATCH_SIZE,
            model=model,
            objective=task.objective,
            data=task.data,
            optimizer=OptimizerConfig(
                learning_rate=ENTRIES[name].learning_rate, warmup_steps=self.steps // WARMUP, b2=0.98
            ),
            evaluation=EvaluationConfig(every=max(self.steps // POINTS, 1), batches=EVALUATION_BATCHES, translations=0),
            checkpoint=CheckpointConfig(every=max(self.steps // 3, 1), keep=1),
            log=LogConfig(every=max(self.steps // READINGS, 1), trackers=()),
            sample=SampleConfig(every=0),
        )


def run_stage(settings: Settings, name: str, task: Task, prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Train one model on one task, or resume it, and return its figures; those of a finished stage are read.

    Raises:
        Interrupted: after a signal; the run is saved.
        UserError: as in `train`.
    """
    path = result_path(folder, name, task)
    if (figures := kept(path)) is not None:
        return figures
    directory = path.with_suffix("")
    config = settings.run_config(name, task, prepared, directory)
    # A run's output would hide the overall progress.
    train_silently(config)
    keep(path, _figures(name, task, prepared, config, directory))
    # As read back from disk, so that a resumed run reports the same as an uninterrupted one.
    return kept(path)


def result_path(folder: Path, name: str, task: Task) -> Path:
    """The file of a stage's figures."""
    return folder / task.name / f"{name}.json"


def tokens_of(settings: Settings, task: Task, prepared: Prepared) -> dict[str, int]:
    """How many tokens every model reads and predicts in all its steps, without padding."""
    batches = train_batches(
        prepared, task.data, batch_size=BATCH_SIZE, length=task.length, seed=settings.seed, objective=task.objective
    )
    counts = {"source": 0, "target": 0, "pairs": 0}
    # Steps count from 1, batches from 0.
    for step in range(settings.steps):
        batch = batches.batch(step)
        counts["source"] += int((batch["source_segments"] != 0).sum())
        counts["target"] += int(batch["weights"].sum())
        counts["pairs"] += int((batch["example"] >= 0).sum())
    return counts


def _figures(name: str, task: Task, prepared: Prepared, config: RunConfig, directory: Path) -> dict[str, Any]:
    records = metrics_of(directory)

    def course(field: str) -> list[tuple[int, float]]:
        return [(record["step"], record[field]) for record in records if field in record]

    # The first readings include compilation.
    speeds = [speed for step, speed in course("train/tokens_per_second") if step > config.steps // 4]
    loaded = load_run(directory, "latest")
    with use_mesh(loaded.mesh, loaded.config.mesh.rules):
        asked = measure.figures(loaded, task, prepared.validation_pairs())
    return {
        "model": name,
        "task": task.name,
        "parameters": count_parameters(config.model),
        "learning_rate": config.optimizer.learning_rate,
        "steps": config.steps,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "curves": {"training": course("train/nll"), "held_out": course("eval/selection_loss")},
        "held_out_loss": course("eval/loss")[-1][1],
        **asked,
    }
