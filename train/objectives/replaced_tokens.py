"""Replaced-token detection: which tokens a small model has replaced (Clark et al. 2020, section 3.1).

Axes: B rows, T positions, K of them that may be hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from train.data.prepared.store import Prepared
from train.loss import Batch, LossConfig, LossSums, cross_entropy, with_added_loss
from train.objectives.masked import HiddenTokens, at_places
from train.objectives.objective import places_of
from transformer.randomness import gumbel, split
from transformer.types import Array, Keys


@dataclass(frozen=True, kw_only=True)
class ReplacedTokens(HiddenTokens):
    """A small model predicts masked tokens, and the encoder detects which of its predictions are wrong (ELECTRA)."""

    kind: Literal["replaced_tokens"] = "replaced_tokens"

    families = ("electra",)
    unit = "tok"

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """The generator predicts the hidden tokens; samples from it replace them; the encoder predicts which tokens
        differ from the original ones.

        The generator is trained by maximum likelihood, not adversarially: no gradient passes through a sample. The reported
        likelihood is the encoder's, over all tokens. Without a key the samples are the same every time.
        """
        network_key, encoder_key, draw_key = (None, None, jax.random.key(0)) if key is None else split(key, 3)
        places = places_of(batch)
        hidden = at_places(batch, batch["predicted"])
        scores_BKV = model.generator_logits(
            batch["tokens"], predicted_BK=batch["predicted"], key=network_key, **places
        )  # fmt: skip
        with jax.named_scope("generator_loss"):
            sums = cross_entropy(scores_BKV, hidden["targets"], hidden["weights"], config)
            generator = sums.loss / jnp.maximum(sums.weight, 1)
        with jax.named_scope("replace"):
            drawn_BK = _drawn(draw_key, scores_BKV).astype(batch["tokens"].dtype)
            seen_BK = jnp.where(hidden["weights"] > 0, drawn_BK, hidden["targets"])
            # The original tokens, with samples at the hidden positions.
            seen_BT = jnp.put_along_axis(batch["targets"], batch["predicted"], seen_BK, axis=1, inplace=False)
            is_replaced_BT = seen_BT != batch["targets"]
        output = model(seen_BT, key=encoder_key, **places)
        with jax.named_scope("loss"):
            valid_BT = (batch["segments"] != 0).astype(jnp.float32)
            # Rows that only fill a batch are not counted, like padding.
            valid_BT *= jnp.max(batch["weights"], axis=1, keepdims=True)
            signed = jnp.where(is_replaced_BT, output.logits, -output.logits)
            nll, weight = -jnp.sum(jax.nn.log_sigmoid(signed) * valid_BT), jnp.sum(valid_BT)
            loss = model.config.replaced_weight * nll + generator * weight
            return with_added_loss(LossSums(loss, nll, weight), output)

    def tokens_per_prediction(self, prepared: Prepared, tokens_per_example: int) -> float:
        return 1.0


def _drawn(key: Keys, scores_BKV: Array) -> Array:
    """A token for each place, drawn with one key, or with each row's own."""
    scores_BKV = jax.lax.stop_gradient(scores_BKV)
    if key.ndim == 0:
        return jax.random.categorical(key, scores_BKV)
    # The largest of scores with Gumbel noise is a draw from their softmax.
    return jnp.argmax(scores_BKV + gumbel(key, scores_BKV), axis=-1)
