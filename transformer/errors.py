"""Errors that a user can mend. A program shows them as one line and exits with status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake outside the code: a missing file, an empty corpus, a full disk.

    The message is one line that names the file or field, what was given, and what to do.
    """


class ConfigError(UserError):
    """A config value that is out of range, or that contradicts another one.

    `owner` is the config class and `field` the name of the field, from which a program that knows the whole
    config derives the full path (`model.num_heads`).
    """

    def __init__(self, owner: type, field: str, given: Any, allowed: str) -> None:
        super().__init__(f"{field}: got {given!r}; {allowed}")
        self.owner = owner
        self.field = field
        self.given = given
        self.allowed = allowed


def check_text(name: str, text: str) -> None:
    """Raise a `UserError` for text from a command line that is not valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: it is not valid UTF-8 at character {error.start + 1}") from None


def require(config: Any, field: str, holds: bool, allowed: str) -> None:
    """Raise a `ConfigError` for `config.<field>` unless `holds`. `allowed` says what would be right.

    Called from `__post_init__`, so that a config which exists is a config which is valid.
    """
    if not holds:
        raise ConfigError(type(config), field, getattr(config, field), allowed)


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `names`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
