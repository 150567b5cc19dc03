"""`manyheads translate`: translate with a model trained on pairs of texts."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_devices, add_encoding, add_run, from_flags, read_lines, set_up
from transformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    add_run(parser)
    parser.add_argument("--text", action="append", metavar="TEXT", help="what to translate; repeat it for a batch")
    file = "a file with one text per line (- for standard input); so are the translations"
    parser.add_argument("--file", metavar="FILE", help=file)
    add_encoding(parser)
    parser.add_argument("--beams", type=int, default=4, help="number of beams; 1 is greedy (4)")
    best = "show the N best with their scores (1)"
    parser.add_argument("--num-best", type=int, default=1, metavar="N", help=best)
    parser.add_argument("--length-penalty", type=float, default=0.6, help="above 0 favours longer translations (0.6)")
    coverage = "coverage penalty: above 0 favours translations that attend to all of the source (0)"
    parser.add_argument("--coverage-penalty", type=float, default=0.0, help=coverage)
    page = "write a page, and a picture, of the first text's alignment"
    parser.add_argument("--attention", type=Path, metavar="PAGE", help=page)


def run(options: argparse.Namespace) -> None:
    texts = list(options.text or [])
    if options.file:
        texts += read_lines(options, options.file)
    if not texts:
        raise UserError("nothing to translate: give --text TEXT or --file FILE")
    set_up(options)
    from train.inference.translate import translate
    from transformer.generation.beam import BeamSearch

    search = from_flags(BeamSearch, options)
    translate(options.run, texts, search, attention=options.attention, step=options.step, by_line=bool(options.file))


COMMAND = Command(
    name="translate", help="translate with a model trained on pairs of texts", run=run, add_arguments=add_arguments
)
