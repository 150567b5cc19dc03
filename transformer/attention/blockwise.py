"""Exact attention over blocks of queries: the T×S array never exists, forwards or backwards.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K query heads a group, H head_dim.

The output and one log-sum-exp a row are kept, and probabilities computed again in the backward pass, as in Dao et al. 2022
(algorithms 1 and 4, with the whole row of keys as the inner block). Keys that a causal mask or a window hides from all queries
of a block are never touched: the masked half of causal attention costs nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from transformer.attention.mask import AttentionMask, Causal, Window
from transformer.types import Array, Float

ATTENTION_RESIDUALS = "attention_residuals"
"""The name under which a rematerialisation policy finds what the backward pass needs of the forward pass."""

BLOCK = 128
MAX_BLOCKS = 32
"""Blocks are written out one by one in the program; more of them would make it slow to compile."""


def blockwise(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: AttentionMask,
    bias_BNTS: None = None,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention by blocks of queries. Softmax in float32, the result in v's type. Reverse mode only."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Heads first: each product is then a batch of plain matrices, in both passes.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    out_BKGTH = _attention(q_BKGTH, k_BKSH, v_BKSH, mask, scale)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def supports(request: Any) -> str | None:
    """Why it cannot serve this call, or None."""
    if request.dropout:
        return "it has no dropout"
    if request.logit_soft_cap is not None:
        return "it has no logit soft-cap"
    if request.has_bias:
        return "it has no bias"
    if request.num_queries > BLOCK * MAX_BLOCKS:
        return f"it takes at most {BLOCK * MAX_BLOCKS} queries, and there are {request.num_queries}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, mask: AttentionMask, scale: float) -> Array:
    return _forward(q, k, v, mask, scale)[0]


def _forward(q: Array, k: Array, v: Array, mask: AttentionMask, scale: float) -> tuple[Array, tuple]:
    outs, lses = [], []
    for queries, keys in _blocks(mask, q.shape[3], k.shape[2]):
        scores, allowed = _scores(_cut(q, queries), _cut(k, keys), mask, queries, keys, scale)
        top = scores.max(-1, keepdims=True)
        powers = jnp.exp(scores - top)
        if allowed is not None:
            # A query with no key at all: its scores are all the floor, and their powers all 1.
            powers = jnp.where(allowed, powers, 0)
        total = jnp.maximum(powers.sum(-1, keepdims=True), jnp.finfo(powers.dtype).tiny)
        out = jnp.einsum(
            "BKGTS,BKSH->BKGTH", powers.astype(v.dtype), _cut(v, keys), preferred_element_type=scores.dtype
        )
        outs.append((out / total).astype(v.dtype))
        lses.append(top + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), ATTENTION_RESIDUALS)
    lse = checkpoint_name(jnp.concatenate(lses, axis=3), ATTENTION_RESIDUALS)
    return out, (q, k, v, mask, out, lse)


def _backward(scale: float, saved: tuple, dout: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out, lse = saved
    wide = lse.dtype
    delta = (dout.astype(wide) * out.astype(wide)).sum(-1, keepdims=True)
    dq_blocks = []
    dk, dv = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for queries, keys in _blocks(mask, q.shape[3], k.shape[2]):
        q_block, k_block, v_block, dout_block = _cut(q, queries), _cut(k, keys), _cut(v, keys), _cut(dout, queries)
        scores, allowed = _scores(q_block, k_block, mask, queries, keys, scale)
        weights = jnp.exp(scores - _cut(lse, queries))
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0)
        dweights = jnp.einsum("BKGTH,BKSH->BKGTS", dout_block, v_block, preferred_element_type=wide)
        dscores = (weights * (dweights - _cut(delta, queries)) * scale).astype(q.dtype)
        dq_blocks.append(jnp.einsum("BKGTS,BKSH->BKGTH", dscores, k_block, preferred_element_type=wide).astype(q.dtype))
        dk_block = jnp.einsum("BKGTS,BKGTH->BKSH", dscores, q_block, preferred_element_type=wide)
        weights = weights.astype(v.dtype)
        dv_block = jnp.einsum("BKGTS,BKGTH->BKSH", weights, dout_block, preferred_element_type=wide)
        around = ((0, 0), (0, 0), (keys.start, k.shape[2] - keys.stop), (0, 0))
        dk, dv = dk + jnp.pad(dk_block, around), dv + jnp.pad(dv_block, around)
    return jnp.concatenate(dq_blocks, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _scores(
    q: Array, k: Array, mask: AttentionMask, queries: range, keys: range, scale: float
) -> tuple[Array, Array | None]:
    """Scaled products with a finite floor where the mask forbids, and the mask, both [B, K, G, t, s]."""
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=wide) * scale
    allowed = mask.block(queries, keys)
    if allowed is None:
        return scores, None
    # [B_, N_, t, s] to [B_, K_, G_, t, s]: N runs over K first.
    heads = (1, 1) if allowed.shape[1] == 1 else q.shape[1:3]
    allowed = allowed.reshape(allowed.shape[0], *heads, *allowed.shape[2:])
    return jnp.where(allowed, scores, jnp.finfo(wide).min), allowed


def _blocks(mask: AttentionMask, num_queries: int, num_keys: int) -> list[tuple[range, range]]:
    """Blocks of queries, each with the keys that any of them may see as far as causal and window terms tell."""
    blocks = []
    for start in range(0, num_queries, BLOCK):
        queries = range(start, min(start + BLOCK, num_queries))
        low, high = 0, num_keys
        for term in mask.terms:
            if not isinstance(term, Causal | Window) or not isinstance(term.offset, int):
                continue
            if isinstance(term, Causal):
                high = min(high, term.offset + queries.stop)
            if isinstance(term, Window):
                low = max(low, term.offset + queries.start - term.left) if term.left is not None else low
                high = min(high, term.offset + queries.stop + term.right) if term.right is not None else high
        # At least one key, so that no array is empty; what the mask forbids it still forbids.
        low = min(max(low, 0), num_keys - 1)
        blocks.append((queries, range(low, max(high, low + 1))))
    return blocks


def _cut(x: Array, positions: range) -> Array:
    """Some positions, which are the last dim but one."""
    return x[..., positions.start : positions.stop, :]
