"""From scores to the next token.

B batch, V vocab.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from transformer.errors import require
from transformer.types import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. The filters apply in the order of the fields, each to what the previous one left."""

    repetition_penalty: float = 1.0
    """Scores of tokens already seen are divided by this when positive and multiplied when negative (Keskar et al. 2019)."""
    temperature: float = 1.0
    """Scores are divided by this; 0 takes the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens; null: all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the most likely token's probability (Nguyen et al. 2024)."""

    def __post_init__(self) -> None:
        require(self, "repetition_penalty", self.repetition_penalty > 0, "allowed: above 0")
        require(self, "temperature", self.temperature >= 0, "allowed: 0 or more")
        require(self, "top_k", self.top_k is None or self.top_k >= 1, "allowed: 1 or more, or null")
        require(self, "top_p", 0 < self.top_p <= 1, "allowed: above 0, at most 1")
        require(self, "min_p", 0 <= self.min_p <= 1, "allowed: 0 to 1")


def filter_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Scores with temperature applied and -inf for every token that the filters exclude; the most likely token always stays."""
    logits = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token is kept while the sum of those before it is below top_p.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest_kept = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if sampling.min_p > 0:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def penalize_repetition(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Lower the scores of tokens already seen (Keskar et al. 2019, section 4.1)."""
    lowered = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lowered, logits_BV)


def next_token(
    logits_BV: Float[Array, "B V"], sampling: Sampling, keys_B: Key[Array, " B"], seen_BV: Bool[Array, "B V"] | None
) -> Int[Array, " B"]:
    """Draw one token per row, each with its own key."""
    if seen_BV is not None:
        logits_BV = penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, sampling)).astype(jnp.int32)
