"""Examples of a text and several choices, one of which continues it: one row for each choice.

Axes: B examples asked for at once, Q choices, T positions. Every example holds the arrays of `rows`, each [B, Q, T],
and

    labels            [B] int32       the number of the correct choice
    weights           [B, 1] float32  1: the choice is one prediction
"""

from __future__ import annotations

import numpy as np

from train.data.examples.draws import Draws
from train.data.examples.rows import Stretches, TaskRows, TooLong, fitting, longest_first, one_each, text_sizes
from train.data.prepared.label_arrays import NONE
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer


class Choices(TaskRows):
    """The documents of an array, in its order; those too long with any choice are left out, or cut as pairs are."""

    def __init__(
        self,
        array: TokenArray,
        tokenizer: Tokenizer,
        length: int,
        too_long: TooLong,
        *,
        shown: bool = False,
    ) -> None:
        """`shown` says how many are too long. Raises `UserError` if no document is short enough."""
        super().__init__(array, tokenizer, length)
        assert array.target is not None
        self._count = array.others
        text, choices = text_sizes(array), text_sizes(array.target).reshape(-1, self._count)
        self.documents, self.too_long = fitting(
            array, text + choices.max(axis=1, initial=0) + self.frame(2), length, too_long, shown=shown
        )
        rows = (self.documents[:, None] * self._count + np.arange(self._count)).reshape(-1)
        owners = np.repeat(self.documents, self._count)
        first, second = longest_first(text[owners], choices.reshape(-1)[rows], length - self.frame(2))
        self.sides = [Stretches.of(array, owners, first), Stretches.of(array.target, rows, second)]
        labels = np.full(array.documents, NONE, np.int32) if array.labels is None else np.asarray(array.labels)
        self._labels = labels[self.documents]

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        numbers = (indices[:, None] * self._count + np.arange(self._count)).reshape(-1)
        batch = self.rows(self.sides, numbers)
        shape = (len(indices), self._count, self.length)
        labels = {"labels": self._labels[indices], "weights": one_each(len(indices))}
        return {name: rows.reshape(shape) for name, rows in batch.items()} | labels
