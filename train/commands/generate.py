"""`manyheads generate`: continue texts with a language model."""

from __future__ import annotations

import argparse
from typing import Any

from train.commands.command import (
    Command,
    add_devices,
    add_encoding,
    add_run,
    add_sampling,
    from_flags,
    given_flags,
    read_lines,
    set_up,
)
from transformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    add_run(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; repeat it for a batch")
    parser.add_argument("--prompts-file", metavar="FILE", help="a file with one prompt per line (- for standard input)")
    add_encoding(parser)
    special = "read special tokens that a prompt spells out as those tokens, not as text"
    parser.add_argument("--special", action="store_true", help=special)
    add_sampling(parser, "a continuation")
    beams = "beam search with N beams instead of sampling"
    parser.add_argument("--beams", type=int, metavar="N", help=beams)
    parser.add_argument("--num-best", type=int, default=1, metavar="N", help="with --beams: show the N best (1)")
    penalty = "with --beams: above 0 favours longer texts (0.6)"
    parser.add_argument("--length-penalty", type=float, default=0.6, help=penalty)


def run(options: argparse.Namespace) -> None:
    prompts = list(options.prompt or [])
    if options.prompts_file:
        prompts += read_lines(options, options.prompts_file)
    if not prompts:
        raise UserError("nothing to continue: give --prompt TEXT or --prompts-file FILE")
    set_up(options)
    from train.inference.generate import generate
    from transformer.generation.beam import BeamSearch
    from transformer.generation.sampling import Sampling

    if options.beams is None and options.num_best != 1:
        raise UserError("--num-best: several continuations are ranked with --beams N")
    how: BeamSearch | dict[str, Any]
    if options.beams is None:
        # Checked before the run is loaded; what is not given is known after it.
        from_flags(Sampling, options)
        how = given_flags(Sampling, options)
    else:
        how = from_flags(BeamSearch, options)
    generate(options.run, prompts, options.step, options.max_tokens, how, options.seed, special=options.special)


COMMAND = Command(
    name="generate", help="continue texts with a trained language model", run=run, add_arguments=add_arguments
)
