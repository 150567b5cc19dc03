"""`manyheads diff`: two runs compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_a", metavar="RUN_A", help="folder of a run")
    parser.add_argument("run_b", metavar="RUN_B", help="folder of another")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="draw the curves of both, such as curves.png")


def run(options: argparse.Namespace) -> None:
    from train.examine.diff import diff

    diff(options.run_a, options.run_b, options.out)


COMMAND = Command(
    name="diff", help="compare two runs: config, data, versions, scores and curves", run=run,
    add_arguments=add_arguments,
)  # fmt: skip
