"""Random numbers of a row: a function of the seed and the row's number, independent of process and time.

Axes: B rows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np


class Draws:
    """One stream of random numbers per row, by the counter-based Philox (Salmon et al. 2011).

    Rows are numbered by their place in the global order in training, so that an example is corrupted differently each
    time it comes, and by their example in validation, so that it is always the same.
    """

    def __init__(self, key: np.uint64, numbers: np.ndarray) -> None:
        """`key` comes from `draw_key`; each of `numbers` [B] int64, 0 or more, has its own stream."""
        self._key, self._numbers = key, numbers
        self._streams: list[np.random.Generator] | None = None

    def rows(self, rows: np.ndarray) -> Draws:
        """The streams of some of the rows, from their beginning."""
        return Draws(self._key, self._numbers[rows])

    def uniform(self, count: int) -> np.ndarray:
        """The next `count` numbers of each row: [B, count] float64 in [0, 1)."""
        if self._streams is None:
            keys = np.stack([np.full(len(self._numbers), self._key), self._numbers.astype(np.uint64)], axis=1)
            self._streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        drawn = np.empty((len(self._streams), count))
        for row, stream in zip(drawn, self._streams, strict=True):
            stream.random(out=row)
        return drawn


def draw_key(seed: int, purpose: Literal["train", "validation", "buckets"]) -> np.uint64:
    """A key that differs from those of other seeds and purposes."""
    number = ("train", "validation", "buckets").index(purpose)
    return np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
