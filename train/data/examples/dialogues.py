"""Whole dialogues packed into rows, of which only what the assistant says is predicted.

Axes: B rows, T positions. The arrays are those of `train.data.examples.pack`; the weight of a target is 1 if the assistant writes
it. A dialogue begins with the first token of its chat template, which is not predicted: no end of text is put around it.
"""

from __future__ import annotations

import numpy as np

from train.data.examples.pack import Documents, fit_pieces, kept_index
from train.data.examples.rows import TooLong
from train.data.prepared.store import TokenArray
from train.progress import say_once
from transformer.errors import UserError

_INDEX_VERSION = 1


class Dialogues(Documents):
    """The dialogues of an array; those that are too long for a row are left out, or lose their end.

    One of which nothing that the assistant says is left is left out. The index is stored next to the tokens.
    """

    def __init__(self, array: TokenArray, length: int, too_long: TooLong, *, shown: bool = False) -> None:
        """`shown` says how many are too long. Raises `UserError` if nothing is left to predict."""
        assert array.labels is not None
        self._said, self._too_long, self._shown = np.asarray(array.labels), too_long, shown
        super().__init__(array, length)

    def _index(self, array: TokenArray) -> np.ndarray:
        starts, sizes = np.asarray(array.offsets)[:-1], np.diff(array.offsets) - 2
        count, drops = int(np.sum(sizes > self.length)), self._too_long == "drop"
        if count and self._shown:
            say_once(
                f"{array.name}: {count} of {len(sizes)} dialogues are longer than {self.length + 1} tokens: "
                f"{'left out' if drops else 'cut'}"
            )

        def pack() -> np.ndarray:
            kept = sizes <= self.length if drops else np.ones(len(sizes), bool)
            cut = np.minimum(sizes, self.length)
            before = np.concatenate([[0], np.cumsum(self._said, dtype=np.int64)])
            # The first token has none before it to be predicted from.
            kept &= before[starts + np.maximum(cut, 0) + 1] > before[starts + 1]
            return fit_pieces(starts[kept], cut[kept], self.length)

        index = kept_index(array, f"fit-dialogues{_INDEX_VERSION}-{self.length}-{self._too_long}", pack)
        if not len(index):
            raise UserError(
                f"{array.name}: none of {len(sizes)} dialogues has anything to predict in {self.length + 1} tokens; make length "
                "larger, or set objective.too_long: truncate"
            )
        return index

    def _weights(self, targets: np.ndarray) -> np.ndarray:
        return self._said[targets].astype(np.float32)


def tokens_per_target(array: TokenArray) -> float:
    """How many tokens there are for each that is predicted."""
    assert array.labels is not None
    return len(array.tokens) / max(1, int(np.count_nonzero(array.labels)))
