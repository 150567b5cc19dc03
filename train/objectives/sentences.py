"""Masked language modelling with a second task: whether two stretches of text follow each other, or are in order.

Axes: B rows, T positions, K of them that may be predicted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from train.data.examples.masked import SentencePairs
from train.data.examples.pack import Examples, Packing
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums, cross_entropy, of_tokens
from train.objectives.masked import HiddenTokens, at_places
from train.objectives.objective import BatchShapes, label_shape, places_of, row_shapes
from transformer.errors import UserError
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class TwoStretches(HiddenTokens):
    """Base class of both objectives."""

    swaps: ClassVar[bool]
    """Whether the two stretches are swapped, instead of the second coming from another document."""
    heads = ("pretraining",)
    least_length = 5

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return SentencePairs(array, tokenizer, length, self.rule, swaps=self.swaps)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        return super().batch(rows, length, data) | row_shapes(rows, length, ("token_types",)) | label_shape(rows)

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """The loss of the hidden tokens, as in `Masked`, and the cross-entropy of `labels` [B], which is a mean over rows."""
        output = model(
            batch["tokens"], **places_of(batch),
            token_types_BT=batch["token_types"], predicted_BK=batch["predicted"], key=key,
        )  # fmt: skip
        sums = of_tokens(model, output, at_places(batch, batch["predicted"]), config)
        with jax.named_scope("sentence_loss"):
            # A mean over rows is added to a mean over tokens, so the tokens' weight scales it. A row of padding has label -1.
            rows = (batch["labels"] >= 0).astype(jnp.float32)
            sentence = cross_entropy(
                output.pooled_logits[:, None], batch["labels"][:, None], rows[:, None], LossConfig()
            )
            added = sentence.loss / jnp.maximum(sentence.weight, 1) * sums.weight
            return dataclasses.replace(sums, loss=sums.loss + added)


@dataclass(frozen=True, kw_only=True)
class NextSentence(TwoStretches):
    """Predicts masked tokens, and whether one stretch of text follows the other (BERT)."""

    kind: Literal["next_sentence"] = "next_sentence"

    swaps = False

    def _check_text(self, prepared: Prepared, length: int) -> None:
        super()._check_text(prepared, length)
        if any(len(array.offsets) < 3 for array in prepared.train):
            raise UserError(
                "objective.kind: 'next_sentence' needs at least two documents in each source; cut a long text into documents "
                "with the source's separator, or use sentence_order"
            )


@dataclass(frozen=True, kw_only=True)
class SentenceOrder(TwoStretches):
    """Predicts masked tokens, and whether two stretches of text are in order (ALBERT)."""

    kind: Literal["sentence_order"] = "sentence_order"

    swaps = True
