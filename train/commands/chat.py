"""`manyheads chat`: talk to a language model."""

from __future__ import annotations

import argparse

from train.commands.command import Command, add_devices, add_run, add_sampling, from_flags, given_flags, set_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    add_run(parser)
    parser.add_argument(
        "--system", default="", metavar="TEXT", help="what the dialogue begins with, as the system's message"
    )
    add_sampling(parser, "an answer")


def run(options: argparse.Namespace) -> None:
    set_up(options)
    from train.inference.chat import chat
    from transformer.generation.sampling import Sampling

    from_flags(Sampling, options)
    how = given_flags(Sampling, options)
    chat(options.run, options.step, options.system, options.max_tokens, how, options.seed)


COMMAND = Command(name="chat", help="talk to a language model, line by line", run=run, add_arguments=add_arguments)
