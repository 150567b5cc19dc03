"""Attention over a sequence that is sharded along an axis of the mesh: ring and all-to-all.

B batch, T query position, S key position, N query heads, K key/value heads, H head_dim, C value dim; n devices along the
sequence.

ring        Each device keeps its queries; keys and values travel around, and no device ever holds more than its share of
            the sequence (Liu et al. 2023). Each device gets one chunk from the front and one from the back of it, so
            that a causal mask leaves all of them the same work ("zigzag", as in striped attention: Brandon et al. 2023).
ulysses     Two all-to-alls exchange a share of the sequence with all heads for the whole sequence with a share of the
            heads, and back (Jacobs et al. 2023); in between, any other backend computes the attention.

The mesh axis that holds the sequence is read from the active logical-axis rules ("seq").
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from transformer.attention.backends import loops, online
from transformer.attention.backends.blockwise import ATTENTION_RESIDUALS, Rest
from transformer.attention.backends.online import Gradients, Running
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.predicates import BlockSparse, Either, Explicit, MaskMod, MaskPredicate
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec, Dropout, Score
from transformer.attention.spec.tile import Blocks, Grid, Span, filled
from transformer.differentiation import with_backward
from transformer.sharding import axes_size, mesh_axes
from transformer.types import Array, Float, wide


def ring(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKC: Float[Array, "B S K C"],
    spec: AttentionSpec,
) -> Float[Array, "B T N C"]:
    """Exact attention with keys and values passed from device to device. Softmax in float32, the result in v's type.

    A batch or heads that are not divisible by their devices are computed in full on each of them; a sequence is padded.
    """
    (B, T, N, _), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    axes = _axes(B, N)
    # With fewer key/value heads than devices, there are enough copies for each device to have those of its queries.
    copies = math.lcm(K, axes_size(axes.heads)) // K
    if copies > 1:
        k_BSKH, v_BSKC = (jnp.repeat(x, copies, axis=2) for x in (k_BSKH, v_BSKC))
    chunks = 2 * axes_size(axes.seq)
    rows, columns = (-(-size // chunks) * chunks for size in (T, S))
    q_BTNH, k_BSKH, v_BSKC = filled(q_BTNH, rows, 1), filled(k_BSKH, columns, 1), filled(v_BSKC, columns, 1)
    mask = spec.mask.padded(rows, columns)
    if columns > S:
        mask &= AttentionMask.prefix(S)
    layout = PartitionSpec(axes.batch or None, axes.seq, axes.heads or None, None)
    # The mask's arrays are small compared with keys and values: every device has them whole along the sequence.
    mask_layout = AttentionMask(tuple(_layout(term, PartitionSpec(axes.batch or None)) for term in mask.predicates))
    out = jax.shard_map(
        functools.partial(_on_device, axes=axes),
        in_specs=(layout, layout, layout, PartitionSpec(), mask_layout, PartitionSpec(axes.batch or None)),
        out_specs=layout,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKC, spec.score, mask, spec.dropout)
    return out[:, :T]


def ulysses(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKC: Float[Array, "B S K C"],
    spec: AttentionSpec,
    *,
    attend: Callable[[Array, Array, Array, AttentionSpec], Array],
) -> Float[Array, "B T N C"]:
    """Exact attention where the sequence's devices hold heads instead of positions, computed by `attend` in between."""
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]
    batch, seq, heads = mesh_axes("batch"), mesh_axes("seq"), _head_axes()
    if K % axes_size(heads + seq):
        k_BSKH, v_BSKC = (jnp.repeat(x, N // K, axis=2) for x in (k_BSKH, v_BSKC))
    by_head = PartitionSpec(batch or None, None, heads + seq, None)
    by_position = PartitionSpec(batch or None, seq, heads or None, None)
    # XLA uses an all-to-all to change from one layout to the other.
    q, k, v = (jax.lax.with_sharding_constraint(x, by_head) for x in (q_BTNH, k_BSKH, v_BSKC))
    # The backend in between sees a sequence that is not sharded, and heads that are sharded where the sequence was.
    inside = dict(get_logical_axis_rules()) | {"seq": None, "heads": heads + seq, "kv_heads": heads + seq}
    with nnx.logical_axis_rules(tuple(inside.items())):
        out = attend(q, k, v, spec)
    out = jax.lax.with_sharding_constraint(out, by_head)
    return jax.lax.with_sharding_constraint(out, by_position)


def supports_ring(request: AttentionShapes) -> str | None:
    """Why a ring cannot serve this call, or None."""
    if reason := _no_sequence_axis("ring"):
        return reason
    if request.spec.score.bias_BNTS is not None:
        return "it takes no T×S arrays, and there is a bias: write it as a score_mod"
    if any(map(_has_plane, request.spec.mask.predicates)):
        return "it takes no T×S arrays, and there is an explicit mask: write it as a mask_mod"
    return None


def slices_sequence(request: AttentionShapes) -> bool:
    """Whether this call's sequence is sharded over the mesh, and long enough for each device to hold a pair of chunks.

    One or a few queries, as in decoding, are not sharded.
    """
    devices = axes_size(mesh_axes("seq"))
    return devices > 1 and request.num_queries >= 2 * devices


def supports_ulysses(request: AttentionShapes) -> str | None:
    """Why two all-to-alls cannot serve this call, or None."""
    if reason := _no_sequence_axis("ulysses"):
        return reason
    shares = axes_size(_head_axes() + mesh_axes("seq"))
    if request.num_heads % shares:
        return f"it divides the heads evenly over {shares} devices, and there are {request.num_heads}"
    return None


def _no_sequence_axis(name: str) -> str | None:
    if mesh_axes("seq"):
        mesh = jax.sharding.get_abstract_mesh()
        if all(kind == AxisType.Auto for kind in mesh.axis_types):
            return None
        return (
            f"{name} needs a mesh whose axes are of the type Auto: jax.make_mesh(..., axis_types=(AxisType.Auto,) * n)"
        )
    return f"{name} needs a mesh and a logical-axis rule that lays 'seq' along one of its axes, and there is none"


def _head_axes() -> tuple[str, ...]:
    """The mesh axes of the heads; none if query heads and key/value heads are sharded differently."""
    return mesh_axes("heads") if mesh_axes("heads") == mesh_axes("kv_heads") else ()


def _axes(batch_size: int, num_heads: int) -> Axes:
    """The axes of the mesh that a call's dims are divided along."""
    batch, heads = mesh_axes("batch"), _head_axes()
    batch = () if batch_size % axes_size(batch) else batch
    return Axes(mesh_axes("seq"), batch, () if num_heads % axes_size(heads) else heads)


def _has_plane(term: MaskPredicate) -> bool:
    if isinstance(term, Either):
        return any(map(_has_plane, term.one + term.other))
    return isinstance(term, Explicit)


def _layout(term: MaskPredicate, by_row: PartitionSpec) -> Any:
    """How a term's arrays are sharded: those with a row for each sequence like the batch, the others not at all."""
    if isinstance(term, Either):
        one, other = (tuple(_layout(part, by_row) for part in parts) for parts in (term.one, term.other))
        return Either(one, other)
    whole = isinstance(term, BlockSparse | MaskMod)
    return jax.tree.map(lambda leaf: PartitionSpec() if whole or leaf.shape[0] == 1 else by_row, term)


# The functions below run on one device, on its own share of every array. Its share of the sequence is a pair of chunks, one of
# 2n from the front and one from the back, in a leading dim of 2.


@dataclasses.dataclass(frozen=True)
class Axes:
    """The mesh axes along which the sequence, the batch and the heads lie."""

    seq: tuple[str, ...]
    batch: tuple[str, ...]
    heads: tuple[str, ...]


def _on_device(
    q: Array, k: Array, v: Array, score: Score, mask: AttentionMask, dropout: Dropout | None, *, axes: Axes
) -> Array:
    B, T, N, H = q.shape
    K, C = v.shape[2:]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    q, k, v = (_to_zigzag(x, axes) for x in (q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)))
    out = _from_zigzag(_ring(q, k, v, score, (mask, dropout), axes), axes)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, C)


def _ring(q: Array, k: Array, v: Array, score: Score, rest: Rest, axes: Axes) -> Array:
    forward, backward = functools.partial(_forward, axes=axes), functools.partial(_backward, axes=axes)
    return with_backward(forward, backward, q, k, v, score, rest)


def _forward(q: Array, k: Array, v: Array, score: Score, rest: Rest, *, axes: Axes) -> tuple[Array, tuple]:
    spec = AttentionSpec(rest[0], score, rest[1])

    def step(running: Running, travelling: tuple[Array, Array], source: Array) -> tuple[Running, tuple[Array, Array]]:
        def pair(number: Array, running: Running) -> Running:
            q_index, k_index = number // 2, number % 2
            q_chunk, (k_chunk, v_chunk) = _at(q, q_index), _at(travelling, k_index)
            grid = _grid(q_chunk, k_chunk, q_index, k_index, source, axes)
            part = loops.forward(_at(running, q_index), q_chunk, k_chunk, v_chunk, spec, grid)
            return _put(running, part, q_index)

        return jax.lax.fori_loop(0, 4, pair, running), travelling

    start = jax.vmap(lambda x: Running.start(x.shape[:4], v.shape[-1], wide(x.dtype)))(q)
    running, _ = _over_sources(step, start, (k, v), axes)
    out, lse = running.finish(v.dtype)
    out, lse = checkpoint_name(out, ATTENTION_RESIDUALS), checkpoint_name(lse, ATTENTION_RESIDUALS)
    return out, (q, k, v, spec, out, lse)


def _backward(saved: tuple, dout: Array, *, axes: Axes) -> tuple[Array, Array, Array, Score, None]:
    q, k, v, spec, out, lse = saved
    score = spec.score
    delta = online.delta(dout, out)

    def step(resident: tuple, travelling: tuple, source: Array) -> tuple[tuple, tuple]:
        k, v, *_ = travelling

        def pair(number: Array, sums: Gradients) -> Gradients:
            q_index, k_index = number // 2, number % 2
            q_chunk, lse_chunk, delta_chunk, dout_chunk = _at((q, lse, delta, dout), q_index)
            k_chunk, v_chunk = _at((k, v), k_index)
            grid = _grid(q_chunk, k_chunk, q_index, k_index, source, axes)
            so_far = Gradients(_at(sums.q, q_index), _at(sums.k, k_index), _at(sums.v, k_index), sums.score)
            part = loops.backward(so_far, q_chunk, k_chunk, v_chunk, lse_chunk, delta_chunk, dout_chunk, spec, grid)
            dk, dv = _put((sums.k, sums.v), (part.k, part.v), k_index)
            return Gradients(_put(sums.q, part.q, q_index), dk, dv, part.score)

        (dq, dscore), (dk, dv) = resident, travelling[2:]
        sums = jax.lax.fori_loop(0, 4, pair, Gradients(dq, dk, dv, dscore))
        return (sums.q, sums.score), (k, v, sums.k, sums.v)

    dq, dk, dv = (jnp.zeros(x.shape, wide(x.dtype)) for x in (q, k, v))
    (dq, dscore), (_, _, dk, dv) = _over_sources(step, (dq, score.zero_gradients()), (k, v, dk, dv), axes)
    # After the last step, each chunk's gradients are on the device before the one that holds the chunk.
    dk, dv = _rotate((dk, dv), axes)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), score.cotangent(dscore), None


def _over_sources(step: Callable[..., Any], resident: Any, travelling: Any, axes: Axes) -> tuple[Any, Any]:
    """Call `step(resident, travelling, source)` once for each source, the device that the travelling arrays started from. It
    updates the arrays that stay on this device and those that travel around the ring."""
    n, index = jax.lax.axis_size(axes.seq), jax.lax.axis_index(axes.seq)

    def body(turn: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        resident, travelling = step(*state, (index - turn) % n)
        return resident, _rotate(travelling, axes)

    resident, travelling = jax.lax.fori_loop(0, n - 1, body, (resident, travelling))
    return step(resident, travelling, (index + 1) % n)


def _rotate(travelling: Any, axes: Axes) -> Any:
    """The arrays of the previous device of the ring."""
    n = jax.lax.axis_size(axes.seq)
    return jax.lax.ppermute(travelling, axes.seq, [(device, (device + 1) % n) for device in range(n)])


def _grid(q: Array, k: Array, q_index: Array, k_index: Array, source: Array, axes: Axes) -> Grid:
    """The grid, in the whole plane, of one of this device's chunks of queries and one of the source device's chunks of keys."""
    n, index = jax.lax.axis_size(axes.seq), jax.lax.axis_index(axes.seq)
    B, K, G, T, _ = q.shape
    rows, heads = (Span(_index(names) * size, size) for names, size in ((axes.batch, B), (axes.heads, K * G)))

    def blocks(length: int, device: Array, which: Array) -> Blocks:
        size = max(size for size in range(1, min(length, loops.BLOCK) + 1) if length % size == 0)
        return Blocks(size, length // size, jnp.where(which == 0, device, 2 * n - 1 - device) * length)

    return Grid(rows, heads, blocks(T, index, q_index), blocks(k.shape[2], source, k_index))


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Any, part: Any, index: Array) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0), tree, part)


def _index(names: tuple[str, ...]) -> int | Array:
    return jax.lax.axis_index(names) if names else 0


def _routes(n: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Device j holds chunks 2j and 2j + 1 in the sequence's own order; each goes to the device that has it in zigzag."""

    def zigzag_device(chunk: int) -> int:
        return chunk if chunk < n else 2 * n - 1 - chunk

    return [(j, zigzag_device(2 * j)) for j in range(n)], [(j, zigzag_device(2 * j + 1)) for j in range(n)]


def _to_zigzag(x: Array, axes: Axes) -> Array:
    """A device's share of the sequence, which is the second-to-last dim, exchanged for its pair of chunks."""
    even_route, odd_route = _routes(jax.lax.axis_size(axes.seq))
    first, second = jnp.split(x, 2, axis=-2)
    even, odd = jax.lax.ppermute(first, axes.seq, even_route), jax.lax.ppermute(second, axes.seq, odd_route)
    # Of chunks i and 2n-1-i, the first is even if i is.
    is_even = jax.lax.axis_index(axes.seq) % 2 == 0
    return jnp.stack([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)])


def _from_zigzag(pair: Array, axes: Axes) -> Array:
    """The inverse of `_to_zigzag`."""
    is_even = jax.lax.axis_index(axes.seq) % 2 == 0
    even, odd = jnp.where(is_even, pair[0], pair[1]), jnp.where(is_even, pair[1], pair[0])
    backwards = ([(there, here) for here, there in route] for route in _routes(jax.lax.axis_size(axes.seq)))
    halves = (jax.lax.ppermute(half, axes.seq, route) for half, route in zip((even, odd), backwards, strict=True))
    return jnp.concatenate(list(halves), axis=-2)
