"""`manyheads verify-resume`: whether a run that is killed and resumed equals one that is not."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from train.commands.command import Command, load_config
from transformer.errors import UserError, is_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="how often the run is killed (5)")
    devices = "numbers of virtual CPU devices that it takes in turn, such as 8,4,2,1 (1)"
    parser.add_argument("--meshes", default="1", metavar="COUNTS", help=devices)
    processes = "numbers of processes that these devices are divided among, in turn (1)"
    parser.add_argument("--processes", default="1", metavar="COUNTS", help=processes)
    parser.add_argument("--moments-seed", type=int, default=0, metavar="SEED", help="random seed of the moments (0)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for both runs and the report (runs/NAME-verify-resume)"
    )


def run(options: argparse.Namespace) -> int:
    """The exit status: 1 where the runs differ."""
    config = load_config(options)
    devices, processes = _counts("--meshes", options.meshes), _counts("--processes", options.processes)
    if options.kills < 1:
        raise UserError(f"--kills: got {options.kills}; allowed: 1 or more")
    from train.examine.interrupted import Layout
    from train.examine.verify_resume import verify_resume

    layouts = [
        Layout(devices[number % len(devices)], processes[number % len(processes)])
        for number in range(math.lcm(len(devices), len(processes)))
    ]
    for layout in layouts:
        if layout.devices % layout.processes:
            raise UserError(f"--processes: {layout}; allowed: numbers that divide those of --meshes")
    folder = options.out or Path("runs", f"{config.name}-verify-resume")
    return 0 if verify_resume(config, folder, kills=options.kills, layouts=layouts, seed=options.moments_seed) else 1


def _counts(flag: str, text: str) -> list[int]:
    counts = [int(word) if is_number(word) else 0 for word in text.split(",")]
    if min(counts) < 1:
        raise UserError(f"{flag}: got {text!r}; allowed: numbers with commas, such as 4,2,1")
    return counts


COMMAND = Command(
    name="verify-resume", help="kill a run at random moments, resume it, and compare it with one that was not interrupted",
    run=run, add_arguments=add_arguments, takes_config=True,
)  # fmt: skip
