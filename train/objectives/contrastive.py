"""Contrastive learning: finding the other side of each pair among those of a batch, by the similarity of embeddings.

van den Oord et al. 2018; Gao et al. 2021 (SimCSE), section 2.1. Axes: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from train.data.examples.contrast import TextPairs
from train.data.examples.pack import Examples, Packing
from train.data.examples.rows import TooLong
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.tokenization.tokenizer import CLS, SEP, Tokenizer
from train.loss import Batch, LossConfig, LossSums, of_rows, with_added_loss
from train.objectives.objective import BatchShapes, Objective, places_of, row_shapes, weight_shape
from train.parallel.mesh import MeshConfig
from transformer.errors import require
from transformer.models.heads import contrastive_logits
from transformer.randomness import split
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class Contrastive(Objective):
    """Finds the other side of each pair among the texts of a batch, by the similarity of embeddings (SimCSE)."""

    kind: Literal["contrastive"] = "contrastive"
    temperature: float = 0.05
    """Temperature that divides the cosine similarities, in training and in evaluation."""
    too_long: TooLong = "drop"
    """What happens to a pair with a side longer than a row: it is left out, or cut. The number of such pairs is
    reported."""

    families = ("bert",)
    heads = ("embedding",)
    takes_pairs = True
    compares_rows = True
    packings = ("documents",)
    packs = False
    least_length = 3
    metrics = ("accuracy",)
    unit = "row"
    use = ("embed texts", "manyheads embed {} --file FILE --out VECTORS.npy")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "temperature", self.temperature > 0, "allowed: above 0")

    def check_mesh(self, mesh: MeshConfig) -> None:
        whole = "a contrastive loss needs the whole batch at once; allowed: "
        require(mesh, "schedule", mesh.schedule != "1f1b", f"{whole}gpipe")
        require(mesh, "strategy", mesh.strategy != "pmap", f"{whole}any strategy but pmap")

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return (CLS, SEP)

    @property
    def rows_per_example(self) -> int:
        return 2

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return TextPairs(array, tokenizer, length, self.too_long, shown=shown)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        names = ("tokens", "segments", "positions")
        sides = row_shapes(rows, length, names) | row_shapes(rows, length, names, prefix="other_")
        return sides | weight_shape(rows)

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """The mean over rows; `weights` [B, 1] is 0 for a row of padding."""
        keys = (None, None) if key is None else split(key, 2)
        sides = [
            model(batch[f"{side}tokens"], **places_of(batch, side), key=own)
            for side, own in zip(("", "other_"), keys, strict=True)
        ]  # fmt: skip
        with jax.named_scope("loss"):
            valid_B = batch["weights"][:, 0] > 0
            logits_BB = contrastive_logits(sides[0].logits, sides[1].logits, valid_B, temperature=self.temperature)
            sums = of_rows(logits_BB, jnp.arange(logits_BB.shape[0]), batch["weights"], config)
            return with_added_loss(with_added_loss(sums, sides[0]), sides[1])

    def tokens_per_prediction(self, prepared: Prepared, tokens_per_example: int) -> float:
        return float(tokens_per_example)
