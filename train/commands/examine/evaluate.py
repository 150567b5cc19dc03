"""`manyheads eval`: the scores of a run on its held-out data, or on other data."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_devices, add_encoding, add_run, set_up
from transformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_devices(parser)
    data = "files to evaluate on, with the fields of the run's first source; by default the run's held-out data"
    parser.add_argument("--data", metavar="FILES", help=data)
    add_encoding(parser, default="that of the run's source")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="store the scores, predictions and pictures there")
    tasks = (
        "evaluate a language model on these tasks of lm-evaluation-harness (names or YAML files, with commas) instead"
    )
    parser.add_argument("--tasks", metavar="TASKS", help=tasks)
    parser.add_argument("--examples", type=int, metavar="N", help="--tasks: solved examples in front of each question")
    parser.add_argument("--limit", type=int, metavar="N", help="--tasks: take only the first N questions of each task")


def run(options: argparse.Namespace) -> None:
    if options.tasks is not None and (options.data is not None or options.encoding is not None):
        raise UserError("--tasks: tasks have data of their own; leave out --data and --encoding")
    for name in ("examples", "limit"):
        least = 0 if name == "examples" else 1
        if (given := getattr(options, name)) is not None and (options.tasks is None or given < least):
            raise UserError(f"--{name}: got {given}; allowed with --tasks: {least} or more")
    set_up(options)
    if options.tasks is not None:
        _evaluate_tasks(options)
        return
    from train.examine.score import score

    score(options.run, step=options.step, data=options.data, out=options.out, encoding=options.encoding)


def _evaluate_tasks(options: argparse.Namespace) -> None:
    try:
        from train.examine.harness import evaluate_tasks
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("lm_eval"):
            raise
        raise UserError("--tasks: needs lm-evaluation-harness: pip install 'manyheads[lm-eval]'") from None
    names = [name for name in options.tasks.split(",") if name]
    if not names:
        raise UserError(
            "--tasks: got none; allowed: names of tasks of lm-evaluation-harness, or YAML files, with commas"
        )
    evaluate_tasks(
        options.run, names, step=options.step, examples=options.examples, limit=options.limit, out=options.out
    )  # fmt: skip


COMMAND = Command(
    name="eval", help="evaluate a run on all of its held-out data, or on other files", run=run, add_arguments=add_arguments,
)  # fmt: skip
