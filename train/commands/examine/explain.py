"""`manyheads explain`: a config's fields, and what its run will cost."""

from __future__ import annotations

import argparse

from train.commands.command import Command, load_config


def run(options: argparse.Namespace) -> None:
    config = load_config(options)
    from train.examine.explain import explain

    explain(config)


COMMAND = Command(
    name="explain", help="print every field of a config with its meaning, and what the run will cost", run=run,
    takes_config=True,
)  # fmt: skip
