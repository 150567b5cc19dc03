"""Prefix language modelling: predicting a text after a fully visible prefix (Raffel et al. 2020, section 3.2.3).

Axes: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from train.data.examples import spans
from train.data.examples.pack import Examples, Packing
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums, of_tokens
from train.objectives.objective import BatchShapes, Objective, row_shapes, weight_shape
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class Prefix(Objective):
    """Predicts the rest of a text after a fully visible prefix (prefix LM)."""

    kind: Literal["prefix"] = "prefix"

    families = ("gpt",)
    packings = ("chunk",)
    least_length = 2
    use = ("generate text", "manyheads generate {} --prompt TEXT")

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return spans.Prefix(array, length, keep_rest=not training)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        prefix = {"prefix": jax.ShapeDtypeStruct((rows,), jnp.int32)}
        return row_shapes(rows, length, ("tokens", "targets")) | weight_shape(rows, length) | prefix

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """The mean over the tokens after the prefix; `prefix` [B] is how many first tokens are visible to all."""
        output = model(batch["tokens"], prefix_B=batch["prefix"], key=key)
        return of_tokens(model, output, batch, config)
