"""`manyheads`: the commands. A user's mistake ends a command with a single line and exit status 2."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from train.commands import (
    attend,
    chat,
    embed,
    export,
    finetune,
    generate,
    import_checkpoint,
    look,
    predict,
    prepare,
    train,
    translate,
)
from train.commands.examine import (
    checkpoints,
    diff,
    doctor,
    evaluate,
    explain,
    inspect_data,
    plot,
    replay,
    report,
    verify_resume,
)
from train.interrupt import exit_on_sigint
from transformer.errors import ConfigError, UserError, printable, shown

COMMANDS = tuple(
    module.COMMAND
    for module in (
        train, finetune, evaluate, import_checkpoint, export, embed, prepare, inspect_data, explain, doctor, plot, report, diff,
        checkpoints, generate, chat, attend, look, translate, predict, replay, verify_resume,
    )
)  # fmt: skip
"""To add a command, add its file and its name here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name or a text that the terminal's encoding lacks does not end a command.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.command.takes_fields:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    try:
        with exit_on_sigint("manyheads"):
            _fetch_runs(options)
            return options.command.run(options) or 0
    except UserError as error:
        print(f"manyheads: {message_of(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of the pipe (head, less) has exited: not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        # Even a check of whether there is a file of this name raises it.
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"manyheads: {shown(error.filename)}: {error.strerror}; give a shorter one", file=sys.stderr)
        return 2
    return 0


class Parser(argparse.ArgumentParser):
    """One whose errors show control characters as escapes."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _fetch_runs(options: argparse.Namespace) -> None:
    """Replace the runs that a command names by their folders on this machine; `address` stays what was named."""
    from train.remote import local_run

    whole = options.command in (checkpoints.COMMAND, replay.COMMAND)
    for name, value in list(vars(options).items()):
        if name in ("run", "run_a", "run_b"):
            options.address = value
            setattr(options, name, local_run(value, whole=whole))
        elif name == "runs":
            options.runs = [local_run(one) for one in value]


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it gives is the one that was named."""
    parser = Parser(prog="manyheads", description="Train and use Transformers from a config.")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(parsers)
    return parser


def message_of(error: UserError) -> str:
    """The error's message, which names a field by its whole path."""
    if not isinstance(error, ConfigError):
        return printable(str(error))
    from train.config import RunConfig
    from train.config.mistakes import with_path

    return printable(with_path(RunConfig, error))


if __name__ == "__main__":
    sys.exit(main())
