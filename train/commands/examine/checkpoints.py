"""`manyheads checkpoints`: those of a run, verified, and removed if asked."""

from __future__ import annotations

import argparse

from train.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run, or its address")
    parser.add_argument(
        "--remove", metavar="STEPS", default="", help="delete the checkpoints of these steps; several with commas"
    )


def run(options: argparse.Namespace) -> int:
    """The exit status: 1 where a checkpoint is damaged."""
    from train.examine.inventory import list_checkpoints, remove_checkpoints
    from train.remote import MirroredFolder, is_remote

    if options.remove:
        remove_checkpoints(options.run, options.remove.split(","))
        if is_remote(options.address):
            folder = MirroredFolder(options.address)
            folder.claim()
            folder.push()
    return 0 if list_checkpoints(options.run) else 1


COMMAND = Command(
    name="checkpoints", help="list a run's checkpoints and verify that they are as they were written", run=run,
    add_arguments=add_arguments,
)  # fmt: skip
