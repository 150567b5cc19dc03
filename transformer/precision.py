"""Float32 products at full precision.

By default a float32 product runs in bfloat16 passes on a TPU and in TF32 on a GPU. This suits a network's layers, but not
products in which small differences decide the result or errors accumulate: a router's logits, a state that thousands of
positions write to, an inverse. Operands in bfloat16 are multiplied at the default precision, which is exact for
them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer.types import Array, wide


def exact(*operands: Array) -> jax.lax.Precision | None:
    """The precision for a product of these operands: the highest in float32 or wider, the default in narrower types."""
    return jax.lax.Precision.HIGHEST if all(x.dtype == wide(x.dtype) for x in operands) else None


def einsum(subscripts: str, *operands: Array) -> Array:
    """`jnp.einsum` at the precision that `exact` gives."""
    return jnp.einsum(subscripts, *operands, precision=exact(*operands))


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` at the precision that `exact` gives."""
    return jnp.matmul(a, b, precision=exact(a, b))
