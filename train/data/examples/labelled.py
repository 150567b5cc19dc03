"""Examples of documents with a class, several classes or a number: one document, or one pair, per row.

Axes: B examples asked for at once. Every example holds the arrays of `train.data.examples.rows` and

    labels            [B] int32       the class, by its number in `Meta.labels`; or
                          float32     the number; or
                      [B, C] int32    1 for each of its classes, else 0
    weights           [B, 1] float32  1: a row is one prediction
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train.data.examples.draws import Draws
from train.data.examples.rows import Stretches, TaskRows, TooLong, fitting, longest_first, one_each, text_sizes
from train.data.prepared.label_arrays import NONE
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer


class LabelledDocuments(TaskRows):
    """The documents of an array, in its order; those too long for a row are left out or cut.

    The longer side of a pair is cut first, as by Hugging Face's `longest_first`.
    """

    def __init__(
        self,
        array: TokenArray,
        tokenizer: Tokenizer,
        length: int,
        too_long: TooLong,
        *,
        numbers: bool = False,
        several: bool = False,
        shown: bool = False,
    ) -> None:
        """`numbers`: the labels are numbers, not classes; `several`: a document may have several classes; `shown` says how many
        documents are too long.

        Raises `UserError` if no document is short enough.
        """
        super().__init__(array, tokenizer, length)
        sides = [array] if array.target is None else [array, array.target]
        sizes = [text_sizes(side) for side in sides]
        whole = np.sum(sizes, axis=0) + self.frame(len(sides))
        self.documents, self.too_long = fitting(array, whole, length, too_long, shown=shown)
        sizes = [side[self.documents] for side in sizes]
        room = length - self.frame(len(sides))
        taken = [np.minimum(sizes[0], room)] if len(sides) == 1 else longest_first(sizes[0], sizes[1], room)
        self.sides = [Stretches.of(side, self.documents, size) for side, size in zip(sides, taken, strict=True)]
        kind = np.float32 if numbers else np.int32
        shape = (array.documents, 1) if several else array.documents
        labels = np.full(shape, NONE, kind) if array.labels is None else np.asarray(array.labels).astype(kind)
        self._labels = labels[self.documents]

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        labels = {"labels": self._labels[indices], "weights": one_each(len(indices))}
        return self.rows(self.sides, indices) | labels


def commonest_share(arrays: Sequence[TokenArray]) -> float | None:
    """The share of the commonest class, which is the accuracy of a constant guess; None without classes."""
    labels = [array.labels for array in arrays if array.labels is not None]
    return float(np.bincount(np.concatenate(labels)).max() / sum(map(len, labels))) if labels else None
