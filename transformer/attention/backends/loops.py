"""Exact attention as two nested loops over tiles; only the tiles that the mask may allow are run.

B batch, T query position, S key position, K key/value heads, G query heads a group.

The inner loop's length is computed at run time, from one table of visible tiles per call: causal halves, windows, packed
documents and a user's own empty blocks cost nothing. T and S must be multiples of the grid's blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from transformer.attention.backends import online
from transformer.attention.backends.online import Gradients, Running
from transformer.attention.spec.spec import AttentionSpec
from transformer.attention.spec.tile import Grid
from transformer.loop_length import expected_trips
from transformer.types import Array

BLOCK = 512
"""Queries and keys in a tile: wide enough for a product to fill a core, small enough for its cache."""


def forward(running: Running, q: Array, k: Array, v: Array, spec: AttentionSpec, grid: Grid) -> Running:
    """The softmax over these keys in addition to those that `running` has seen. Shapes are as in `online.forward`."""
    order, count, expected = _schedule(spec, grid)

    def over_queries(block: Array, running: Running) -> Running:
        queries = grid.queries.part(block)
        q_block = queries.cut(q, 3)

        def over_keys(step: Array, row: Running) -> Running:
            index = order[block, step]
            keys = grid.keys.part(index)
            return online.forward(row, q_block, keys.cut(k, 2), keys.cut(v, 2), spec, grid.tile(block, index))

        row = jax.tree.map(lambda x: queries.cut(x, 3), running)
        with expected_trips(expected):
            row = jax.lax.fori_loop(0, count[block], over_keys, row)
        return jax.tree.map(lambda x, part: _put(x, part, queries.start, 3), running, row)

    return jax.lax.fori_loop(0, grid.queries.count, over_queries, running)


def backward(
    gradients: Gradients,
    q: Array,
    k: Array,
    v: Array,
    lse: Array,
    delta: Array,
    dout: Array,
    spec: AttentionSpec,
    grid: Grid,
) -> Gradients:
    """The gradients with these tiles' contributions added. Shapes are as in `online.backward`."""
    order, count, expected = _schedule(spec, grid)

    def over_queries(block: Array, gradients: Gradients) -> Gradients:
        queries = grid.queries.part(block)
        q_block, lse_block, delta_block, dout_block = (queries.cut(x, 3) for x in (q, lse, delta, dout))

        def over_keys(step: Array, carry: Gradients) -> Gradients:
            index = order[block, step]
            keys, tile = grid.keys.part(index), grid.tile(block, index)
            part = online.backward(
                q_block, keys.cut(k, 2), keys.cut(v, 2), lse_block, delta_block, dout_block, spec, tile
            )
            return Gradients(
                carry.q + part.q,
                _put(carry.k, keys.cut(carry.k, 2) + part.k, keys.start, 2),
                _put(carry.v, keys.cut(carry.v, 2) + part.v, keys.start, 2),
                spec.score.add_gradients(carry.score, part.score, tile),
            )

        row = Gradients(queries.cut(gradients.q, 3), gradients.k, gradients.v, gradients.score)
        with expected_trips(expected):
            row = jax.lax.fori_loop(0, count[block], over_keys, row)
        return Gradients(_put(gradients.q, row.q, queries.start, 3), row.k, row.v, row.score)

    return jax.lax.fori_loop(0, grid.queries.count, over_queries, gradients)


def _schedule(spec: AttentionSpec, grid: Grid) -> tuple[Array, Array, float]:
    """For each block of queries, the indices of the blocks of keys, visible ones first and in order, and their number; and the
    mean of that number, which for masks that depend on the data is taken to be that of causal ones."""
    visible = spec.mask.visible(grid)
    is_known = isinstance(visible, np.ndarray)
    # What is known beforehand is sorted here, once, rather than by the compiler as a constant of the program.
    order = (np if is_known else jnp).argsort(~visible, axis=1, stable=True)
    expected = float(visible.sum(1).mean()) if is_known else (visible.shape[1] + 1) / 2
    return jnp.asarray(order, jnp.int32), jnp.asarray(visible.sum(1), jnp.int32), expected


def _put(x: Array, part: Array, start: int | Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)
