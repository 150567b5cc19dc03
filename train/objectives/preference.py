"""Preference tuning: one of two answers becomes likelier, relative to a reference model (DPO, Rafailov et al. 2023).

Axes: B pairs of answers, T positions, D embed, V vocab, n positions of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from train.data.examples.pack import Examples, Packing
from train.data.examples.preferences import Preferences
from train.data.examples.rows import TooLong
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import DEFAULT_LOSS, Batch, LossConfig, LossSums, with_added_loss
from train.objectives.objective import BatchShapes, Objective, Outputs, places_of, row_shapes, weight_shape
from train.parallel.mesh import MeshConfig
from transformer.errors import UserError, require
from transformer.loss import tokens_of_chunk
from transformer.randomness import split
from transformer.types import Array, Float, Keys

_SIDES = ("", "other_")


@dataclass(frozen=True, kw_only=True)
class Preference(Objective):
    """Makes the preferred of two answers likelier than the other, relative to the weights that the run begins with (DPO)."""

    kind: Literal["preference"] = "preference"
    beta: float = 0.1
    """β of the loss: the lower, the further the model may go from the reference."""
    too_long: TooLong = "drop"
    """What happens to a pair of which a dialogue is longer than a row: it is left out, or both lose what is too much. The number
    of such pairs is reported."""

    families = ("gpt",)
    label_kind = "preferences"
    packings = ("documents",)
    packs = False
    loss_settings = ()
    metrics = ("accuracy", "margin")
    unit = "row"
    needs_reference = True
    use = ("talk to it", "manyheads chat {}")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "beta", 0 < self.beta < math.inf, "allowed: above 0")

    def check_mesh(self, mesh: MeshConfig) -> None:
        wanted = "preferences take the model twice in a step; allowed: gpipe"
        require(mesh, "schedule", mesh.schedule != "1f1b", wanted)

    def _check_documents(self, prepared: Prepared) -> None:
        super()._check_documents(prepared)
        if prepared.meta.label_kind != self.label_kind:
            raise UserError(f"objective.kind: {self.kind!r} needs preferences; set holds: preferences in the sources")

    @property
    def rows_per_example(self) -> int:
        return 2

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return Preferences(array, length, self.too_long, shown=shown)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        names = ("tokens", "targets", "said", "segments", "positions")
        sides = row_shapes(rows, length, names) | row_shapes(rows, length, names, prefix="other_")
        return sides | {"reference": jax.ShapeDtypeStruct((rows, 2), jnp.float32)} | weight_shape(rows)

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """The mean over pairs of -log σ(h), with h the difference of the answers' rewards (equation 7).

        The reward of an answer is β times the logarithm of its probability, divided by that of the reference model. Of the
        metrics, accuracy is the fraction of pairs with h > 0, and margin the mean of h.
        """
        return self._loss(model, batch, config, key)[0]

    def evaluate(self, model: Any, batch: Batch, config: LossConfig = DEFAULT_LOSS) -> tuple[LossSums, Outputs]:
        """The outputs are `log_probs` [B, 2], of both answers."""
        sums, log_probs_B2 = self._loss(model, batch, config, None)
        return sums, {"log_probs": log_probs_B2}

    def _loss(
        self, model: Any, batch: Batch, config: LossConfig, key: Keys | None
    ) -> tuple[LossSums, Float[Array, "B 2"]]:
        keys = (None, None) if key is None else split(key, 2)
        outputs = [
            model(batch[f"{side}tokens"], **places_of(batch, side), key=own) for side, own in zip(_SIDES, keys, strict=True)
        ]  # fmt: skip
        with jax.named_scope("loss"):
            log_probs_B2 = jnp.stack(
                [
                    log_probability(model, output.hidden, batch[f"{side}targets"], batch[f"{side}said"], config)
                    for side, output in zip(_SIDES, outputs, strict=True)
                ],
                axis=1,
            )
            weights_B = batch["weights"][:, 0]
            ratios_B2 = log_probs_B2 - batch["reference"]
            margins_B = self.beta * (ratios_B2[:, 0] - ratios_B2[:, 1])
            loss = jnp.sum(weights_B * jax.nn.softplus(-margins_B))
            also = {
                "accuracy": jnp.sum(jnp.where(margins_B > 0, weights_B, 0)),
                "margin": jnp.sum(weights_B * margins_B),
            }
            sums = LossSums(loss, jax.lax.stop_gradient(loss), jnp.sum(weights_B), also=jax.lax.stop_gradient(also))
            return with_added_loss(with_added_loss(sums, outputs[0]), outputs[1]), log_probs_B2

    def tokens_per_prediction(self, prepared: Prepared, tokens_per_example: int) -> float:
        return float(tokens_per_example)


def log_probability(
    model: Any,
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Array,
    said_BT: Array,
    config: LossConfig,
) -> Float[Array, " B"]:
    """The logarithm of the probability of each row's targets where `said_BT` is 1, in chunks of positions.

    A chunk's logits are made again in the backward pass, since each row's gradient depends on its whole sum.
    """
    B, T = targets_BT.shape
    n = max(1, min(T, tokens_of_chunk(config.chunk, B * T, model.config.vocab_size) // B))
    parts = -(-T // n)

    def cut(x: Array) -> Array:
        """[B, T, ...] → [parts, B, n, ...]."""
        x = jnp.pad(x, [(0, 0), (0, parts * n - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, parts, n, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(chunk: tuple[Array, Array, Array]) -> Float[Array, " B"]:
        hidden_BnD, targets_Bn, said_Bn = chunk
        logits_BnV = model.logits(hidden_BnD).astype(jnp.float32)
        # A masked sum instead of a gather: it needs no communication when the vocabulary is sharded.
        is_target_BnV = jnp.arange(logits_BnV.shape[-1]) == targets_Bn[..., None]
        at_target_Bn = jnp.sum(jnp.where(is_target_BnV, logits_BnV, 0), axis=-1)
        return jnp.sum((at_target_Bn - jax.nn.logsumexp(logits_BnV, axis=-1)) * said_Bn.astype(jnp.float32), axis=-1)

    chunks = cut(hidden_BTD), cut(targets_BT), cut(said_BT)
    if parts == 1:
        return of_chunk(jax.tree.map(lambda x: x[0], chunks))
    total_B, _ = jax.lax.scan(lambda total, chunk: (total + of_chunk(chunk), None), jnp.zeros(B), chunks)
    return total_B
