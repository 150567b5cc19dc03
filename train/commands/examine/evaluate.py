"""`manyheads eval`: the scores of a run on its held-out data, or on other data."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_devices, add_encoding, add_run, set_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_devices(parser)
    data = "files to evaluate on, with the fields of the run's first source; by default the run's held-out data"
    parser.add_argument("--data", metavar="FILES", help=data)
    add_encoding(parser, default="that of the run's source")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="store the scores, predictions and pictures there")


def run(options: argparse.Namespace) -> None:
    set_up(options)
    from train.examine.score import score

    score(options.run, step=options.step, data=options.data, out=options.out, encoding=options.encoding)


COMMAND = Command(
    name="eval", help="evaluate a run on all of its held-out data, or on other files", run=run, add_arguments=add_arguments,
)  # fmt: skip
