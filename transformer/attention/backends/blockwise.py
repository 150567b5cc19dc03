"""Exact attention in O(T) memory, in JAX alone: the T×S array is never created, in the forward or the backward pass.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K query heads a group, H head_dim,
C value dim.

Tiles that the mask rules out are never touched: the masked half of causal attention costs nothing, nor do distant keys under
a window, other documents in a packed row, or a user's empty blocks. Up to two thousand queries the blocks are unrolled, which
XLA fuses best; beyond that they are loops, so that the program does not grow with the length.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from transformer.attention.backends import loops, online
from transformer.attention.backends.online import Gradients, Running
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.spec import AttentionSpec, Dropout, Score
from transformer.attention.spec.tile import Blocks, Grid, Span, Tile, filled
from transformer.differentiation import with_backward
from transformer.types import Array, Float, wide

ATTENTION_RESIDUALS = "attention_residuals"
"""The name by which a rematerialisation policy identifies the residuals of the forward pass."""

BLOCK = 128
"""Number of queries in an unrolled block; keys are skipped in multiples of this."""
MAX_BLOCKS = 16
"""More unrolled blocks than this compile more slowly, and run no faster than loops."""


def blockwise(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKC: Float[Array, "B S K C"],
    spec: AttentionSpec,
) -> Float[Array, "B T N C"]:
    """Attention computed tile by tile. Softmax in float32, the result in v's type."""
    B, T, N, H = q_BTNH.shape
    S, K, C = v_BSKC.shape[1:]
    q, k, v = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4), _heads_first(k_BSKH), _heads_first(v_BSKC)
    if T <= BLOCK * MAX_BLOCKS:
        out = _attention(q, k, v, spec.score, (spec.mask, spec.dropout), False)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, C)
    rows, columns = (-(-size // loops.BLOCK) * loops.BLOCK for size in (T, S))
    q, k, v = filled(q, rows, -2), filled(k, columns, -2), filled(v, columns, -2)
    mask, score = spec.mask.padded(rows, columns), spec.score.padded(rows, columns)
    if columns > S:
        mask &= AttentionMask.prefix(S)
    out = _attention(q, k, v, score, (mask, spec.dropout), True)
    return out[..., :T, :].transpose(0, 3, 1, 2, 4).reshape(B, T, N, C)


Rest = tuple[AttentionMask, Dropout | None]
"""Inputs that have no gradient."""


def _attention(q: Array, k: Array, v: Array, score: Score, rest: Rest, looped: bool) -> Array:
    forward, backward = functools.partial(_forward, looped=looped), functools.partial(_backward, looped=looped)
    return with_backward(forward, backward, q, k, v, score, rest)


def _forward(q: Array, k: Array, v: Array, score: Score, rest: Rest, *, looped: bool) -> tuple[Array, tuple]:
    spec = AttentionSpec(rest[0], score, rest[1])
    if looped:
        running = Running.start(q.shape[:4], v.shape[-1], wide(q.dtype))
        out, lse = loops.forward(running, q, k, v, spec, _grid(q, k, loops.BLOCK)).finish(v.dtype)
    else:
        blocks = [
            online.forward(
                Running.start((*q.shape[:3], tile.queries.size), v.shape[-1], wide(q.dtype)),
                tile.queries.cut(q, 3), tile.keys.cut(k, 2), tile.keys.cut(v, 2), spec, tile,
            ).finish(v.dtype)
            for tile in _tiles(q, k, spec)
        ]  # fmt: skip
        out, lse = (jnp.concatenate(parts, axis=3) for parts in zip(*blocks, strict=True))
    out, lse = checkpoint_name(out, ATTENTION_RESIDUALS), checkpoint_name(lse, ATTENTION_RESIDUALS)
    return out, (q, k, v, spec, out, lse)


def _backward(saved: tuple, dout: Array, *, looped: bool) -> tuple[Array, Array, Array, Score, None]:
    q, k, v, spec, out, lse = saved
    delta = online.delta(dout, out)
    if looped:
        grid = _grid(q, k, loops.BLOCK)
        total = loops.backward(Gradients.zero(q, k, v, spec), q, k, v, lse, delta, dout, spec, grid)
        dq, dk, dv, dscore = total.q, total.k, total.v, total.score
    else:
        dq_blocks, dscore = [], spec.score.zero_gradients()
        dk, dv = jnp.zeros(k.shape, lse.dtype), jnp.zeros(v.shape, lse.dtype)
        for tile in _tiles(q, k, spec):
            lse_block, delta_block, dout_block = (tile.queries.cut(x, 3) for x in (lse, delta, dout))
            q_block, k_block, v_block = tile.queries.cut(q, 3), tile.keys.cut(k, 2), tile.keys.cut(v, 2)
            part = online.backward(q_block, k_block, v_block, lse_block, delta_block, dout_block, spec, tile)
            around = ((0, 0), (0, 0), (tile.keys.start, k.shape[2] - tile.keys.start - tile.keys.size), (0, 0))
            dq_blocks.append(part.q.astype(q.dtype))
            dk, dv = dk + jnp.pad(part.k, around), dv + jnp.pad(part.v, around)
            dscore = spec.score.add_gradients(dscore, part.score, tile)
        dq = jnp.concatenate(dq_blocks, axis=3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), spec.score.cotangent(dscore), None


def _grid(q: Array, k: Array, size: int) -> Grid:
    B, K, G, T, _ = q.shape
    blocks = (Blocks(size, -(-length // size)) for length in (T, k.shape[2]))
    return Grid(Span(0, B), Span(0, K * G), *blocks)


def _tiles(q: Array, k: Array, spec: AttentionSpec) -> list[Tile]:
    """Tiles of one block of queries each, with the range of keys that any of them may see as far as is known beforehand."""
    T, S = q.shape[3], k.shape[2]
    grid = _grid(q, k, BLOCK)
    tiles = []
    for index, row in enumerate(spec.mask.visible_beforehand(grid)):
        # At least one block, so that no array is empty; the mask still applies to it.
        seen = row.nonzero()[0] if row.any() else [0]
        start, low = index * BLOCK, int(seen[0]) * BLOCK
        queries = Span(start, min(BLOCK, T - start))
        tiles.append(Tile(grid.batch, grid.heads, queries, Span(low, min((int(seen[-1]) + 1) * BLOCK, S) - low)))
    return tiles


def _heads_first(x_BSKH: Array) -> Array:
    return x_BSKH.transpose(0, 2, 1, 3)
