"""`manyheads report`: a run as one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several stand side by side")
    parser.add_argument(
        "--out", type=Path, metavar="PAGE", help="file to write (report.html in the first run's folder)"
    )


def run(options: argparse.Namespace) -> None:
    from train.examine.run_report.write import report

    report(options.runs, options.out)


COMMAND = Command(
    name="report", help="write all that a run recorded, or several, as one page that works offline", run=run,
    add_arguments=add_arguments,
)  # fmt: skip
