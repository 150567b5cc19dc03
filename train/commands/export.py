"""`manyheads export`: a run as a folder that transformers or PEFT loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_run, set_up
from transformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    form = "hf: the whole model; peft: only its adapters (hf)"
    parser.add_argument("--format", choices=["hf", "peft"], default="hf", help=form)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (RUN/huggingface, RUN/peft)")
    architecture = "architecture to write (that of the import, or the first that fits)"
    parser.add_argument("--model-type", metavar="NAME", help=architecture)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (float32)")
    verify = "compare both frameworks (where transformers is installed)"
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, help=verify)


def run(options: argparse.Namespace) -> None:
    set_up(options)
    if options.format == "peft":
        from train.huggingface.adapter import export_adapter

        for flag in ("dtype", "verify"):
            if getattr(options, flag) is not None:
                raise UserError(f"--{flag}: only with --format hf; adapters are written as they are")
        export_adapter(options.run, options.out, step=options.step, model_type=options.model_type)
        return
    from train.huggingface.export import export

    export(
        options.run, options.out, step=options.step, model_type=options.model_type, dtype=options.dtype or "float32",
        verify=options.verify,
    )  # fmt: skip


COMMAND = Command(
    name="export", help="write a run as a folder that transformers loads", run=run, add_arguments=add_arguments
)
