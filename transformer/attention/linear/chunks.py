"""A recurrence over a sequence, many positions at a time, forward and backward.

B batch, T position.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention.spec.tile import filled
from transformer.differentiation import with_backward
from transformer.types import Array

Body = Callable[[Array, Any], tuple[Array, Array]]
"""From the state and a tree of arrays [B, chunk, ...] to the next state and an output [B, chunk, ...]."""


def scan_chunks(body: Body, state: Array, tokens: Any, chunk: int) -> tuple[Array, Array]:
    """Apply `body` to one chunk of `tokens` after another; `tokens` is a tree of arrays [B, T, ...].

    Chunks are sliced and written in place: `jax.lax.scan` over them would copy them, and their gradients, into a layout with
    the chunks in front. The backward pass keeps one state per chunk and recomputes each chunk.

    Args:
        body: zeros after the end fill up the last chunk; they must leave the state unchanged.

    Returns:
        The last state, and the outputs [B, T, ...].
    """
    leaves, structure = jax.tree.flatten(tokens)
    T = leaves[0].shape[1]
    chunk = max(chunk, 1)
    leaves = [filled(x, -(-T // chunk) * chunk, 1) for x in leaves]
    floats = [x if jnp.issubdtype(x.dtype, jnp.floating) else None for x in leaves]
    others = [x if known is None else None for x, known in zip(leaves, floats, strict=True)]

    def over_parts(state: Array, floats: list, others: list) -> tuple[Array, Array]:
        parts = [other if known is None else known for known, other in zip(floats, others, strict=True)]
        return body(state, jax.tree.unflatten(structure, parts))

    # Arrays that the body closes over, such as those of a feature map, have gradients too.
    converted, captured = jax.closure_convert(over_parts, state, *_cut((floats, others), 0, chunk))
    forward, backward = functools.partial(_forward, converted, chunk), functools.partial(_backward, converted, chunk)
    state, out = with_backward(forward, backward, state, floats, others, captured)
    return state, out[:, :T]


def _forward(
    body: Callable, chunk: int, state: Array, floats: list, others: list, captured: list
) -> tuple[tuple[Array, Array], tuple]:
    B, T = jax.tree.leaves(floats)[0].shape[:2]

    def step(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        before, whole = carry
        after, out = body(before, *_cut((floats, others), index, chunk), *captured)
        return (after, _put(whole, out, index)), before

    _, out = jax.eval_shape(body, state, *_cut((floats, others), 0, chunk), *captured)
    start = state, jnp.zeros((B, T, *out.shape[2:]), out.dtype)
    carry, states = jax.lax.scan(step, start, jnp.arange(T // chunk))
    return carry, (states, floats, others, captured)


def _backward(body: Callable, chunk: int, saved: tuple, grads: tuple[Array, Array]) -> tuple:
    states, floats, others, captured = saved
    dstate, dout = grads

    def step(carry: tuple, at: tuple[Array, Array]) -> tuple[tuple, None]:
        dstate, dfloats, dcaptured = carry
        index, state = at
        fixed = _cut(others, index, chunk)
        _, pull = jax.vjp(
            lambda state, parts, captured: body(state, parts, fixed, *captured),
            state, _cut(floats, index, chunk), captured,
        )  # fmt: skip
        dstate, dparts, dmore = pull((dstate, _cut(dout, index, chunk)))
        dfloats = jax.tree.map(lambda whole, part: _put(whole, part, index), dfloats, dparts)
        return (dstate, dfloats, jax.tree.map(jnp.add, dcaptured, dmore)), None

    start = dstate, *jax.tree.map(jnp.zeros_like, (floats, captured))
    (dstate, dfloats, dcaptured), _ = jax.lax.scan(step, start, (jnp.arange(len(states)), states), reverse=True)
    return dstate, dfloats, None, dcaptured


def _cut(tree: Any, index: Any, chunk: int) -> Any:
    """Chunk `index` of all arrays [B, T, ...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, 1), tree)


def _put(whole: Array, part: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, index * part.shape[1], 1)
