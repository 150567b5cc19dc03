"""`manyheads export`: a run as a folder that transformers, PEFT or ONNX Runtime loads."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from train.commands.command import Command, add_run, set_up
from transformer.errors import UserError, shown

_ALWAYS = {
    "peft": "adapters are written as they are",
    "onnx": "the graph is in float32, and always compared with the model",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: str) -> int:
    """The bytes of a size in the form that transformers takes. Raises `UserError`."""
    found = re.fullmatch(r"(\d{1,18})\s*([A-Za-z]*)", size.strip(), re.ASCII)
    if found is None or found[2].upper() not in _UNITS or not int(found[1]):
        raise UserError(
            f"--max-shard-size: got {shown(size)}; allowed: a whole number with KB, MB, GB, KiB, MiB or GiB"
        )
    return int(found[1]) * _UNITS[found[2].upper()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    form = "hf: the whole model; peft: only its adapters; onnx: an encoder as an ONNX graph (hf)"
    parser.add_argument("--format", choices=["hf", "peft", "onnx"], default="hf", help=form)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (RUN/huggingface, RUN/peft, RUN/onnx)")
    architecture = "architecture to write (that of the import, or the first that fits)"
    parser.add_argument("--model-type", metavar="NAME", help=architecture)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (float32)")
    largest = "size of the largest file of weights, such as 500MB; more weights are several files with an index (5GB)"
    parser.add_argument("--max-shard-size", metavar="SIZE", help=largest)
    verify = "compare both frameworks (where transformers is installed)"
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, help=verify)


def run(options: argparse.Namespace) -> None:
    set_up(options)
    if options.format != "hf":
        for flag in ("dtype", "max_shard_size", "verify"):
            if getattr(options, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')}: only with --format hf; {_ALWAYS[options.format]}")
    if options.format == "peft":
        from train.huggingface.adapter import export_adapter

        export_adapter(options.run, options.out, step=options.step, model_type=options.model_type)
        return
    if options.format == "onnx":
        from train.huggingface.onnx_export import export_onnx

        export_onnx(options.run, options.out, step=options.step, model_type=options.model_type)
        return
    from train.huggingface.export import export

    size = options.max_shard_size
    export(
        options.run, options.out, step=options.step, model_type=options.model_type, dtype=options.dtype or "float32",
        verify=options.verify, **({} if size is None else {"limit": bytes_of(size)}),
    )  # fmt: skip


COMMAND = Command(
    name="export",
    help="write a run as a folder that transformers or ONNX Runtime loads",
    run=run,
    add_arguments=add_arguments,
)
