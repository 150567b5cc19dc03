"""Examples of documents with a class: one a row, for an encoder with a head over whole rows.

Axes: B examples asked for at once, T positions. Every example holds

    tokens            [B, T] int32    `[CLS]`, the text, `[SEP]` (Devlin et al. 2018, section 4.1)
    segments          [B, T] int32    1 where it stands, 0 at padding
    positions         [B, T] int32    0, 1, ...; 0 at padding
    labels            [B] int32       the class, by its number in `Meta.labels`
    weights           [B, 1] float32  1: a row is one thing to predict
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train.data.draws import Draws
from train.data.masked import framed_apart
from train.data.objective_config import ObjectiveConfig
from train.data.pack import Examples
from train.data.progress import say_once
from train.data.store import TokenArray
from train.data.tokenizer import CLS, SEP, Tokenizer
from transformer.errors import UserError


class LabelledDocuments(Examples):
    """The documents of an array, in its order; those that are too long for a row are left out, or their ends are."""

    def __init__(
        self,
        array: TokenArray,
        tokenizer: Tokenizer,
        length: int,
        objective: ObjectiveConfig,
        *,
        shown: bool = False,
    ) -> None:
        """`shown` says how many are too long. Raises `UserError` if no document is short enough."""
        super().__init__(array, length)
        assert array.labels is not None
        self._cls, self._sep = tokenizer.special_ids[CLS], tokenizer.special_ids[SEP]
        sizes = np.diff(array.offsets) + 1  # without the end of text, with both special tokens
        fits = sizes <= length
        too_long, drops = int(np.sum(~fits)), objective.too_long == "drop"
        if drops and too_long == len(fits):
            raise UserError(
                f"{array.name}: none of {too_long} documents fits a row of {length} tokens; make length larger, or set "
                "objective.too_long: truncate"
            )
        if too_long and shown:
            say_once(
                f"{array.name}: {too_long} of {len(fits)} documents are longer than {length} tokens with [CLS] and "
                f"[SEP]: {'left out' if drops else 'cut'}"
            )
        kept = np.flatnonzero(fits) if drops else np.arange(len(fits))
        self._starts, self._labels = np.asarray(array.offsets)[kept], np.asarray(array.labels)[kept]
        self._sizes = np.minimum(sizes, length)[kept]

    def __len__(self) -> int:
        return len(self._sizes)

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        return {
            **framed_apart(self._tokens, self._starts, self._sizes, indices, self.length, self._cls, self._sep),
            "labels": self._labels[indices],
            "weights": np.ones((len(indices), 1), np.float32),
        }

    @property
    def efficiency(self) -> float:
        return int(self._sizes.sum()) / max(1, len(self) * self.length)


def commonest_share(arrays: Sequence[TokenArray]) -> float | None:
    """The part of the documents that are of their commonest class, which a guess would reach; None without classes."""
    labels = [array.labels for array in arrays if array.labels is not None]
    return float(np.bincount(np.concatenate(labels)).max() / sum(map(len, labels))) if labels else None
