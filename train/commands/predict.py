"""`manyheads predict`: labels of new documents."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_devices, add_encoding, add_run, set_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    add_run(parser)
    documents = (
        "one text per line (.txt), or .jsonl, .csv, .parquet, .conll with the fields of the run's source; - for standard input: "
        "one text per line, or JSON lines where a document has several fields"
    )
    parser.add_argument("--file", required=True, metavar="FILE", help=documents)
    add_encoding(parser)
    threshold = "several classes: the probability from which on one is predicted (the run's, 0.5)"
    parser.add_argument("--threshold", type=float, metavar="P", help=threshold)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines here (standard output)")


def run(options: argparse.Namespace) -> None:
    set_up(options)
    from train.inference.predict import predict

    predict(options.run, options.file, options.out, options.step, options.encoding, threshold=options.threshold)


COMMAND = Command(
    name="predict", help="predict the labels of documents with a model that was fine-tuned on a task", run=run,
    add_arguments=add_arguments,
)  # fmt: skip
