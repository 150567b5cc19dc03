"""Products whose operands keep all of their bits.

By default a float32 product runs in bfloat16 passes on a TPU and in TF32 on a GPU. That is right for a network's layers and wrong
where small differences decide or errors add up: a router's choice, a state that thousands of positions write to, an inverse.
What is in bfloat16 already is multiplied as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer.types import Array, wide


def exact(*operands: Array) -> jax.lax.Precision | None:
    """The precision for a product of these operands: the highest in float32 or wider, the default in narrower types."""
    return jax.lax.Precision.HIGHEST if all(x.dtype == wide(x.dtype) for x in operands) else None


def einsum(subscripts: str, *operands: Array) -> Array:
    """`jnp.einsum` in that precision."""
    return jnp.einsum(subscripts, *operands, precision=exact(*operands))


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` in that precision."""
    return jnp.matmul(a, b, precision=exact(a, b))
