"""Tokens as short labels in which everything is visible: spaces, line ends, control and invisible characters."""

from __future__ import annotations

import unicodedata

_MARKS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_JOINERS = "\u200c\u200d"
"""They shape the letters and emoji on both sides of them; a token of joiners alone shows them."""


def visible(token: str) -> str:
    """A label for one token: one line, without invisible characters or any that reverse the direction of what follows.

    >>> visible(" the"), visible("\\n"), visible("\\u202e"), visible("")
    ('␣the', '↵', '‹U+202E›', '∅')
    """
    if not token:
        return "∅"
    alone = not token.strip(_JOINERS)
    # An accent without its letter gets the usual circle as its base.
    ground = "\u25cc" if unicodedata.category(token[0]).startswith("M") else ""
    return ground + "".join(
        character if character in _JOINERS and not alone else _visible(character) for character in token
    )


def _visible(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    # C: control, format, surrogate, private, unassigned. Z: separators, of which the plain space is done.
    return code_point(character) if unicodedata.category(character)[0] in "CZ" else character


def code_point(character: str) -> str:
    """The label of a character that cannot be shown: ‹U+202E›."""
    return f"‹U+{ord(character):04X}›"
