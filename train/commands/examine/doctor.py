"""`manyheads doctor`: where a training step's time goes, and what to change."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands.command import Command, add_devices, load_config, set_up
from transformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of_run = "CONFIG is the folder of a run, or its address: go on from its newest checkpoint, and write nothing there"
    parser.add_argument("--run", action="store_true", dest="of_run", help=of_run)
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps to time, and then to trace (5)")
    parser.add_argument("--dir", type=Path, metavar="FOLDER", help="folder for the page (doctor/NAME)")
    add_devices(parser)


def run(options: argparse.Namespace) -> None:
    if options.of_run and options.overrides:
        raise UserError(f"--run: a run has its own config; leave out {' '.join(options.overrides)}")
    config = None if options.of_run else load_config(options)
    set_up(options)
    from train.examine.doctor.doctor import doctor, doctor_of_run
    from train.remote import local_run

    if config is None:
        doctor_of_run(local_run(options.config, whole=True), steps=options.steps, folder=options.dir)
    else:
        doctor(config, steps=options.steps, folder=options.dir)


COMMAND = Command(
    name="doctor", help="show where a training step's time goes on the devices at hand, and what to change", run=run,
    add_arguments=add_arguments, takes_config=True,
)  # fmt: skip
