"""Errors that a user can fix, and the checks that make every existing config a valid one.

A program shows such an error as one line and exits with status 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from transformer.resume import OnResume

MOST_LAYERS = 10_000
"""The most layers of a model: far more than any has, and few enough to list."""
MOST_PLACES = 2**31 - 1
"""The largest dim of an array: indices have 32 bits."""


class UserError(Exception):
    """A mistake outside the code: a missing file, an empty corpus, a full disk.

    The message is one line that names the file or field, what was given, and what to do.
    """


class ConfigError(UserError, ValueError):
    """A config value that has the wrong type, is out of range, or contradicts another one.

    `owner` is the config class and `field` the name of the field, from which a program that knows the whole
    config derives the full path (`model.num_heads`). It is a `ValueError`, so that a validator such as pydantic
    collects it together with its place in the config.
    """

    def __init__(self, owner: type, field: str, given: Any, allowed: str) -> None:
        super().__init__(f"{field}: got {shown(given, 200)}; {allowed}")
        self.owner = owner
        self.field = field
        self.given = given
        self.allowed = allowed


class Config:
    """Base class of config dataclasses: frozen, keyword-only, and validated when they are created.

    A subclass with checks of its own calls `super().__post_init__()` first.
    """

    on_resume: ClassVar[OnResume] = OnResume.NEVER
    """What a resumed run may do with a field that does not say it in its own type (`Free[int]`)."""

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(config: Any) -> None:
    """Raise a `ConfigError` for the first field of a config dataclass whose value does not fit its annotation.

    Annotations may consist of bool, int, float, str, None, Any, Literal, tuple, dataclasses, and unions of these. An
    int in place of a float is stored as a float; a bool is not an int.

    Raises:
        TypeError: an annotation of any other kind.
    """
    config_type: type = type(config)
    for name, annotation in field_types(config_type).items():
        value = getattr(config, name)
        fitted = _fit(value, annotation)
        if fitted is _MISFIT:
            raise ConfigError(config_type, name, value, what_fits(annotation, value))
        if isinstance(value, int) and abs(value) > _LARGEST_INT:
            raise ConfigError(config_type, name, value, "allowed: a number that 64 bits hold")
        if fitted is not value:
            object.__setattr__(config, name, fitted)


@functools.cache
def field_types(config_type: type) -> dict[str, Any]:
    """The resolved annotation of each field of a dataclass, by the field's name."""
    hints = typing.get_type_hints(config_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def what_fits(annotation: Any, value: Any) -> str:
    """What an annotation allows instead of a value that does not fit it: `allowed: an integer, or null`."""
    names = [typing.get_args(one)[0] for one in alternatives(annotation) if typing.get_origin(one) is Literal]
    texts = [name for name in names if isinstance(name, str)]
    found = nearest(value, texts) if isinstance(value, str) else ""
    return f"allowed: {_allowed(annotation)}" + (f".{found}" if found else "")


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, with each value of a Literal as a member; for any other annotation, itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(one for part in typing.get_args(annotation) for one in alternatives(part))
    if typing.get_origin(annotation) is Literal:
        return tuple(Literal[value] for value in typing.get_args(annotation))
    return (annotation,)


def check_text(name: str, text: str) -> None:
    """Raise a `UserError` for text from a command line that is not valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: it is not valid UTF-8 at character {error.start + 1}") from None


def check_size(config: Any, field: str) -> None:
    """Raise a `ConfigError` unless a field is a size of 1 or more that an array can have (or a depth that a program can)."""
    value, deep = getattr(config, field), field in ("num_layers", "num_decoder_layers")
    require(config, field, value >= 1, "allowed: 1 or more")
    most = MOST_LAYERS if deep else MOST_PLACES
    require(config, field, value <= most, f"allowed: at most {most:,}")


def require(config: Any, field: str, holds: bool, allowed: str) -> None:
    """Raise a `ConfigError` for `config.<field>` unless `holds`; `allowed` describes the valid values.

    Called from `__post_init__`, so that every config that exists is valid.
    """
    if not holds:
        raise ConfigError(type(config), field, getattr(config, field), allowed)


def shown(value: Any, longest: int = 40) -> str:
    """A value, in one line of at most `longest` characters, for an error message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def is_number(text: str) -> bool:
    """Whether a text is a whole number from 0 up, in ASCII, of as many digits as a count has."""
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def printable(text: str) -> str:
    """A text with escapes in the place of control characters: a name from a file may hold commands for the terminal."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def first_line(error: BaseException | str, longest: int = 300) -> str:
    """The first line with text of an exception's message, at most `longest` characters; its type if it has no message."""
    lines = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), type(error).__name__)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `names`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


_MISFIT = object()
_MOST_DIGITS = 18
_LARGEST_INT = 2**63 - 1
_PHRASES: dict[Any, str] = {
    bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null", Any: "anything",
}  # fmt: skip


def _fit(value: Any, annotation: Any) -> Any:
    """The value converted to the annotation, or `_MISFIT`."""
    parts = alternatives(annotation)
    if len(parts) > 1:
        # A member that leaves the value unchanged comes before one that converts it: 1 stays an int in `int | float`.
        fitted = [one for one in (_fit(value, part) for part in parts) if one is not _MISFIT]
        return next((one for one in fitted if type(one) is type(value)), fitted[0] if fitted else _MISFIT)
    (kind,) = parts
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return value if type(value) is type(arguments[0]) and value == arguments[0] else _MISFIT
    if origin is tuple:
        if not isinstance(value, tuple):
            return _MISFIT
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) != len(value):
            return _MISFIT
        items = tuple(_fit(item, part) for item, part in zip(value, kinds, strict=True))
        if any(item is _MISFIT for item in items):
            return _MISFIT
        return value if all(item is old for item, old in zip(items, value, strict=True)) else items
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in _PHRASES or dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) else _MISFIT
    raise TypeError(f"a config cannot have a field of type {kind!r}")


def _allowed(annotation: Any) -> str:
    phrases = [_phrase(part) for part in alternatives(annotation)]
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])}, or {phrases[-1]}"


def _phrase(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return repr(arguments[0])
    if origin is tuple:
        if arguments[1:] == (...,):
            return f"a list (tuple) where each item is {_allowed(arguments[0])}"
        return f"a list (tuple) of {len(arguments)} items"
    return _PHRASES.get(kind) or str(kind.__name__)
