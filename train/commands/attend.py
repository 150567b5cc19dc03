"""`manyheads attend`: a model's attention as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_devices, add_run, set_up
from transformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    add_run(parser)
    parser.add_argument("--text", metavar="TEXT", help="text for the model to read")
    parser.add_argument("--layers", metavar="LIST", help="layers to show, from 0, such as 0,3 (all)")
    parser.add_argument("--heads", metavar="LIST", help="heads of each of them, from 0, such as 1,2 (all)")
    parser.add_argument("--pictures", action="store_true", help="also draw a picture of each head, and one of all")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write into (RUN/attention)")


def run(options: argparse.Namespace) -> None:
    if not options.text:
        raise UserError("no text given: use --text TEXT")
    set_up(options)
    from train.inference.attend import attend, numbers

    layers, heads = numbers("--layers", options.layers), numbers("--heads", options.heads)
    attend(
        options.run, options.text, layers, heads, pictures=options.pictures, out=options.out, step=options.step
    )  # fmt: skip


COMMAND = Command(
    name="attend", help="visualise a trained model's attention: an HTML page", run=run,
    add_arguments=add_arguments,
)  # fmt: skip
