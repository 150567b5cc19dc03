"""Examples of pairs of texts that mean the same, or belong together: one pair a row, each side for the same encoder.

Axes: B examples asked for at once, T positions. Every example holds

    tokens            [B, T] int32    `[CLS]`, the first text, `[SEP]`
    segments          [B, T] int32    1 where it stands, 0 at padding
    positions         [B, T] int32    0, 1, ...; 0 at padding
    other_tokens, other_segments, other_positions   the same of the second text
    weights           [B, 1] float32  1: a row is one thing to predict
"""

from __future__ import annotations

import dataclasses

import numpy as np

from train.data.draws import Draws
from train.data.masked import framed_apart
from train.data.objective_config import ObjectiveConfig
from train.data.pack import Examples
from train.data.pairs import PairSizes
from train.data.store import TokenArray
from train.data.tokenizer import CLS, SEP, Tokenizer


class TextPairs(Examples):
    """The pairs of an array, in its order; those with a side that is too long for a row are left out, or its end is."""

    def __init__(
        self,
        array: TokenArray,
        tokenizer: Tokenizer,
        length: int,
        objective: ObjectiveConfig,
        *,
        shown: bool = False,
    ) -> None:
        """`shown` says how many are too long. Raises `UserError` if no pair is short enough."""
        super().__init__(array, length)
        assert array.target is not None
        self._cls, self._sep = tokenizer.special_ids[CLS], tokenizer.special_ids[SEP]
        # An end of text is counted there, in whose place `[SEP]` stands here; `[CLS]` comes in front.
        both = dataclasses.replace(objective, source_length=None, target_length=None)
        sizes = PairSizes.of(array, both, length - 1, shown=shown)
        self._sides = {
            prefix: (np.asarray(side.tokens), np.asarray(side.offsets)[sizes.pairs], counts + 1)
            for prefix, side, counts in (("", array, sizes.source), ("other_", array.target, sizes.target))
        }
        self._count = len(sizes)

    def __len__(self) -> int:
        return self._count

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        batch = {"weights": np.ones((len(indices), 1), np.float32)}
        for prefix, (tokens, starts, sizes) in self._sides.items():
            rows = framed_apart(tokens, starts, sizes, indices, self.length, self._cls, self._sep)
            batch |= {prefix + name: array for name, array in rows.items()}
        return batch

    @property
    def efficiency(self) -> float:
        used = sum(int(sizes.sum()) for _, _, sizes in self._sides.values())
        return used / max(1, 2 * len(self) * self.length)
