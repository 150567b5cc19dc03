"""The command: runs every stage in turn, stores each as soon as it is finished, and writes the report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.history import report
from benchmarks.history.models import ENTRIES, chosen
from benchmarks.history.stages import Settings, result_path, run_stage, tokens_of
from benchmarks.history.tasks import tasks_of
from benchmarks.stage import Interrupted
from train.files import writing
from train.report.display import clock
from transformer.errors import UserError

PARAMETERS = 1_000_000
STEPS = 200
"""A small budget that shows all ten models on both tasks; meaningful figures need more."""
DIRECTORY = "runs/history"


def run(
    models: Sequence[str] | None = None,
    parameters: int = PARAMETERS,
    steps: int = STEPS,
    data: str = "verses",
    seed: int = 0,
    directory: str = DIRECTORY,
    *,
    synthetic_pairs: int | None = None,
) -> dict[str, Any]:
    """Train and evaluate each model on each task; write JSON and the report, and return the figures. Finished stages are reused.

    Args:
        models: names of `ENTRIES`; None: all.
        parameters, steps: of each model.
        data: `verses`, `synthetic`, or the path of a config of pairs.
        directory: where runs and figures are kept, in a folder for each set of settings.
        synthetic_pairs: number of synthetic pairs; None: the default.

    Raises:
        UserError: an unknown name, a budget that a model cannot meet, errors of `train`, or an interruption.
    """
    names = chosen(models)
    tasks = tasks_of(data, parameters, synthetic_pairs=synthetic_pairs)
    settings = Settings(tasks=tasks, parameters=parameters, steps=steps, seed=seed)
    folder = settings.folder(Path(directory))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings.as_data(), indent=1) + "\n", encoding="utf-8")
    prepared = {task.name: task.prepared() for task in tasks}
    # Checked before an hour of training: every model must meet the budget.
    for task in tasks:
        for name in names:
            settings.run_config(name, task, prepared[task.name], folder)

    stages = [(task, name) for task in tasks for name in names]
    waiting = {(task.name, name) for task, name in stages if not result_path(folder, name, task).exists()}
    print(
        f"{len(stages)} stages, {len(stages) - len(waiting)} of them already finished; stored in {folder}", flush=True
    )
    figures: dict[str, list[dict[str, Any]]] = {task.name: [] for task in tasks}
    taken: list[float] = []
    for number, (task, name) in enumerate(stages, start=1):
        known = (task.name, name) not in waiting
        start = time.monotonic()
        try:
            one = run_stage(settings, name, task, prepared[task.name], folder)
        except (Interrupted, KeyboardInterrupt):
            raise UserError(
                f"history: stopped in stage {number} of {len(stages)} ({task.name}, {name}); stages are kept in {folder}. "
                "Run the same command again to resume"
            ) from None
        figures[task.name].append(one)
        spent = "already finished"
        if not known:
            taken.append(time.monotonic() - start)
            waiting.discard((task.name, name))
            left = sum(taken) / len(taken) * len(waiting)
            spent = f"{clock(taken[-1])}, about {clock(left)} left" if waiting else clock(taken[-1])
        print(
            f"[{number}/{len(stages)}] {task.name}, {ENTRIES[name].title}: held-out loss {one['held_out_loss']:.3f}, "
            f"BLEU {one['bleu']:.2f}; {spent}",
            flush=True,
        )

    command = _command(names, parameters, steps, data, seed)
    result = {
        "command": command,
        "settings": settings.as_data(),
        "tasks": {
            task.name: {
                "title": task.title,
                "tokens": tokens_of(settings, task, prepared[task.name]),
                "stages": figures[task.name],
            }
            for task in tasks
        },
    }
    name = "history" if data == "verses" else f"history_{Path(data).stem}"
    results = record.folder_for(directory, DIRECTORY, name, command)
    path = record.save(name, command, result, show=False, folder=results).with_suffix(".html")
    with writing(path):
        report.write(result, path)
    print(f"report in {path} and {path.with_suffix('.md').name}")
    return result


def _command(names: Sequence[str], parameters: int, steps: int, data: str, seed: int) -> str:
    """The command that makes these figures, without options that have their defaults."""
    given = {
        "models": ",".join(names) if tuple(names) != tuple(ENTRIES) else None,
        "parameters": parameters if parameters != PARAMETERS else None,
        "steps": steps if steps != STEPS else None,
        "data": data if data != "verses" else None,
        "seed": seed or None,
    }
    options = [f"--{name} {value}" for name, value in given.items() if value is not None]
    return " ".join(["manyheads-bench history", *options])
