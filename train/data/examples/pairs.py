"""Examples of pairs, such as a text and its translation: packed rows, or one pair per row in batches of similar length.

Axes: B rows, S positions of the source, T positions of what is predicted, N pairs. The arrays are those of
`train.data.examples.spans`; the source ends with its end of text. A pair has the same segment on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.data.examples.draws import Draws
from train.data.examples.pack import Examples, Placed, kept_index, place_in_group
from train.data.examples.pair_packing import fit_pairs
from train.data.prepared.store import TokenArray
from train.progress import say_once
from transformer.errors import UserError

_INDEX_VERSION = 1
_WIDTH_STEP = 8
_MANY = 1_000_000
"""Pairs whose packing takes some seconds, which is said."""


@dataclass(frozen=True, kw_only=True)
class PairLimits:
    """The greatest lengths of both sides of a pair, in tokens, ends of text included."""

    source: int
    target: int
    too_long: Literal["drop", "truncate"]
    """Whether a pair with a longer side is left out, or cut."""


@dataclass(frozen=True, eq=False)
class PairSizes:
    """The pairs of an array that are short enough, and how many tokens of each are used, ends of text included."""

    pairs: np.ndarray
    """[N] int64: which pairs of the array."""
    source: np.ndarray
    """[N] int64."""
    target: np.ndarray
    """[N] int64."""
    too_long: int
    """How many pairs were longer; they were left out or cut."""

    @classmethod
    def of(cls, array: TokenArray, limits: PairLimits, *, shown: bool) -> PairSizes:
        """Raises `UserError` if no pair is short enough."""
        assert array.target is not None
        source_room, target_room = limits.source, limits.target
        source, target = np.diff(array.offsets), np.diff(array.target.offsets)
        fits = (source <= source_room) & (target <= target_room)
        too_long = int(np.sum(~fits))
        drops = limits.too_long == "drop"
        if drops and too_long == len(fits):
            raise UserError(
                f"{array.name}: none of {too_long} pairs fits {source_room} tokens of source and {target_room} of "
                "target; make the lengths larger, or set objective.too_long: truncate"
            )
        if too_long and shown:
            what = "left out" if drops else "cut"
            say_once(
                f"{array.name}: {too_long} of {len(fits)} pairs are longer than {source_room} tokens of source or "
                f"{target_room} of target: {what}"
            )
        kept = np.flatnonzero(fits) if drops else np.arange(len(fits))
        return cls(kept, np.minimum(source, source_room)[kept], np.minimum(target, target_room)[kept], too_long)

    def __len__(self) -> int:
        return len(self.pairs)


class PairRows:
    """Lays pairs out in the rows of a batch."""

    def __init__(self, array: TokenArray, sizes: PairSizes) -> None:
        assert array.target is not None
        # Plain views: indexing a memmap is several times slower.
        self._source, self._target = np.asarray(array.tokens), np.asarray(array.target.tokens)
        self._source_starts = np.asarray(array.offsets)[sizes.pairs]
        self._target_starts = np.asarray(array.target.offsets)[sizes.pairs]
        self._sizes = sizes

    def lay_out(self, numbers: np.ndarray, counts: np.ndarray, source: int, length: int) -> dict[str, np.ndarray]:
        """Rows of `source` and `length` tokens: the first `counts[0]` of the pairs `numbers` in row 0, and so on."""
        read = Placed.of(numbers, counts, self._sizes.source, source)
        said = Placed.of(numbers, counts, self._sizes.target, length)
        from_target = np.repeat(self._target_starts[numbers], said.sizes) + said.positions
        source_tokens = self._source[np.repeat(self._source_starts[numbers], read.sizes) + read.positions]
        targets = self._target[from_target]
        # A pair that was cut also ends with an end of text.
        source_tokens[np.cumsum(read.sizes) - 1] = self._source[0]
        targets[np.cumsum(said.sizes) - 1] = self._target[0]
        return {
            "source_tokens": read.spread(source_tokens),
            **read.places("source_"),
            "tokens": said.spread(self._target[from_target - 1]),  # an end of text precedes each text
            "targets": said.spread(targets),
            "weights": said.spread(np.float32(1)),
            **said.places(),
        }


class PackedPairs(Examples):
    """Pairs packed into rows so that both sides fit. The index is stored next to the tokens."""

    def __init__(self, array: TokenArray, length: int, limits: PairLimits, *, shown: bool = False) -> None:
        """Rows of `limits.source` and `length` tokens."""
        super().__init__(array, length)
        self._source_length = limits.source
        self._sizes = PairSizes.of(array, limits, shown=shown)
        self._rows = PairRows(array, self._sizes)
        key = f"{limits.source}-{length}-{limits.target}-{limits.too_long}"

        def pack() -> np.ndarray:
            if shown and len(self._sizes) > _MANY:
                say_once(f"{array.name}: packing {len(self._sizes):,} pairs into rows")
            return fit_pairs(self._sizes.source, self._sizes.target, self._source_length, length)

        index = kept_index(array, f"fit-pairs{_INDEX_VERSION}-{key}", pack)
        self._numbers = index[:, 0]
        count = int(index[-1, 1]) + 1 if len(index) else 0
        self._bounds = np.searchsorted(index[:, 1], np.arange(count + 1))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        first, counts = self._bounds[indices], self._bounds[indices + 1] - self._bounds[indices]
        numbers = self._numbers[np.repeat(first, counts) + place_in_group(counts)]
        return self._rows.lay_out(numbers, counts, self._source_length, self.length)

    @property
    def efficiency(self) -> float:
        return int(self._sizes.target.sum()) / max(1, len(self) * self.length)

    @property
    def source_efficiency(self) -> float:
        return int(self._sizes.source.sum()) / max(1, len(self) * self._source_length)


def choose_widths(
    source: np.ndarray, target: np.ndarray, source_room: int, target_room: int, *, most: int
) -> np.ndarray:
    """Up to `most` widths for rows of one pair, [W, 2] int64 increasing on both sides, with the least total padding.

    Pairs are ordered by their longer side, and cut into groups by dynamic programming; a group is as wide as its
    longest pair, in steps of 8.
    """
    longer = np.maximum(source * (target.sum() / source.sum()), target)
    keys, groups = np.unique(np.ceil(longer / _WIDTH_STEP), return_inverse=True)
    wide = np.zeros((len(keys), 2), np.int64)
    for side, (sizes, room) in enumerate(((source, source_room), (target, target_room))):
        np.maximum.at(wide[:, side], groups, sizes)
        # Never narrower than the previous width, so that leftover pairs may move up.
        wide[:, side] = np.maximum.accumulate(np.minimum(-(-wide[:, side] // _WIDTH_STEP) * _WIDTH_STEP, room))
    before = np.concatenate([[0], np.cumsum(np.bincount(groups))])
    # cost[i, j]: positions of the keys i to j as one group.
    cost = np.where(np.tri(len(keys), dtype=bool).T, before[1:] - before[:-1, None], np.inf) * wide.sum(axis=1)
    best, cuts = cost[0], []
    for _ in range(min(most, len(keys)) - 1):
        total = np.vstack([np.full((1, len(keys)), np.inf), best[:-1, None] + cost[1:]])
        cuts.append(np.where(total.min(axis=0) < best, total.argmin(axis=0), 0))
        best = np.minimum(best, total.min(axis=0))
    ends = [len(keys) - 1]
    for cut in reversed(cuts):
        if (begin := int(cut[ends[-1]])) > 0:
            ends.append(begin - 1)
    return wide[ends[::-1]]
