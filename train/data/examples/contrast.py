"""Examples of pairs of texts that mean the same, or belong together: one pair a row, each side for the same encoder.

Axes: B examples asked for at once, T positions. Every example holds

    tokens            [B, T] int32    `[CLS]`, the first text, `[SEP]`
    segments          [B, T] int32    1 at tokens, 0 at padding
    positions         [B, T] int32    0, 1, ...; 0 at padding
    other_tokens, other_segments, other_positions   the same for the second text
    weights           [B, 1] float32  1: a row is one prediction
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from train.data.examples.draws import Draws
from train.data.examples.pairs import PairLimits, PairSizes
from train.data.examples.rows import Stretches, TaskRows, one_each
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer


class TextPairs(TaskRows):
    """The pairs of an array, in its order; those with a side too long for a row are left out, or that side is cut."""

    def __init__(
        self,
        array: TokenArray,
        tokenizer: Tokenizer,
        length: int,
        too_long: Literal["drop", "truncate"],
        *,
        shown: bool = False,
    ) -> None:
        """`shown` says how many are too long. Raises `UserError` if no pair is short enough."""
        super().__init__(array, tokenizer, length)
        assert array.target is not None
        # The sizes there count an end of text, which `[SEP]` replaces here; `[CLS]` is prepended.
        limits = PairLimits(source=length - 1, target=length - 1, too_long=too_long)
        sizes = PairSizes.of(array, limits, shown=shown)
        self.documents = sizes.pairs
        self.sides = [
            Stretches.of(side, sizes.pairs, counts - 1)
            for side, counts in ((array, sizes.source), (array.target, sizes.target))
        ]

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        batch = {"weights": one_each(len(indices))}
        for prefix, side in zip(("", "other_"), self.sides, strict=True):
            batch |= {prefix + name: array for name, array in self.rows([side], indices).items()}
        return batch

    @property
    def efficiency(self) -> float:
        # Each side is a separate row, with both special tokens.
        used = sum(int(side.sizes.sum()) + self.frame(1) * len(self) for side in self.sides)
        return used / max(1, 2 * len(self) * self.length)
