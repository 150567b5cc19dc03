"""The reference of commands: the help of each, from the parsers of the programs themselves."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.cli import _parser as bench_parser
from train.commands.cli import make_parser

_PROGRAMS = {"manyheads": make_parser, "manyheads-bench": bench_parser}
_WIDTH = 90


def commands(program: str) -> str:
    """Markdown with a section for each command of a program."""
    parser = _PROGRAMS[program]()
    (listed,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(_command(one) for one in listed.choices.values())


def _command(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=_WIDTH)
    about, *more = (parser.description or "").split("\n\n")
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    parts = [f"## `{parser.prog}`", _sentence(about), *more, f"```text\n{usage}\n```", *_arguments(parser)]
    return "\n\n".join(parts)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        yield f"`{names}{_value(action)}`\n: {_sentence(action.help or '') or 'No further description.'}"


def _value(action: argparse.Action) -> str:
    if not action.option_strings or action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return ""
    if action.choices is not None and action.metavar is None:
        return f" {{{','.join(map(str, action.choices))}}}"
    name = action.metavar or action.dest.upper()
    return f" {name if isinstance(name, str) else ' '.join(name)}"


def _sentence(text: str) -> str:
    """Help as a sentence, in which argparse's own escapes are resolved."""
    text = text.replace("%%", "%")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) or not text else ".")
