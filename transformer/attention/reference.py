"""Scaled dot-product attention as the equation says it: the ground truth for every other backend.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K query heads a group, H head_dim.

    softmax(q kᵀ · scale + bias, masked) v          Vaswani et al. 2017, equation 1
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer.attention.mask import AttentionMask
from transformer.types import Array, Float, PRNGKeyArray


def attention_weights(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    mask: AttentionMask,
    bias_BNTS: Float[Array, "B_ N_ T_ S_"] | None = None,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
) -> Float[Array, "B N T S"]:
    """Each query's distribution over the keys, [B, N, T, S] in float32 (or wider). A row with no key is all zeros."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    dtype = jnp.float64 if q_BTNH.dtype == jnp.float64 else jnp.float32
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=dtype) * scale
    logits = logits.reshape(B, N, T, S)
    if logit_soft_cap is not None:
        # Gemma Team 2024, section 2: bounds the logits smoothly.
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    if bias_BNTS is not None:
        logits += bias_BNTS
    allowed = mask.materialize(T, S)
    if allowed is None:
        return jax.nn.softmax(logits, axis=-1)
    # A finite floor keeps an empty row free of NaN, in the gradient too; the second where empties it.
    weights = jax.nn.softmax(jnp.where(allowed, logits, jnp.finfo(dtype).min), axis=-1)
    return jnp.where(allowed, weights, 0)


def reference(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: AttentionMask,
    bias_BNTS: Float[Array, "B_ N_ T_ S_"] | None = None,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
    """Attention with the T×S array written out. Softmax in float32, the result in v's type."""
    B, T, N, _ = q_BTNH.shape
    K, H = v_BSKH.shape[2:]
    weights = attention_weights(q_BTNH, k_BSKH, mask, bias_BNTS, scale=scale, logit_soft_cap=logit_soft_cap)
    if dropout_rate > 0 and dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0)
    weights = weights.astype(v_BSKH.dtype).reshape(B, K, N // K, T, -1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)
