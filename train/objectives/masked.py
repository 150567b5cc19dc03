"""Masked language modelling: predicting hidden tokens (Devlin et al. 2018, section 3.1).

Axes: B rows, T positions, K of them that may be predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from train.data.examples.masked import MaskedChunks, MaskedDocuments, MaskingRule
from train.data.examples.pack import Examples, Packing
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.tokenization.tokenizer import CLS, MASK, SEP, Tokenizer
from train.data.tokenization.words import WordPieces
from train.loss import Batch, LossConfig, LossSums, of_tokens
from train.objectives.objective import BatchShapes, Objective, places_of, row_shapes, weight_shape
from transformer.errors import require
from transformer.types import Array, Keys


@dataclass(frozen=True, kw_only=True)
class HiddenTokens(Objective):
    """Base class of objectives that hide tokens."""

    mask_rate: float = 0.15
    """The fraction of tokens to predict."""
    mask_share: float = 0.8
    """The fraction of those that `[MASK]` replaces."""
    random_share: float = 0.1
    """The fraction of those that a random token replaces; the rest are unchanged."""
    whole_word: bool = False
    """Predict all tokens of a word, or none."""
    ngram: int = 1
    """The most tokens (or words) in a row that are predicted together; the lengths are geometric with p = 0.2, as in SpanBERT,
    where this is 10."""

    families = ("bert",)
    least_length = 3
    unit = "hidden tok"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "mask_rate", 0 < self.mask_rate < 1, "allowed: above 0, below 1")
        require(self, "mask_share", 0 <= self.mask_share <= 1, "allowed: 0 to 1")
        holds = self.random_share >= 0 and self.mask_share + self.random_share <= 1 + 1e-9
        require(self, "random_share", holds, f"allowed: 0 to 1 - mask_share ({1 - self.mask_share:g})")
        require(self, "ngram", self.ngram >= 1, "allowed: 1 or more")

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return (MASK, CLS, SEP)

    @property
    def rule(self) -> MaskingRule:
        """Which tokens are hidden."""
        return MaskingRule(
            rate=self.mask_rate, mask_share=self.mask_share, random_share=self.random_share, whole_word=self.whole_word,
            ngram=self.ngram,
        )  # fmt: skip

    def _check_text(self, prepared: Prepared, length: int) -> None:
        if self.whole_word:
            WordPieces(prepared.tokenizer)

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        if packing == "documents":
            return MaskedDocuments(array, tokenizer, length, self.rule)
        return MaskedChunks(array, tokenizer, length, self.rule, keep_rest=not training)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        names = ("tokens", "targets", "segments", "positions")
        predicted = row_shapes(rows, self.rule.most_predicted(length), ("predicted",))
        return row_shapes(rows, length, names) | weight_shape(rows, length) | predicted

    def tokens_per_prediction(self, prepared: Prepared, tokens_per_example: int) -> float:
        return 1 / self.mask_rate


@dataclass(frozen=True, kw_only=True)
class Masked(HiddenTokens):
    """Predicts masked tokens (BERT, RoBERTa)."""

    kind: Literal["masked"] = "masked"

    heads = ("masked",)

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """The mean over the hidden tokens, whose `weights` [B, T] are 1. All of them are among `predicted` [B, K]; only these
        are scored."""
        output = model(
            batch["tokens"], **places_of(batch),
            predicted_BK=batch["predicted"], key=key,
        )  # fmt: skip
        return of_tokens(model, output, at_places(batch, batch["predicted"]), config)


def at_places(batch: Batch, places_BK: Array) -> Batch:
    """Targets and weights [B, K] at the given positions of each row."""
    return {name: jnp.take_along_axis(batch[name], places_BK, axis=1) for name in ("targets", "weights")}
