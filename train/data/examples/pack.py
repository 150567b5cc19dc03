"""Cutting a token array into examples of one length, with random access by index.

Axes: B examples asked for at once, T positions. Every example holds

    tokens   [B, T] int32    the inputs
    targets  [B, T] int32    the token after each input
    weights  [B, T] float32  1 where the target counts, 0 at padding

and, where documents are kept apart,

    segments  [B, T] int32   which piece a position belongs to: 1, 2, ... from the first position on; 0 at padding, after them
    positions [B, T] int32   the position within its piece, from 0

to which the loader adds

    lengths   [B, M] int32   the size of each piece; 0 after a row's last one (`with_lengths`)

Over all examples, every predicted token of the array is a target once; packed documents begin with an end of text.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from train.data.examples.draws import Draws
from train.data.prepared.store import TokenArray
from train.files import whole_file
from transformer.errors import UserError

Packing = Literal["chunk", "documents", "pad"]

_WINDOW = 1 << 20  # document remainders that are packed together: bounds the memory that packing takes
_INDEX_VERSION = 1


class Examples(abc.ABC):
    """The examples of one token array. `len` is their number."""

    _bounds = np.array([0, 1])
    """[rows + 1]: row r has the documents from `bounds[r]` to `bounds[r + 1]`; where none are packed, that of any row."""

    def __init__(self, array: TokenArray, length: int) -> None:
        self.length = length
        self._tokens = np.asarray(array.tokens)  # a plain view: indexing a memmap is several times slower

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        """The examples at `indices` [B] int64, each in [0, len): arrays [B, T] as the module describes.

        `draws` has a stream of random numbers for each row, for an objective that takes any.
        """

    @functools.cached_property
    def most_documents(self) -> int:
        """The greatest number of documents of a row."""
        return int(np.diff(self._bounds).max(initial=1))

    @property
    @abc.abstractmethod
    def efficiency(self) -> float:
        """The fraction of positions that hold a token of text; the rest is padding."""

    @property
    def source_efficiency(self) -> float | None:
        """The same for the source, if there is one."""
        return None


class Chunked(Examples):
    """Example i is `length` tokens from i * length on, wherever documents begin and end.

    The remainder at the end is dropped for training; with `keep_rest` it becomes one more, padded example.
    """

    def __init__(self, array: TokenArray, length: int, *, keep_rest: bool = False) -> None:
        super().__init__(array, length)
        self._targets = len(self._tokens) - 1
        self._len = -(-self._targets // length) if keep_rest else self._targets // length

    def __len__(self) -> int:
        return self._len

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
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
    """Whole documents packed into examples, longer ones cut into pieces; no target is in another document.

    Fitting is best-fit decreasing. The index is stored next to the tokens, so that a later run maps it into memory.
    """

    def __init__(self, array: TokenArray, length: int) -> None:
        super().__init__(array, length)
        index = self._index(array)
        self._starts, self._lengths = index[:, 0], index[:, 1]
        count = int(index[-1, 2]) + 1 if len(index) else 0
        self._bounds = np.searchsorted(index[:, 2], np.arange(count + 1))

    def _index(self, array: TokenArray) -> np.ndarray:
        """The pieces [P, 3] as `fit_documents` gives them."""
        name = f"fit{_INDEX_VERSION}-{self.length}"
        return kept_index(array, name, lambda: fit_documents(array.offsets, self.length))

    def _weights(self, targets: np.ndarray) -> np.ndarray | np.float32:
        """The weights [N] of the targets, given by their places among the array's tokens."""
        return np.float32(1)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        placed = Placed.at(self._bounds, self._lengths, indices, self.length)
        source = np.repeat(self._starts[placed.pieces], placed.sizes) + placed.positions
        return {
            "tokens": placed.spread(self._tokens[source]),
            "targets": placed.spread(self._tokens[source + 1]),
            "weights": placed.spread(self._weights(source + 1)),
            **placed.places(),
        }

    @property
    def efficiency(self) -> float:
        return int(self._lengths.sum()) / max(1, len(self) * self.length)


@dataclass(frozen=True, eq=False)
class Placed:
    """The positions of the pieces' tokens in the rows of a batch. P pieces in B rows of T positions, N tokens in all."""

    pieces: np.ndarray
    """[P], row by row."""
    sizes: np.ndarray
    """[P], in tokens."""
    segments: np.ndarray
    """[N], from 1 in each row."""
    positions: np.ndarray
    """[N], from 0 in each piece."""
    flat: np.ndarray
    """[N], each token's index in [B · T]."""
    shape: tuple[int, int]
    """(B, T)."""

    @classmethod
    def at(cls, bounds: np.ndarray, sizes: np.ndarray, rows: np.ndarray, length: int) -> Placed:
        """Rows r of `rows` [B] hold the pieces `bounds[r]` to `bounds[r + 1]`, whose sizes are in `sizes`."""
        first, counts = bounds[rows], bounds[rows + 1] - bounds[rows]
        return cls.of(np.repeat(first, counts) + place_in_group(counts), counts, sizes, length)

    @classmethod
    def of(cls, pieces: np.ndarray, counts: np.ndarray, sizes: np.ndarray, length: int) -> Placed:
        """The first `counts[0]` of `pieces` [P] are in row 0, and so on; `sizes` has the sizes of all existing pieces."""
        # From rows to pieces, then from pieces to tokens, each time by repeating what a group shares and adding
        # the index within the group: no Python loop, however short the documents are.
        rows = np.repeat(np.arange(len(counts)), counts)
        sizes = sizes[pieces]
        before = np.cumsum(sizes) - sizes  # tokens of all pieces before, whose first in the row is the row's own start
        row_starts = (np.cumsum(counts) - counts)[counts > 0]
        columns = before - np.repeat(before[row_starts], counts[counts > 0])
        positions = place_in_group(sizes)
        flat = np.repeat(rows * length + columns, sizes) + positions
        segments = np.repeat(place_in_group(counts) + 1, sizes)
        return cls(pieces, sizes, segments, positions, flat, (len(counts), length))

    def spread(self, values: np.ndarray | np.float32) -> np.ndarray:
        """The tokens' values [N] at their positions: [B, T], 0 elsewhere; float32 for floats, else int32."""
        rows = np.zeros(self.shape, np.float32 if values.dtype == np.float32 else np.int32)
        rows.reshape(-1)[self.flat] = values
        return rows

    def places(self, prefix: str = "") -> dict[str, np.ndarray]:
        """The arrays `segments` and `positions`."""
        return {
            f"{prefix}segments": self.spread(self.segments),
            f"{prefix}positions": self.spread(self.positions),
        }


def room_for(most_documents: int) -> int:
    """The M of `lengths`: a multiple of 8 unless it is 1, so that data that differs little has the same programs."""
    return 1 if most_documents <= 1 else -(-most_documents // 8) * 8


def lengths_name(name: str) -> str | None:
    """The name of the `lengths` of an array of segments; None for any other array."""
    return f"{name.removesuffix('segments')}lengths" if name.endswith("segments") else None


def with_lengths(batch: dict[str, np.ndarray], most_documents: int) -> dict[str, np.ndarray]:
    """The batch, with `lengths` for each of its `segments`: where documents begin is needed once a batch, not in each layer.

    Args:
        most_documents: of any row, for which `lengths` has `room_for`.
    """
    M, lengths = room_for(most_documents), {}
    for name, segments in batch.items():
        if (of := lengths_name(name)) is not None:
            *rows, size = segments.shape
            flat = segments.reshape(-1, size)
            places = np.arange(len(flat))[:, None] * (M + 1) + flat
            counts = np.bincount(places.reshape(-1), minlength=len(flat) * (M + 1)).reshape(*rows, M + 1)
            lengths[of] = np.ascontiguousarray(counts[..., 1:], np.int32)
    return batch | lengths


def examples(array: TokenArray, packing: Packing, length: int, *, training: bool) -> Examples:
    """The examples of an array. Raises `UserError` if there is too little text to train on sequences of `length`."""
    predicted = len(array.tokens) - 1
    if training and predicted < length:
        raise UserError(
            f"{array.name}: {predicted} tokens are fewer than one sequence of {length}; "
            "add text or make the sequences shorter"
        )
    return Documents(array, length) if packing == "documents" else Chunked(array, length, keep_rest=not training)


def fit_documents(offsets: np.ndarray, length: int) -> np.ndarray:
    """Pack documents into examples: [P, 3] int64, for each piece its first input, its size and its example.

    `offsets` [documents + 1] is `TokenArray.offsets`. Pieces are sorted by example.
    """
    return fit_pieces(offsets[:-1] - 1, np.diff(offsets), length)


def fit_pieces(starts: np.ndarray, sizes: np.ndarray, length: int, *, extra: int = 0) -> np.ndarray:
    """Pack texts of these `starts` and `sizes` [documents] into examples of `length`: [P, 3] as `fit_documents`.

    A text longer than an example gives full examples and a remainder; remainders and shorter texts are packed
    together, largest first, each into the fullest example that still has room. Each piece takes `extra` positions
    in addition to its own tokens.
    """
    room = length - extra
    full = sizes // room
    full_starts = np.repeat(starts, full) + room * place_in_group(full)
    parts = [np.stack([full_starts, np.full_like(full_starts, room), np.arange(len(full_starts))], axis=1)]
    count = len(full_starts)

    rest = sizes % room
    rest_starts, rest = (starts + full * room)[rest > 0], rest[rest > 0]
    for begin in range(0, len(rest), _WINDOW):
        window = slice(begin, begin + _WINDOW)
        bins = best_fit_decreasing(rest[window] + extra, length)
        order = np.argsort(bins, kind="stable")
        parts.append(np.stack([rest_starts[window], rest[window], bins + count], axis=1)[order])
        count += int(bins.max()) + 1
    return np.concatenate(parts).astype(np.int64)


def best_fit_decreasing(sizes: np.ndarray, room: int) -> np.ndarray:
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


def place_in_group(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... within each of consecutive groups of these sizes: [2, 3] gives 0 1 0 1 2."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)


def kept_index(array: TokenArray, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` returns, read from the file `name` next to the tokens if it exists."""
    if array.index_path is None:
        return make()
    path = Path(f"{array.index_path}.{name}.npy")
    if not path.is_file():
        index = make()
        # Storing the index only saves time: if the folder is not writable, each run makes it again.
        with contextlib.suppress(OSError), whole_file(path) as unfinished, unfinished.open("wb") as stream:
            np.save(stream, index)
        return index
    return np.asarray(np.load(path, mmap_mode="r"))
