"""`manyheads train`: train from a config."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from train.commands.command import Command, add_devices, load_config, set_up, status_of
from transformer.errors import UserError, is_number, shown

if TYPE_CHECKING:
    from train.parallel.processes import Peers

_MOST_SECONDS = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_devices(parser)
    several = "run as one of several processes, found from Slurm, MPI, a TPU pod, ..."
    parser.add_argument("--distributed", action="store_true", help=several)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="with several processes: the address of process 0")
    parser.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0")
    silent = "seconds without a heartbeat after which a process counts as dead (60)"
    parser.add_argument("--heartbeat-seconds", type=int, default=60, metavar="S", help=silent)
    hang = "seconds without a step after which the process ends, with the stacks of its threads; 0: never (1800)"
    parser.add_argument("--hang-seconds", type=float, default=1800.0, metavar="S", help=hang)
    parser.add_argument("--profile", metavar="A:B", help="trace steps A to B for TensorBoard or Perfetto")
    changed = (
        "resume though these fields or sections differ from the checkpoint's, or other `data`; several with commas"
    )
    parser.add_argument("--allow-changed", metavar="FIELDS", default="", help=changed)
    seeds = "train with N seeds, from the config's seed up, and summarise their scores"
    parser.add_argument("--seeds", type=int, metavar="N", help=seeds)


def run(options: argparse.Namespace) -> int:
    """The exit status: 0, or after an interruption 128 and the signal's number, as a shell has it."""
    profile = _profile_range(options.profile)
    config = load_config(options)
    if not 0 <= options.hang_seconds <= _MOST_SECONDS:
        raise UserError(f"--hang-seconds: got {options.hang_seconds:g}; allowed: 0 (never) to {_MOST_SECONDS:g}")
    if options.seeds is not None and options.allow_changed:
        raise UserError("--allow-changed: names changes of a single run; leave out --seeds")
    if options.seeds is not None and profile is not None:
        raise UserError("--profile: traces a single run; leave out --seeds")
    set_up(options, _peers(options))
    if options.seeds is not None:
        from train.examine.seeds import train_seeds

        finished = train_seeds(config, options.seeds, hang_seconds=options.hang_seconds)
    else:
        from train.run.loop import train

        allowed = [name.strip().replace("-", "_") for name in options.allow_changed.split(",") if name.strip()]
        finished = train(config, profile=profile, allow_changed=allowed, hang_seconds=options.hang_seconds)
    return status_of(finished)


def _peers(options: argparse.Namespace) -> Peers | None:
    """The other processes of the run, if flags name them."""
    given: dict[str, Any] = {
        name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")
    }  # fmt: skip
    if not options.distributed and set(given.values()) == {None}:
        return None
    from train.parallel.processes import Peers

    return Peers(**given, heartbeat_seconds=options.heartbeat_seconds)


def _profile_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and is_number(first) and is_number(last) and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile: got {shown(text)}; allowed: FIRST:LAST, two steps from 1 up, such as 10:20")
    return int(first), int(last)


COMMAND = Command(
    name="train", help="train from a config, or continue where the run stopped", run=run, add_arguments=add_arguments,
    takes_config=True,
)  # fmt: skip
