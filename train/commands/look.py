"""`manyheads look`: what is inside a model on one text."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_devices, add_run, set_up
from transformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    add_run(parser)
    parser.add_argument("--text", metavar="TEXT", help="text for the model to read; with one [MASK] for a masked model")
    answer = "the answer to follow: one token, or a class (the likeliest)"
    parser.add_argument("--answer", metavar="TOKEN", help=answer)
    instead = "the answer to compare it with (the likeliest other one)"
    parser.add_argument("--instead", metavar="TOKEN", help=instead)
    corrupted = "a text of as many tokens with another answer: also patch activations"
    parser.add_argument("--corrupted", metavar="TEXT", help=corrupted)
    target = "of an encoder-decoder: the beginning of what it writes (nothing)"
    parser.add_argument("--target", default="", metavar="TEXT", help=target)
    how = "what replaces the output of an ablated head: zero, or its mean over the text (zero)"
    parser.add_argument("--how", default="zero", metavar="HOW", help=how)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write into (RUN/look)")


def run(options: argparse.Namespace) -> None:
    if not options.text:
        raise UserError("no text given: use --text TEXT")
    set_up(options)
    from train.inference.look import look

    look(
        options.run, options.text, corrupted=options.corrupted, answer=options.answer, instead=options.instead,
        target=options.target, how=options.how, out=options.out, step=options.step,
    )  # fmt: skip


COMMAND = Command(
    name="look", help="look inside a trained model: lens, attribution, ablation, patching", run=run,
    add_arguments=add_arguments,
)  # fmt: skip
