"""`manyheads embed`: a vector for each text of a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_devices, add_encoding, add_run, set_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    add_run(parser)
    texts = "texts: .txt, .jsonl, .csv, .parquet (- for standard input)"
    parser.add_argument("--file", required=True, metavar="FILE", help=texts)
    add_encoding(parser)
    parser.add_argument("--field", default="text", metavar="NAME", help="of records: the field with the text (text)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write: .npy or .parquet")
    poolings = ["cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last"]
    parser.add_argument("--pooling", choices=poolings, help="how token vectors are pooled (the model's setting)")
    normalize = "scale vectors to length 1 at the end (the model's setting)"
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, help=normalize)
    prompt = "which of the model's prompts to put before each text (its default prompt, or none)"
    parser.add_argument("--prompt-name", metavar="NAME", help=prompt)


def run(options: argparse.Namespace) -> None:
    set_up(options)
    from train.inference.embed import embed

    embed(
        options.run, options.file, options.out, field=options.field, pooling=options.pooling,
        normalize=options.normalize, prompt_name=options.prompt_name, step=options.step, encoding=options.encoding,
    )  # fmt: skip


COMMAND = Command(
    name="embed", help="compute a vector for each text of a file, with an encoder", run=run, add_arguments=add_arguments
)
