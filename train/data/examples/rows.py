"""Rows for the tasks of an encoder: one text, or two, with `[CLS]` in front and `[SEP]` after each.

Axes: B examples asked for at once, T positions, N examples there are. Every row holds

    tokens            [B, T] int32    `[CLS]`, the text, `[SEP]` (Devlin et al. 2018, section 4.1), a second text, `[SEP]`;
                                      between two texts, the tokenizer's number of `[SEP]`
    segments          [B, T] int32    1 at tokens, 0 at padding
    positions         [B, T] int32    0, 1, ...; 0 at padding

and, if there is a second text,

    token_types       [B, T] int32    1 there and at its `[SEP]`, else 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.data.examples.pack import Examples
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import CLS, SEP, Tokenizer
from train.progress import say_once
from transformer.errors import UserError

TooLong = Literal["drop", "truncate"]
"""What happens to a document longer than a row: it is left out, or cut."""


@dataclass(frozen=True)
class LongTexts:
    """How many of the texts of an array are too long for their rows."""

    count: int
    total: int
    """How many texts there are."""
    limit: str = ""
    """What the texts are, the most tokens that one may have, and what happens to a longer one."""

    def __add__(self, other: LongTexts) -> LongTexts:
        """Those of two arrays with the same limit; an array without long texts may have any other."""
        return LongTexts(self.count + other.count, self.total + other.total, self.limit if self.count else other.limit)

    def say(self, name: str) -> None:
        """Print their number, if there are any, once for each array `name`."""
        if self.count:
            say_once(f"{name}: {self.count} of {self.total} {self.limit}")


@dataclass(frozen=True, eq=False)
class Stretches:
    """A stretch of tokens for each example."""

    tokens: np.ndarray
    """The tokens of all documents."""
    starts: np.ndarray
    """[N], the index in `tokens` where each begins."""
    sizes: np.ndarray
    """[N], in tokens."""

    @classmethod
    def of(cls, array: TokenArray, documents: np.ndarray, sizes: np.ndarray) -> Stretches:
        """The beginnings of some documents of an array."""
        # Plain views: indexing a memmap is several times slower.
        return cls(np.asarray(array.tokens), np.asarray(array.offsets)[documents], sizes)


class TaskRows(Examples):
    """The examples of an array of documents; each example is about one document."""

    documents: np.ndarray
    """[N] int64: which document of the array each example is about."""
    sides: list[Stretches]
    """The stretches in the rows: of one text, or of two."""
    too_long: LongTexts
    """The documents, or questions, that are left out or cut."""

    def __init__(self, array: TokenArray, tokenizer: Tokenizer, length: int) -> None:
        super().__init__(array, length)
        self._cls, self._sep = tokenizer.special_ids[CLS], tokenizer.special_ids[SEP]
        self.between = tokenizer.separators

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def efficiency(self) -> float:
        rows = len(self.sides[0].sizes)
        used = sum(int(side.sizes.sum()) for side in self.sides) + self.frame(len(self.sides)) * rows
        return used / max(1, rows * self.length)

    def frame(self, sides: int) -> int:
        """Special tokens in a row of one or two texts."""
        return 2 if sides == 1 else 2 + self.between

    def rows(self, sides: Sequence[Stretches], indices: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays that the module describes: the stretches `indices` [B] of one or two sides."""
        places = np.arange(self.length)
        tokens, types = (np.zeros((len(indices), self.length), np.int32) for _ in range(2))
        before = np.zeros((len(indices), 1), np.int64)  # the position of the last special token before a side
        for number, side in enumerate(sides):
            sizes = side.sizes[indices][:, None]
            offset = places - before - 1
            inside = (offset >= 0) & (offset < sizes)
            source = side.starts[indices][:, None] + np.where(inside, offset, 0)
            first = before + sizes + 1
            last = first if number + 1 == len(sides) else first + self.between - 1
            separates = (places >= first) & (places <= last)
            tokens = np.where(inside, side.tokens[source], np.where(separates, self._sep, tokens))
            types[(places > before) & (places <= last)] = number
            before = last
        tokens[:, 0] = self._cls
        inside = places <= before
        batch = {
            "tokens": tokens.astype(np.int32),
            "segments": inside.astype(np.int32),
            "positions": np.where(inside, places, 0).astype(np.int32),
        }
        return batch if len(sides) == 1 else batch | {"token_types": types}


def one_each(count: int) -> np.ndarray:
    """Weights [B, 1]: a row is one prediction."""
    return np.ones((count, 1), np.float32)


def text_sizes(array: TokenArray) -> np.ndarray:
    """How many tokens [documents] the texts of an array have, without end of text."""
    return np.diff(array.offsets) - 1


def fitting(
    array: TokenArray, sizes: np.ndarray, length: int, too_long: TooLong, *, shown: bool
) -> tuple[np.ndarray, LongTexts]:
    """Which documents make examples, by the `sizes` [documents] of their rows, special tokens counted: all, or those that fit;
    and those that are too long.

    `shown` says how many these are. Raises `UserError` if none is short enough.
    """
    fits = sizes <= length
    count, drops = int(np.sum(~fits)), too_long == "drop"
    if drops and count and count == len(fits):
        raise UserError(
            f"{array.name}: none of {count} documents fits a row of {length} tokens; make length larger, or set "
            "objective.too_long: truncate"
        )
    limit = f"documents are longer than {length} tokens with [CLS] and [SEP]: {'left out' if drops else 'cut'}"
    found = LongTexts(count, len(fits), limit)
    if shown:
        found.say(array.name)
    return np.flatnonzero(fits) if drops else np.arange(len(fits)), found


def longest_first(first: np.ndarray, second: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of both sides of pairs [N] are used: the longer side is cut first, until both fit `room` tokens."""
    shorter = np.minimum(np.minimum(first, second), room // 2)
    rest = room - shorter
    is_longer = first > second
    cut = first + second > room
    return (
        np.where(cut, np.where(is_longer, np.minimum(first, rest), shorter), first),
        np.where(cut, np.where(is_longer, shorter, np.minimum(second, rest)), second),
    )
