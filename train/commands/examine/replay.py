"""`manyheads replay`: a step of a run once more, example by example."""

from __future__ import annotations

import argparse

from train.commands.command import Command, add_devices, set_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run, or its address")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the step to take again")
    parser.add_argument(
        "--rows", type=int, default=8, metavar="N", help="how many examples to print, highest loss first (8)"
    )
    add_devices(parser)


def run(options: argparse.Namespace) -> int:
    """The exit status: 1 where loss or gradient norm are not those that the run recorded."""
    set_up(options)
    from train.examine.replay import replay

    return 0 if replay(options.run, options.step, rows=options.rows) else 1


COMMAND = Command(
    name="replay", help="take a step of a run again: the loss of each example, and where a value first was not finite",
    run=run, add_arguments=add_arguments,
)  # fmt: skip
