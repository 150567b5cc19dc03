"""`manyheads generate`: continue texts with a language model."""

from __future__ import annotations

import argparse

from train.commands.command import Command, add_devices, add_encoding, add_run, from_flags, read_lines, set_up
from transformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    add_run(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; repeat it for a batch")
    parser.add_argument("--prompts-file", metavar="FILE", help="a file with one prompt per line (- for standard input)")
    add_encoding(parser)
    length = "length of a continuation (256, or what the context leaves)"
    parser.add_argument("--max-tokens", type=int, metavar="N", help=length)
    parser.add_argument("--temperature", type=float, default=0.8, help="sampling temperature; 0 is greedy (0.8)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="sample from the likeliest tokens whose probabilities sum to this (0.95)",
    )
    least = "drop tokens below this fraction of the likeliest token's probability (0)"
    parser.add_argument("--min-p", type=float, default=0.0, help=least)
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 penalises repetition (1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling (0)")
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
    method = from_flags(Sampling, options) if options.beams is None else from_flags(BeamSearch, options)
    generate(options.run, prompts, options.step, options.max_tokens, method, options.seed)


COMMAND = Command(
    name="generate", help="continue texts with a trained language model", run=run, add_arguments=add_arguments
)
