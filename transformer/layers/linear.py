"""A linear map between tensors of named dims, and dropout.

B batch, T position, D embed, N heads, H head_dim, F mlp.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.sharding import with_axes
from transformer.types import Array, DTypeLike, Float, PRNGKeyArray


class Linear(nnx.Module):
    """An affine map from dims `in_shape` to dims `out_shape`.

    Args:
        in_shape, out_shape: for example (D,) and (N, H) for a projection into heads, or (N, H) and (D,) out of them.
        axes: the logical name of each dim of the kernel, `in_shape` first.
        kernel_init: called on the kernel as a matrix, so that fans are counted right.
        dtype: the type to compute in; parameters are kept in `param_dtype`.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        axes: tuple[str, ...],
        use_bias: bool = True,
        kernel_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_in = len(in_shape)
        self.dtype = dtype
        matrix = (math.prod(in_shape), math.prod(out_shape))
        shape = (*in_shape, *out_shape)

        def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return kernel_init(key, matrix, dtype).reshape(shape)

        self.kernel = nnx.Param(with_axes(init, *axes)(rngs.params(), shape, param_dtype))
        zeros = with_axes(nnx.initializers.zeros, *axes[self.num_in :])
        self.bias = nnx.Param(zeros(rngs.params(), out_shape, param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """[..., *in_shape] → [..., *out_shape] in `dtype`."""
        kernel = self.kernel[...].astype(self.dtype)
        rows = x.astype(self.dtype).reshape(*x.shape[: x.ndim - self.num_in], -1)
        y = rows @ kernel.reshape(rows.shape[-1], -1)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype).reshape(-1)
        return y.reshape(*y.shape[:-1], *kernel.shape[self.num_in :])


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Zero each element with probability `rate` and scale the rest by 1/(1-rate); the identity without a key.

    Srivastava et al. 2014, inverted so that inference needs no scaling.
    """
    if rate == 0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
