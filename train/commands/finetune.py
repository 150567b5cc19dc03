"""`manyheads finetune`: writes the config of a fine-tuning, shows it, and trains."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from train.commands.command import Command, add_devices, set_up, status_of
from transformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    source = "a run or an import, a folder with a Hugging Face checkpoint, or its name on the hub"
    parser.add_argument("source", metavar="SOURCE", help=source)
    data = "text, JSONL, CSV, Parquet, SQLite or CoNLL: a file or a glob, such as 'news/*/*.txt', where folders are classes"
    parser.add_argument("--data", required=True, metavar="FILES", help=data)
    parser.add_argument("--validation", metavar="FILES", help="held-out documents (a part of --data)")
    parser.add_argument("--label", metavar="FIELD", help="the field, or the column, that holds the labels")
    parser.add_argument("--text", metavar="FIELD", help="the field that holds the text (text)")
    parser.add_argument("--second", metavar="FIELD", help="the field that holds the second text of a pair")
    task = "an objective, such as classification, regression or causal (by default what model and data are for)"
    parser.add_argument("--task", metavar="OBJECTIVE", help=task)
    parser.add_argument("--epochs", type=float, default=3.0, metavar="N", help="passes over the data (3)")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train low-rank adapters instead of all parameters")
    parser.add_argument("--name", metavar="NAME", help="name of the run (that of the model and of the data)")
    parser.add_argument("--config-only", action="store_true", help="write the config, and do not train")


def run(options: argparse.Namespace) -> int:
    set_up(options)
    from train.config.yaml_files import dump_yaml
    from train.files import write_whole, writing
    from train.finetune.propose import Request, propose
    from train.run.loop import train

    request = Request(
        source=options.source, data=options.data, validation=options.validation, label=options.label, text=options.text,
        second=options.second, task=options.task, epochs=options.epochs, name=options.name, lora=options.lora,
        flags=tuple(options.overrides),
    )  # fmt: skip
    data, config = propose(request)
    path, body = Path("runs", f"{config.name}.yaml"), dump_yaml(data)
    given = shlex.join(["manyheads", *sys.argv[1:]]).replace("\n", " ")
    if path.exists() and path.read_text(encoding="utf-8", errors="replace").partition("\n")[2] != body:
        raise UserError(f"{path}: it has other settings; remove it, or give this run another --name")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"# {given}\n{body}")
    print(
        f"{path}:\n\n{body}\nto train with it again, or to go on: manyheads train {shlex.quote(str(path))}", flush=True
    )
    if options.config_only:
        return 0
    return status_of(train(config))


COMMAND = Command(
    name="finetune", help="fine-tune a run or a Hugging Face checkpoint on files: writes the config, shows it, and trains",
    run=run, add_arguments=add_arguments, makes_config=True,
)  # fmt: skip
