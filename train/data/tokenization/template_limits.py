"""What a chat template of somebody else may make: guards before a text or a list is made that no memory holds."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformer.errors import UserError

MOST_CHARACTERS = 1 << 24
"""The longest text that a template may make of one dialogue, and of any of its parts."""
_MOST_PIECES = 1 << 20
"""The most pieces that a filter may cut a value into."""
_WIDE = re.compile(r"[0-9]{8,}")
"""A width, in a text with formats, that no text needs."""


class Unusable(UserError):
    """Why a template, or a dialogue with it, cannot be used."""


class TooSlow(Unusable):
    """A rendering takes too long, which another machine, or the same one later, may not say."""


def check_widths(form: str, values: Sequence[Any]) -> None:
    """Raise `Unusable` for a text with formats that is made wide by a number."""
    if _WIDE.search(form) or any(isinstance(one, int) and abs(one) > MOST_CHARACTERS and "*" in form for one in values):
        raise Unusable(f"it makes a text of more than {MOST_CHARACTERS:,} characters")


def check_method(text: str, name: str, given: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise `Unusable` for a method of a text that would make a huge one."""
    values = [*given, *named.values()]
    size = 0
    if name == "replace":
        size = _replaced_size(text, *values[:2])
    elif name == "expandtabs":
        size = text.count("\t") * max([one for one in values if isinstance(one, int)], default=8)
    elif name in ("center", "ljust", "rjust", "zfill"):
        size = max([one for one in values if isinstance(one, int)], default=0)
    elif name == "join" and values and isinstance(values[0], Sequence):
        size = _joined_size(values[0], text)
    elif name in ("format", "format_map"):
        check_widths(text, [])
        size = max([one for one in values if isinstance(one, int)], default=0) if "{:{" in text or ":{" in text else 0
    check_size(size)


def check_size(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise Unusable(f"it makes a text of more than {MOST_CHARACTERS:,} characters")


def _replaced_size(text: Any, old: Any = "", new: Any = "", *_: Any) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _joined_size(parts: Any, between: Any = "") -> int:
    return sum(len(str(part)) + len(str(between)) for part in parts) if isinstance(parts, Sequence) else 0


def guarded(name: str, size: Callable[..., int], most: int = MOST_CHARACTERS) -> Callable[..., Any]:
    """A filter of jinja2 that refuses to make more than `most` characters, or pieces: `size` of its arguments."""
    from jinja2.filters import FILTERS

    own = FILTERS[name]

    @functools.wraps(own)
    def checked(*given: Any, **named: Any) -> Any:
        values = given[1:] if hasattr(own, "jinja_pass_arg") else given
        if size(*values, **named) > most:
            raise Unusable(f"the filter {name!r} would make more than {most:,} characters or pieces")
        return own(*given, **named)

    return checked


def _width_of(value: Any, width: Any = 80, *_: Any, **__: Any) -> int:
    return width if isinstance(width, int) else len(str(width))


def _indented_size(value: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    return (str(value).count("\n") + 1) * _width_of(value, width)


def _format_size(form: Any, *values: Any, **_: Any) -> int:
    check_widths(str(form), values)
    return 0


GUARDED: dict[str, tuple[Callable[..., int], int]] = {
    "center": (_width_of, MOST_CHARACTERS), "indent": (_indented_size, MOST_CHARACTERS),
    "replace": (_replaced_size, MOST_CHARACTERS), "format": (_format_size, MOST_CHARACTERS),
    "batch": (lambda value, linecount=1, *_, **__: int(linecount), _MOST_PIECES),
    "slice": (lambda value, slices=1, *_, **__: int(slices), _MOST_PIECES),
    "join": (lambda value, d="", *_, **__: _joined_size(value, d), MOST_CHARACTERS),
}  # fmt: skip


def of_usual_size(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > MOST_CHARACTERS:
        raise Unusable(f"it makes a value of more than {MOST_CHARACTERS:,} parts")
    return value
