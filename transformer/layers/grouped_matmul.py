"""Products of groups of vectors with a matrix for each group, at the cost of the vectors that there are.

N vectors, E groups, D input, F output, M rows of a block, V blocks.

The groups are consecutive: the first `sizes[0]` vectors are multiplied by the first matrix, and so on. Their sizes are only
known at run time. There are three ways to compute the products:

- `loop`, on a CPU: a loop over blocks of up to M vectors of one group, each a product with a slice of the matrices. Its length
  is that of the groups, so vectors of no group cost nothing.
- `ragged`, on a TPU: `jax.lax.ragged_dot`, which is a kernel there.
- `blocks`, elsewhere: each group padded to whole blocks (block-sparse products; Gale et al. 2022, section 5.1), several of
  which are multiplied at once with copies of their matrices.

`jax.lax.ragged_dot` multiplies every vector by every matrix on a CPU, and by default on a GPU too (jax 0.10, XLA's
RaggedDotRewriter), which is E times the work and the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from transformer.loop_length import expected_trips
from transformer.types import Array, Float, Int, wide

LOOP_BLOCK = 128
"""Vectors of a block on a CPU: fewer are slower to multiply, and more fit the groups less well."""
BLOCK = 512
"""Vectors of a block elsewhere."""
COPIED = 2**27
"""Bytes of matrices that are copied for blocks multiplied at once."""


def grouped_matmul(
    x_ND: Float[Array, "N D"], kernel_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"]
) -> Float[Array, "N F"]:
    """The product of each vector with the matrix of its group; zeros for vectors after the last group.

    It is bilinear, and so are its derivatives, which are written in the same products: all orders and both modes work.

    Args:
        sizes_E: vectors in each group, consecutive from the first vector on; at most N in all.
    """
    _check(x_ND, kernel_EDF)
    return _matmul_p.bind(x_ND, kernel_EDF, sizes_E)


def grouped_outer(
    x_ND: Float[Array, "N D"], y_NF: Float[Array, "N F"], sizes_E: Int[Array, " E"]
) -> Float[Array, "E D F"]:
    """Σ x yᵀ over the vectors of each group, accumulated in float32 or wider: the gradient of `grouped_matmul`'s matrices."""
    _check(x_ND, y_NF)
    return _outer_p.bind(x_ND, y_NF, sizes_E)


def is_grouped_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint` that saves what `grouped_matmul` returns."""
    return primitive is _matmul_p


def _check(a: Array, b: Array) -> None:
    if a.dtype != b.dtype:
        raise ValueError(f"a grouped product of {a.dtype} and {b.dtype}; expected operands of one type")


# On a CPU: a loop over blocks, each at its place among the vectors.


def _block_at(number: Array, sizes_E: Array, rows: int, total: int) -> tuple[Array, Array, Array]:
    """The group of a block, its first vector, and which of its rows are the group's and not an earlier block's."""
    ends_E, lasts_E = jnp.cumsum(sizes_E), jnp.cumsum(_blocks(sizes_E, rows))
    group = _group_of(number, lasts_E)
    first = ends_E[group] - sizes_E[group] + (number - lasts_E[group] + _blocks(sizes_E[group], rows)) * rows
    # A slice does not reach beyond the last vector.
    start = jnp.minimum(first, total - rows)
    places_M = start + jnp.arange(rows, dtype=jnp.int32)
    return group, start, ((places_M >= first) & (places_M < ends_E[group]))[:, None]


def _expected_blocks(total: int, groups: int, rows: int) -> float:
    """Blocks of all vectors, where each group's last block is half full."""
    return total / rows + groups / 2


def _loop_matmul(x_ND: Array, kernel_EDF: Array, sizes_E: Array) -> Array:
    N, sizes_E = x_ND.shape[0], sizes_E.astype(jnp.int32)
    rows = min(LOOP_BLOCK, N)

    def step(number: Array, y_NF: Array) -> Array:
        group, start, is_own_M1 = _block_at(number, sizes_E, rows, N)
        x_MD = jax.lax.dynamic_slice_in_dim(x_ND, start, rows)
        product_MF = x_MD @ jax.lax.dynamic_index_in_dim(kernel_EDF, group, keepdims=False)
        before_MF = jax.lax.dynamic_slice_in_dim(y_NF, start, rows)
        return jax.lax.dynamic_update_slice_in_dim(y_NF, jnp.where(is_own_M1, product_MF, before_MF), start, 0)

    zeros_NF = jnp.zeros((N, kernel_EDF.shape[2]), x_ND.dtype)
    with expected_trips(_expected_blocks(N, sizes_E.shape[0], rows)):
        return jax.lax.fori_loop(0, _blocks(sizes_E, rows).sum(dtype=jnp.int32), step, zeros_NF)


def _loop_outer(x_ND: Array, y_NF: Array, sizes_E: Array) -> Array:
    N, sizes_E = x_ND.shape[0], sizes_E.astype(jnp.int32)
    rows = min(LOOP_BLOCK, N)

    def step(number: Array, sums_EDF: Array) -> Array:
        group, start, is_own_M1 = _block_at(number, sizes_E, rows, N)
        x_MD = jax.lax.dynamic_slice_in_dim(x_ND, start, rows)
        y_MF = jax.lax.dynamic_slice_in_dim(y_NF, start, rows)
        product_DF = _outer(jnp.where(is_own_M1, x_MD, jnp.zeros_like(x_MD)), y_MF)
        sum_DF = jax.lax.dynamic_index_in_dim(sums_EDF, group, keepdims=False) + product_DF
        return jax.lax.dynamic_update_index_in_dim(sums_EDF, sum_DF, group, 0)

    zeros_EDF = jnp.zeros((sizes_E.shape[0], x_ND.shape[1], y_NF.shape[1]), wide(x_ND.dtype))
    with expected_trips(_expected_blocks(N, sizes_E.shape[0], rows)):
        sums_EDF = jax.lax.fori_loop(0, _blocks(sizes_E, rows).sum(dtype=jnp.int32), step, zeros_EDF)
    return sums_EDF.astype(x_ND.dtype)


# On a GPU: groups padded to whole blocks, several at once.


def _padded(sizes_E: Array, total: int, matrix: int, itemsize: int) -> tuple[Array, Array, Array]:
    """For turns of blocks at once: each block's group; its vectors, `total` in an empty row; and each vector's row."""
    E, rows = sizes_E.shape[0], min(BLOCK, total)
    V = -(-total // rows) + E
    at_once = max(1, min(V, COPIED // (matrix * itemsize)))
    turns = -(-V // at_once)
    ends_E, counts_E = jnp.cumsum(sizes_E), _blocks(sizes_E, rows)
    firsts_E, lasts_E = jnp.cumsum(counts_E) - counts_E, jnp.cumsum(counts_E)
    blocks_V = jnp.arange(turns * at_once, dtype=jnp.int32)
    groups_V = _group_of(blocks_V, lasts_E)
    starts_V = ends_E[groups_V] - sizes_E[groups_V] + (blocks_V - firsts_E[groups_V]) * rows
    vectors_VM = starts_V[:, None] + jnp.arange(rows, dtype=jnp.int32)
    is_own_VM = (blocks_V < lasts_E[-1])[:, None] & (vectors_VM < ends_E[groups_V][:, None])
    vectors_VM = jnp.where(is_own_VM, vectors_VM, total)
    vectors_N = jnp.arange(total, dtype=jnp.int32)
    groups_N = _group_of(vectors_N, ends_E)
    rows_N = firsts_E[groups_N] * rows + vectors_N - (ends_E - sizes_E)[groups_N]
    rows_N = jnp.where(vectors_N < ends_E[-1], rows_N, turns * at_once * rows)
    return groups_V.reshape(turns, at_once), vectors_VM.reshape(turns, at_once, rows), rows_N


def _blocks_matmul(x_ND: Array, kernel_EDF: Array, sizes_E: Array) -> Array:
    _, D, F = kernel_EDF.shape
    groups, vectors, rows_N = _padded(sizes_E.astype(jnp.int32), x_ND.shape[0], D * F, x_ND.dtype.itemsize)

    def turn(_: None, given: tuple[Array, Array]) -> tuple[None, Array]:
        groups_V, vectors_VM = given
        return None, jnp.einsum("VMD,VDF->VMF", gathered_rows(x_ND, vectors_VM), kernel_EDF[groups_V])

    _, products = jax.lax.scan(turn, None, (groups, vectors))
    return gathered_rows(products.reshape(-1, F), rows_N)


def _blocks_outer(x_ND: Array, y_NF: Array, sizes_E: Array) -> Array:
    E, D, F = sizes_E.shape[0], x_ND.shape[1], y_NF.shape[1]
    itemsize = jnp.dtype(wide(x_ND.dtype)).itemsize
    groups, vectors, _ = _padded(sizes_E.astype(jnp.int32), x_ND.shape[0], D * F, itemsize)

    def turn(sums_EDF: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        groups_V, vectors_VM = given
        each_VDF = jax.vmap(_outer)(gathered_rows(x_ND, vectors_VM), gathered_rows(y_NF, vectors_VM))
        return sums_EDF.at[groups_V].add(each_VDF), None

    sums_EDF, _ = jax.lax.scan(turn, jnp.zeros((E, D, F), wide(x_ND.dtype)), (groups, vectors))
    return sums_EDF.astype(x_ND.dtype)


# On a TPU: the compiler's own.


def _ragged_matmul(x_ND: Array, kernel_EDF: Array, sizes_E: Array) -> Array:
    sizes_E = sizes_E.astype(jnp.int32)
    y_NF = jax.lax.ragged_dot(x_ND, kernel_EDF, sizes_E)
    is_of_group = jnp.arange(x_ND.shape[0], dtype=jnp.int32) < sizes_E.sum(dtype=jnp.int32)
    return jnp.where(is_of_group[:, None], y_NF, jnp.zeros_like(y_NF))


def _ragged_outer(x_ND: Array, y_NF: Array, sizes_E: Array) -> Array:
    over_vectors = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    sums_EDF = jax.lax.ragged_dot_general(
        x_ND, y_NF, sizes_E.astype(jnp.int32), over_vectors, preferred_element_type=wide(x_ND.dtype)
    )
    return sums_EDF.astype(x_ND.dtype)


WAYS = {
    "loop": (_loop_matmul, _loop_outer),
    "blocks": (_blocks_matmul, _blocks_outer),
    "ragged": (_ragged_matmul, _ragged_outer),
}
"""The ways to compute the products, and the sums of outer products."""


def _blocks(size: Array, rows: int) -> Array:
    return (size + (rows - 1)) // rows


def _group_of(place: Array, ends_E: Array) -> Array:
    """The group that each place belongs to, where the groups end at these; the last one for those after it."""
    before = (ends_E <= place[..., None]).sum(-1, dtype=jnp.int32)
    return jnp.minimum(before, ends_E.shape[0] - 1)


def gathered_rows(x: Array, index: Array) -> Array:
    """The vectors at these places; zeros for a place after the last."""
    return x.at[index].get(mode="fill", fill_value=0)


def _outer(x_MD: Array, y_MF: Array) -> Array:
    return jax.lax.dot_general(x_MD, y_MF, (((0,), (0,)), ((), ())), preferred_element_type=wide(x_MD.dtype))


# Both products as operations of JAX. Each is linear in its first two operands, and each one's gradients are the other or itself.

_matmul_p, _outer_p = Primitive("grouped_matmul"), Primitive("grouped_outer")

Operands = Sequence[Any]


def _jvp(primitive: Primitive, primals: Operands, tangents: Operands) -> tuple[Any, Any]:
    a, b, sizes = primals
    da, db, _ = tangents
    out = primitive.bind(a, b, sizes)
    terms = [primitive.bind(da, b, sizes)] if type(da) is not ad.Zero else []
    terms += [primitive.bind(a, db, sizes)] if type(db) is not ad.Zero else []
    if not terms:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, functools.reduce(ad.add_tangents, terms)


def _matmul_transpose(dy_NF: Any, x_ND: Any, kernel_EDF: Any, sizes_E: Array) -> list[Any]:
    dy_NF = ad.instantiate_zeros(dy_NF)
    dx_ND = _matmul_p.bind(dy_NF, kernel_EDF.swapaxes(1, 2), sizes_E) if ad.is_undefined_primal(x_ND) else None
    dkernel_EDF = _outer_p.bind(x_ND, dy_NF, sizes_E) if ad.is_undefined_primal(kernel_EDF) else None
    return [dx_ND, dkernel_EDF, None]


def _outer_transpose(dsum_EDF: Any, x_ND: Any, y_NF: Any, sizes_E: Array) -> list[Any]:
    dsum_EDF = ad.instantiate_zeros(dsum_EDF)
    dx_ND = _matmul_p.bind(y_NF, dsum_EDF.swapaxes(1, 2), sizes_E) if ad.is_undefined_primal(x_ND) else None
    dy_NF = _matmul_p.bind(x_ND, dsum_EDF, sizes_E) if ad.is_undefined_primal(y_NF) else None
    return [dx_ND, dy_NF, None]


def _batch(primitive: Primitive, operands: Operands, dims: Sequence[Any]) -> tuple[Any, int]:
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    operands = [batching.bdim_at_front(x, d, size) for x, d in zip(operands, dims, strict=True)]
    return jax.lax.map(lambda each: primitive.bind(*each), tuple(operands)), 0


def _define(primitive: Primitive, which: int, shape: Callable[..., tuple[int, ...]], transpose: Callable) -> None:
    primitive.def_impl(jax.jit(primitive.bind))
    primitive.def_abstract_eval(lambda a, b, sizes: a.update(shape=shape(a, b, sizes)))
    ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive)
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    for way, platform in (("blocks", None), ("loop", "cpu"), ("ragged", "tpu")):
        lowered = mlir.lower_fun(WAYS[way][which], multiple_results=False)
        mlir.register_lowering(primitive, lowered, platform=platform)


_define(_matmul_p, 0, lambda x, kernel, _: (x.shape[0], kernel.shape[2]), _matmul_transpose)
_define(_outer_p, 1, lambda x, y, sizes: (sizes.shape[0], x.shape[1], y.shape[1]), _outer_transpose)
