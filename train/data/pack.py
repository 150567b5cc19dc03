"""Cutting a token array into examples of one length, each found by its index alone.

Axes: B examples asked for at once, T positions. Every example holds

    tokens   [B, T] int32    the inputs
    targets  [B, T] int32    the token after each input
    weights  [B, T] float32  1 where the target counts, 0 at padding

and, where documents are kept apart,

    segments  [B, T] int32   which piece a position belongs to: 1, 2, ...; 0 at padding
    positions [B, T] int32   its place in the piece, from 0

Over all examples, every predicted token of the array is a target once; packed documents begin with an end of text.
"""

from __future__ import annotations

import abc
import contextlib
import os
from pathlib import Path
from typing import Literal

import numpy as np

from train.data.cache import sync
from train.data.store import TokenArray
from transformer.errors import UserError

Packing = Literal["chunk", "documents"]

_WINDOW = 1 << 20  # document remainders that are fitted together: bounds the memory that packing takes
_INDEX_VERSION = 1


class Examples(abc.ABC):
    """The examples of one token array. `len` is their number."""

    def __init__(self, array: TokenArray, length: int) -> None:
        self.length = length
        self._tokens = np.asarray(array.tokens)  # a plain view: indexing a memmap costs several times as much

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices` [B] int64, each in [0, len): arrays [B, T] as the module describes."""

    @property
    @abc.abstractmethod
    def efficiency(self) -> float:
        """The part of all positions that have a target; the rest is padding."""


class Chunked(Examples):
    """Example i is `length` tokens from i * length on, wherever documents begin and end.

    What is left at the end is dropped for training; with `keep_rest` it is one more example, padded.
    """

    def __init__(self, array: TokenArray, length: int, *, keep_rest: bool = False) -> None:
        super().__init__(array, length)
        self._targets = len(self._tokens) - 1
        self._len = -(-self._targets // length) if keep_rest else self._targets // length

    def __len__(self) -> int:
        return self._len

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        places = indices[:, None] * self.length + np.arange(self.length + 1)
        window = self._tokens[np.minimum(places, self._targets)].astype(np.int32)
        weights = (places[:, 1:] <= self._targets).astype(np.float32)
        return {
            "tokens": np.ascontiguousarray(window[:, :-1]),
            "targets": np.ascontiguousarray(window[:, 1:]),
            "weights": weights,
        }

    @property
    def efficiency(self) -> float:
        return min(1.0, self._targets / max(1, len(self) * self.length))


class Documents(Examples):
    """Whole documents fitted into examples, longer ones cut into pieces; no target lies in another document.

    Fitting is best-fit decreasing. The index is kept beside the tokens, so that a later run maps it into memory.
    """

    def __init__(self, array: TokenArray, length: int) -> None:
        super().__init__(array, length)
        index = _load_or_make_index(array, length)
        self._starts, self._lengths = index[:, 0], index[:, 1]
        count = int(index[-1, 2]) + 1 if len(index) else 0
        self._bounds = np.searchsorted(index[:, 2], np.arange(count + 1))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        # From rows to pieces, then from pieces to tokens, each time by repeating what a group shares and adding
        # the place within the group: no Python loop, however short the documents are.
        first, counts = self._bounds[indices], self._bounds[indices + 1] - self._bounds[indices]
        place = _place_in_group(counts)
        pieces = np.repeat(first, counts) + place
        rows = np.repeat(np.arange(len(indices)), counts)
        sizes = self._lengths[pieces]
        before = np.cumsum(sizes) - sizes  # tokens of all pieces before, whose first in the row is the row's own start
        columns = before - np.repeat(before[np.cumsum(counts) - counts], counts)

        positions = _place_in_group(sizes)
        source = np.repeat(self._starts[pieces], sizes) + positions
        target = np.repeat(rows * self.length + columns, sizes) + positions
        values = {
            "tokens": self._tokens[source],
            "targets": self._tokens[source + 1],
            "weights": np.float32(1),
            "segments": np.repeat(place + 1, sizes),
            "positions": positions,
        }
        batch = {}
        for name, value in values.items():
            flat = np.zeros(len(indices) * self.length, np.float32 if name == "weights" else np.int32)
            flat[target] = value
            batch[name] = flat.reshape(len(indices), self.length)
        return batch

    @property
    def efficiency(self) -> float:
        return int(self._lengths.sum()) / max(1, len(self) * self.length)


def examples(array: TokenArray, packing: Packing, length: int, *, training: bool) -> Examples:
    """The examples of an array. Raises `UserError` if there is too little text to train on sequences of `length`."""
    predicted = len(array.tokens) - 1
    if training and predicted < length:
        raise UserError(
            f"{array.name}: {predicted} tokens are fewer than one sequence of {length}; "
            "give it more text or make the sequences shorter"
        )
    return Documents(array, length) if packing == "documents" else Chunked(array, length, keep_rest=not training)


def fit_documents(offsets: np.ndarray, length: int) -> np.ndarray:
    """Fit documents into examples: [P, 3] int64, for each piece its first input, its size and its example.

    `offsets` [documents + 1] is `TokenArray.offsets`. Pieces are sorted by example. A document longer than `length`
    gives full examples and a remainder; remainders and shorter documents are fitted together, largest first, each
    into the fullest example that still has room.
    """
    starts, sizes = offsets[:-1] - 1, np.diff(offsets)
    full = sizes // length
    full_starts = np.repeat(starts, full) + length * _place_in_group(full)
    parts = [np.stack([full_starts, np.full_like(full_starts, length), np.arange(len(full_starts))], axis=1)]
    count = len(full_starts)

    rest = sizes % length
    rest_starts, rest = (starts + full * length)[rest > 0], rest[rest > 0]
    for begin in range(0, len(rest), _WINDOW):
        window = slice(begin, begin + _WINDOW)
        bins = _best_fit_decreasing(rest[window], length)
        order = np.argsort(bins, kind="stable")
        parts.append(np.stack([rest_starts[window], rest[window], bins + count], axis=1)[order])
        count += int(bins.max()) + 1
    return np.concatenate(parts).astype(np.int64)


def _best_fit_decreasing(sizes: np.ndarray, room: int) -> np.ndarray:
    """A bin for each of `sizes` [P], all in [1, room], such that no bin holds more than `room`."""
    bins = np.empty(len(sizes), np.int64)
    bins_with: list[list[int]] = [[] for _ in range(room + 1)]  # by the room that they have left
    occupied = 0  # bit r is set where bins_with[r] is not empty: the lowest bit from `size` on is the best fit
    count = 0
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = occupied >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            chosen = bins_with[left].pop()
            if not bins_with[left]:
                occupied ^= 1 << left
        else:
            left, chosen, count = room, count, count + 1
        bins[item] = chosen
        left -= size
        bins_with[left].append(chosen)
        occupied |= 1 << left if left else 0
    return bins


def _place_in_group(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... within each of consecutive groups of these sizes: [2, 3] gives 0 1 0 1 2."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)


def _load_or_make_index(array: TokenArray, length: int) -> np.ndarray:
    if array.index_path is None:
        return fit_documents(array.offsets, length)
    path = Path(f"{array.index_path}.fit{_INDEX_VERSION}-{length}.npy")
    if not path.is_file():
        index = fit_documents(array.offsets, length)
        # Keeping the index only saves time: where the folder cannot be written, it is made anew each run.
        with contextlib.suppress(OSError):
            _save_whole(path, index)
        return index
    return np.asarray(np.load(path, mmap_mode="r"))


def _save_whole(path: Path, index: np.ndarray) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as stream:
            np.save(stream, index)
        sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
