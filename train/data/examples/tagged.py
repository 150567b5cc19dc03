"""Examples of words with tags: one text per row.

Axes: B examples asked for at once, T positions. Every example holds the arrays of `train.data.examples.rows` and

    targets           [B, T] int32    the tag of each word at its first token, by its number in `Meta.labels`; else 0
    weights           [B, T] float32  1 there, else 0: the rest of a word has no tag (Devlin et al. 2018, section 5.3)
"""

from __future__ import annotations

import numpy as np

from train.data.examples.draws import Draws
from train.data.examples.rows import Stretches, TaskRows, TooLong, fitting, text_sizes
from train.data.prepared.label_arrays import NONE
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer


class TaggedWords(TaskRows):
    """The texts of an array, in its order; those too long for a row are left out, or lose their last words."""

    def __init__(
        self,
        array: TokenArray,
        tokenizer: Tokenizer,
        length: int,
        too_long: TooLong,
        *,
        shown: bool = False,
    ) -> None:
        """`shown` says how many are too long. Raises `UserError` if no text is short enough."""
        super().__init__(array, tokenizer, length)
        sizes = text_sizes(array)
        self.documents, self.too_long = fitting(array, sizes + 2, length, too_long, shown=shown)
        text = Stretches.of(array, self.documents, np.minimum(sizes[self.documents], length - 2))
        self.sides = [text]
        # Stored like tokens, so that they are laid out the same way.
        tags = np.full(len(array.tokens), NONE, np.int32) if array.labels is None else np.asarray(array.labels)
        self._tags = Stretches(tags + 1, text.starts, text.sizes)

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        batch = self.rows(self.sides, indices)
        tags = self.rows([self._tags], indices)["tokens"]
        inside = (batch["positions"] > 0) & (batch["positions"] <= self.sides[0].sizes[indices][:, None])
        tags = np.where(inside, tags - 1, NONE)
        return batch | {
            "targets": np.maximum(tags, 0).astype(np.int32), "weights": (tags != NONE).astype(np.float32)
        }  # fmt: skip

    def size(self, index: int) -> int:
        """How many tokens of its text each example has."""
        return int(self.sides[0].sizes[index])


def tokens_per_word(array: TokenArray) -> float:
    """How many tokens there are for each word that has a tag."""
    assert array.labels is not None
    return len(array.tokens) / max(1, int(np.sum(array.labels != NONE)))
