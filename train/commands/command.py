"""What the commands of `manyheads` have in common: how one is described, and arguments that several take.

Nothing here or at the top of a command's file imports JAX, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from transformer.errors import ConfigError, UserError

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.parallel.processes import Peers
    from train.run.session import Finished

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its arguments, and what it does with them."""

    name: str
    help: str
    run: Callable[[argparse.Namespace], int | None]
    """Returns the exit status; None is 0."""
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    takes_config: bool = False
    """Whether it reads a config, whose fields can be overridden by further flags."""
    makes_config: bool = False
    """Whether it makes a config, whose fields can be set by further flags."""

    @property
    def takes_fields(self) -> bool:
        """Whether further flags are fields of a config."""
        return self.takes_config or self.makes_config

    def add_to(self, commands: argparse._SubParsersAction) -> None:
        """Add its parser to those of the other commands."""
        listed = "`manyheads explain CONFIG` lists them"
        overrides = f"\n\nAny field can be overridden: --model.num-layers 8 --steps 500; {listed}."
        parser = commands.add_parser(
            self.name, help=self.help, description=self.help + (overrides if self.takes_fields else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        if self.takes_config:
            parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
        self.add_arguments(parser)
        parser.set_defaults(command=self)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Which devices to run on."""
    parser.add_argument("--devices", type=int, metavar="N", help="make N virtual CPU devices and run on them")
    parser.add_argument("--platform", metavar="NAME", help="cpu, gpu or tpu; JAX's own choice by default")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Which run, and which of its checkpoints."""
    parser.add_argument("run", metavar="RUN", help="folder of a run, or its address")
    parser.add_argument("--step", default="best", metavar="STEP", help="checkpoint: best, latest, or a step (best)")


def set_up(options: argparse.Namespace, peers: Peers | None = None) -> None:
    """Start JAX on the devices that were asked for."""
    from train.parallel.runtime import set_up_devices

    set_up_devices(getattr(options, "devices", None), getattr(options, "platform", None), peers)


def status_of(finished: Finished) -> int:
    """The exit status of a run: 0, or after an interruption 128 and the signal's number, as a shell has it."""
    return 128 + (finished.signal or signal.SIGTERM) if finished.interrupted else 0


def load_config(options: argparse.Namespace) -> RunConfig:
    """The config with its overrides, and the model of the run in its `init_from`. Raises `UserError`."""
    from train.config import load
    from train.finetune.base import find_base

    return load(options.config, options.overrides, find_base=find_base)


def given_flags(kind: type, options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a config for which a flag of the same name was given, or has a default."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: vars(options)[name] for name in names if vars(options).get(name) is not None}


def from_flags(kind: type[T], options: argparse.Namespace) -> T:
    """A config whose fields take the values of the command's flags of the same names. Raises `UserError`."""
    try:
        return kind(**given_flags(kind, options))
    except ConfigError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None


def add_sampling(parser: argparse.ArgumentParser, what: str) -> None:
    """How text is sampled from a language model: the fields of `Sampling`, the seed, and the length of `what` is generated."""
    length = f"length of {what} (an import's own, else 256, or what the context leaves)"
    parser.add_argument("--max-tokens", type=int, metavar="N", help=length)
    warm = "sampling temperature; 0 is greedy (an import's own, else 0.8)"
    parser.add_argument("--temperature", type=float, help=warm)
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens (an import's own, else all)")
    most = "sample from the likeliest tokens whose probabilities sum to this (an import's own, else 0.95)"
    parser.add_argument("--top-p", type=float, help=most)
    least = "drop tokens below this fraction of the likeliest token's probability (an import's own, else 0)"
    parser.add_argument("--min-p", type=float, help=least)
    again = "above 1 penalises repetition (an import's own, else 1)"
    parser.add_argument("--repetition-penalty", type=float, help=again)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling (0)")


def add_encoding(parser: argparse.ArgumentParser, default: str = "") -> None:
    """How a file that the command reads is encoded; utf-8, or None if a text says what the `default` is."""
    text = f"encoding of a file without a byte order mark ({default or 'utf-8'})"
    parser.add_argument("--encoding", default=None if default else "utf-8", metavar="NAME", help=text)


def read_lines(options: argparse.Namespace, name: str) -> list[str]:
    """The lines of a file, or of standard input (`-`), in the encoding that was asked for, blank ones too. Raises `UserError`."""
    from train.data.sources.new_documents import file_lines

    return file_lines(name, options.encoding)
