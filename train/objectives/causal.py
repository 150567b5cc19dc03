"""Next-token prediction: causal language models.

Axes: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from train.data.examples.pack import Examples, Packing, examples
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums, of_tokens
from train.objectives.objective import BatchShapes, Objective, places_of, row_shapes, weight_shape
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class Causal(Objective):
    """Predicts each token from those before it (GPT)."""

    kind: Literal["causal"] = "causal"

    families = ("gpt",)
    predicts_all_text = True
    use = ("generate text", "manyheads generate {} --prompt TEXT")

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return examples(array, packing, length, training=training)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        names = ["tokens", "targets"] + (["segments", "positions"] if data.packing == "documents" else [])
        return row_shapes(rows, length, names) | weight_shape(rows, length)

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """The mean over all tokens; positions and segments [B, T] are given if documents are packed."""
        output = model(batch["tokens"], **places_of(batch), key=key)
        return of_tokens(model, output, batch, config)

    def report(self, prepared: Prepared, bits_per_byte: float | None) -> list[str]:
        """Bits per byte, compared with general compressors."""
        if bits_per_byte is None:
            return []
        others = [(f"{name} -9", prepared.meta.bits_per_byte(name)) for name in ("gzip", "xz")]
        known = "".join(f", {label} {bits:.4f}" for label, bits in others if bits is not None)
        return [f"held-out text, bits per byte: this model {bits_per_byte:.4f}{known}"]
