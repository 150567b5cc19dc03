"""Scaled dot-product attention exactly as in the equation: the reference for every other backend.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K query heads a group, H head_dim.

    softmax(q kᵀ · scale + bias, masked) v          Vaswani et al. 2017, equation 1
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from transformer.attention.spec.spec import AttentionSpec
from transformer.attention.spec.tile import Span, Tile
from transformer.types import Array, Float, wide


def attention_weights(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    spec: AttentionSpec,
    heads: tuple[int, ...] | None = None,
) -> Float[Array, "B n T S"]:
    """Each query's distribution over the keys, [B, n, T, S] in float32 (or wider), before dropout; zeros for a row with no key.

    Args:
        heads: the query heads to compute; nothing of size T×S is created for the others. None: all heads at once.
    """
    B, T, N, _ = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    whole = Tile.whole(B, N, T, S)
    if heads is None:
        return _weights(q_BTNH, k_BSKH, spec, whole)
    rows = []
    for head in heads:
        tile = dataclasses.replace(whole, heads=Span(head, 1))
        key_head = Span(head // (N // K), 1)
        rows.append(_weights(tile.heads.cut(q_BTNH, 2), key_head.cut(k_BSKH, 2), spec, tile))
    return jnp.concatenate(rows, axis=1)


def reference(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKC: Float[Array, "B S K C"],
    spec: AttentionSpec,
) -> Float[Array, "B T N C"]:
    """Attention with the T×S array written out. Softmax in float32, the result in v's type."""
    B, T, N, _ = q_BTNH.shape
    S, K, C = v_BSKC.shape[1:]
    weights = attention_weights(q_BTNH, k_BSKH, spec)
    if spec.dropout is not None:
        weights = spec.dropout(weights, Tile.whole(B, N, T, S))
    weights = weights.astype(v_BSKC.dtype).reshape(B, K, N // K, T, S)
    return jnp.einsum("BKGTS,BSKC->BTKGC", weights, v_BSKC).reshape(B, T, N, C)


def _weights(q_BTNH: Array, k_BSKH: Array, spec: AttentionSpec, tile: Tile) -> Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    products = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide(q_BTNH.dtype))
    logits, allowed = spec.logits(products.reshape(B, N, T, S), tile)
    # A row of nothing but -inf, from a bias or a score_mod that masks, is also a row with no key.
    weights = jax.nn.softmax(jnp.maximum(logits, jnp.finfo(logits.dtype).min), axis=-1)
    hidden = jnp.isneginf(logits) if allowed is None else jnp.isneginf(logits) | ~allowed
    return jnp.where(hidden, 0, weights)
