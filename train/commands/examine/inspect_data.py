"""`manyheads inspect-data`: the examples of a step, decoded."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, default=1, metavar="S", help="the step whose batch is shown (1)")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="how many of its rows (4)")
    parser.add_argument(
        "--diff", metavar="OTHER", help="show only rows that differ from those of another run or config"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the whole batch with its arrays, a JSON object a line"
    )


def run(options: argparse.Namespace) -> int:
    """The exit status: 1 where two batches differ."""
    from train.examine.inspect_data import Planned, inspect_data

    planned = Planned.of(options.config, options.overrides)
    other = None if options.diff is None else Planned.of(options.diff)
    same = inspect_data(planned, step=options.step, rows=options.rows, other=other, out=options.out)
    return 0 if same else 1


COMMAND = Command(
    name="inspect-data", help="show the examples of a step, decoded: of a config, before it runs, or of a run's folder",
    run=run, add_arguments=add_arguments, takes_config=True,
)  # fmt: skip
