"""Token embedding and its transpose, the tied output head.

B batch, T position, D embed, V vocab; "..." (`*dims`) is any number of leading dims.

The gradient of a lookup is left to XLA's scatter-add, which adds in the table's own type. On XLA:CPU a sort with a
segment sum and a hand-written loop are within a millisecond of it, and a one-hot product is many times slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.differentiation import with_backward
from transformer.sharding import constrain, with_axes
from transformer.types import Array, DTypeLike, Float, Int, wide


def embed_lookup(
    table_VD: Float[Array, "V D"], tokens: Int[Array, "*dims"], *, dtype: DTypeLike | None = None
) -> Float[Array, "*dims D"]:
    """The row of the table for each token, in `dtype` (by default the table's).

    Rows are cast after the lookup, so that gradients of a frequent token add up in the table's type. A token
    outside the table gives a row of NaN, so that training with a wrong vocabulary fails visibly.
    """
    return jnp.take(table_VD, tokens, axis=0, mode="fill").astype(dtype or table_VD.dtype)


def embed_attend(
    x: Float[Array, "... D"], table_VD: Float[Array, "V D"], *, dtype: DTypeLike | None = None
) -> Float[Array, "... V"]:
    """x · tableᵀ: operands in `dtype` (by default the type of `x`), logits accumulated and returned in float32.

    Press & Wolf 2017. The backward pass takes the logits' gradient in `dtype` too, so that under bfloat16 all three
    products are bfloat16 with float32 accumulation; automatic differentiation would make two of them float32 ones,
    off the tensor cores. In float32 the gradient is the automatic one.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    forward, backward = (
        functools.partial(_attend_forward, dtype=dtype),
        functools.partial(_attend_backward, dtype=dtype),
    )
    return with_backward(forward, backward, x, table_VD)


class Embedding(nnx.Module):
    """A table of `vocab_size` rows, to look up tokens and, if tied, to score them.

    Args:
        axes: the logical names of the table's two dims.
        init: the initialiser of the table.
        dtype: the type to compute in; the table is kept in `param_dtype`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        axes: tuple[str | None, str | None] = ("vocab", "embed"),
        init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        self.vocab_axis = axes[0]
        self.table = nnx.Param(with_axes(init, *axes)(rngs.params(), (vocab_size, dim), param_dtype))

    def __call__(self, tokens: Int[Array, "*dims"]) -> Float[Array, "*dims D"]:
        """[...] token ids → [..., D] in `dtype`."""
        with jax.named_scope("embed"):
            return embed_lookup(self._whole_rows(), tokens, dtype=self.dtype)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """[..., D] → float32 logits [..., V] over the table's rows."""
        with jax.named_scope("unembed"):
            return embed_attend(x, self._whole_rows(), dtype=self.dtype)

    def cast_parameters(self) -> None:
        """Keep the table in `dtype`, for inference, as `Linear.cast_parameters`."""
        self.table.set_value(self.table[...].astype(self.dtype))

    def _whole_rows(self) -> Float[Array, "V D"]:
        """The table with whole rows: if they are sharded, they are gathered here, once, and their gradient
        is scattered; otherwise the partitioner might shard activations by features instead, and move those."""
        return constrain(self.table[...], self.vocab_axis, None)


def _attend_forward(x: Array, table_VD: Array, *, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    logits = _contract(x.astype(dtype), table_VD.astype(dtype), (x.ndim - 1,), (1,))
    return logits, (x, table_VD)


def _attend_backward(saved: tuple[Array, Array], dlogits: Array, *, dtype: jnp.dtype) -> tuple[Array, Array]:
    x, table_VD = saved
    dlogits = dlogits.astype(dtype)
    leading = tuple(range(x.ndim - 1))
    dx = _contract(dlogits, table_VD.astype(dtype), (x.ndim - 1,), (0,))
    dtable = _contract(dlogits, x.astype(dtype), leading, leading)
    return dx.astype(x.dtype), dtable.astype(table_VD.dtype)


def _contract(a: Array, b: Array, a_dims: tuple[int, ...], b_dims: tuple[int, ...]) -> Array:
    """The product summed over the paired dims, accumulated in float32 (float64 for float64 operands)."""
    return jax.lax.dot_general(a, b, ((a_dims, b_dims), ((), ())), preferred_element_type=wide(a.dtype))
