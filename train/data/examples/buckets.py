"""Batches of pairs of similar length, one pair a row, in a few shapes.

Pairs are sorted into buckets by length. An epoch shuffles each bucket, cuts it into batches, and shuffles those; the few
pairs that do not fill a batch move up into the next bucket, and those of the last are a batch with empty rows. So every
pair occurs once per epoch, and what a step sees is a function of (seed, step) alone.

Axes: N pairs, W widths.
"""

from __future__ import annotations

import threading

import numpy as np

from train.data.examples.draws import draw_key
from train.data.examples.pairs import PairLimits, PairRows, PairSizes, choose_widths
from train.data.prepared.store import TokenArray


class Buckets:
    """The batches of one array of pairs, by epoch and place."""

    def __init__(
        self,
        array: TokenArray,
        length: int,
        limits: PairLimits,
        batch_size: int,
        seed: int,
        *,
        max_shapes: int,
        shown: bool,
    ) -> None:
        """At most `max_shapes` shapes, none wider than `limits.source` and `length` tokens; `seed` decides the order.

        Raises `UserError` if no pair is short enough.
        """
        sizes = PairSizes.of(array, limits, shown=shown)
        self.widths = choose_widths(sizes.source, sizes.target, limits.source, length, most=max_shapes)
        """[W, 2] int64: the widths of source and target that batches come in."""
        self._sizes, self._rows = sizes, PairRows(array, sizes)
        self._batch_size, self._key = batch_size, draw_key(seed, "buckets")
        fits = (sizes.source[:, None] <= self.widths[:, 0]) & (sizes.target[:, None] <= self.widths[:, 1])
        bucket = fits.argmax(axis=1)
        self._members = [np.flatnonzero(bucket == number) for number in range(len(self.widths))]
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self._sizes)

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return -(-len(self) // self._batch_size)

    def numbers(self, epoch: int, place: int) -> tuple[int, np.ndarray]:
        """The width of a batch, and its pairs [batch_size] int64, -1 for an empty row."""
        with self._lock:
            if epoch not in self._plans:
                if len(self._plans) > 1:  # threads may still ask for the epoch before
                    del self._plans[min(self._plans)]
                self._plans[epoch] = self._plan(epoch)
            widths, numbers = self._plans[epoch]
        return int(widths[place]), numbers[place]

    def gather(self, width: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The batch rows of the pairs with these numbers [B]; -1 is an empty row."""
        inside = numbers >= 0
        source, length = self.widths[width].tolist()
        return self._rows.lay_out(numbers[inside], inside.astype(np.int64), source, length)

    @property
    def efficiency(self) -> tuple[float, float]:
        """The fractions of source positions and of target positions that hold a token of text."""
        widths, _ = self._plan(0)
        positions = self._batch_size * self.widths[widths].sum(axis=0)
        return int(self._sizes.source.sum()) / int(positions[0]), int(self._sizes.target.sum()) / int(positions[1])

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The width [batches] and the pairs [batches, batch_size] of each batch of an epoch."""
        random = np.random.Generator(np.random.Philox(key=np.array([self._key, epoch], np.uint64)))
        size = self._batch_size
        widths: list[np.ndarray] = []
        batches: list[np.ndarray] = []
        waiting = np.zeros(0, np.int64)
        for number, members in enumerate(self._members):
            # Pairs that moved up come first, so that none moves up twice while there are others.
            waiting = np.concatenate([waiting, random.permutation(members)])
            whole = len(waiting) // size
            batches.append(waiting[: whole * size].reshape(whole, size))
            widths.append(np.full(whole, number))
            waiting = waiting[whole * size :]
        if len(waiting):
            batches.append(np.pad(waiting, (0, size - len(waiting)), constant_values=-1)[None])
            widths.append(np.array([len(self.widths) - 1]))
        order = random.permutation(sum(map(len, widths)))
        return np.concatenate(widths)[order], np.concatenate(batches)[order]
