"""A bad input of a user, with the call that takes it: made from its kind and seed alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from random import Random

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One input and its call.

    Attributes:
        about: what was changed, and the command that takes it.
        call: runs it; whatever it returns counts as accepted.
    """

    about: str
    call: Call


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a mutant is made, and what it may be made from.

    Attributes:
        place: a new folder, which is the working directory of the call. Everything the call writes belongs in it.
        material: a folder with runs, checkpoints and files that are not to be changed (`tests.mutations.material`).
    """

    place: Path
    material: Path


Make = Callable[[Random, Setting], Mutant]


def command(*arguments: object) -> Call:
    """The call of a `manyheads` command, as the console script makes it."""

    def call() -> object:
        from train.commands.cli import main

        return main([str(argument) for argument in arguments])

    return call


def listed(*arguments: object) -> str:
    """A command in one short line."""
    return " ".join(repr(text)[1:-1] if len(text) < 60 else f"{text[:50]!r}..." for text in map(str, arguments))


def of_command(about: str, *arguments: object) -> Mutant:
    """A mutant whose call is a command."""
    return Mutant(f"{about}: {listed(*arguments)}", command(*arguments))
