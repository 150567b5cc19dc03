"""`manyheads plot`: the curves of runs as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run; several share the axes")
    parser.add_argument(
        "--out", type=Path, metavar="PICTURE", help="file to write (curves.png in the first run's folder)"
    )


def run(options: argparse.Namespace) -> None:
    from train.examine.curves import plot

    plot(options.runs, options.out or options.runs[0] / "curves.png")


COMMAND = Command(name="plot", help="draw the curves of a run, or of several", run=run, add_arguments=add_arguments)
