"""A linear layer between tensors of named dims.

B batch, T position, D embed, N heads, H head_dim, F mlp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.differentiation import with_backward
from transformer.precision import exact
from transformer.sharding import with_axes
from transformer.types import Array, DTypeLike, Float, Keys, PRNGKeyArray, wide

if TYPE_CHECKING:
    from transformer.layers.adapter import Adapter

DEFAULT_INIT = nnx.initializers.normal(0.02)
"""The initialiser of kernels, if none is given (Radford et al. 2019)."""


def dense(
    x: Float[Array, "*dims I"],
    kernel_IO: Float[Array, "I O"],
    bias_O: Float[Array, O] | None,
    *,
    out_dtype: DTypeLike | None = None,
    is_exact: bool = False,
) -> Float[Array, "*dims O"]:
    """x · kernel + bias over the last dim.

    The gradient is the automatic one, with another order of operands: see `_dense_backward`. With a wider `out_dtype` the
    backward pass takes the output's gradient in x's type, so that its products are in the narrow type too.

    Args:
        out_dtype: the type of the output, and of the bias; x's by default.
        is_exact: products of float32 at full precision (`transformer.precision`), also in the gradient.
    """
    precision = exact(x, kernel_IO) if is_exact else None
    forward = functools.partial(_dense_forward, out_dtype=out_dtype, precision=precision)
    backward = functools.partial(_dense_backward, precision=precision)
    return with_backward(forward, backward, x, kernel_IO, bias_O)


def _dense_forward(
    x: Array, kernel_IO: Array, bias_O: Array | None, *, out_dtype: DTypeLike | None, precision: Any
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    y = jnp.matmul(x, kernel_IO, precision=precision, preferred_element_type=out_dtype)
    if bias_O is not None:
        y = y + jnp.expand_dims(bias_O, range(y.ndim - 1))
    return y, (x, kernel_IO, bias_O)


def _dense_backward(
    saved: tuple[Array, Array, Array | None], dy: Array, *, precision: Any
) -> tuple[Array, Array, Array | None]:
    x, kernel_IO, bias_O = saved
    leading = tuple(range(x.ndim - 1))
    dbias = None if bias_O is None else dy.sum(leading, dtype=wide(x.dtype)).astype(bias_O.dtype)
    dy = dy.astype(x.dtype)
    dx = jax.lax.dot_general(dy, kernel_IO, (((dy.ndim - 1,), (1,)), ((), ())), precision=precision)
    # XLA:CPU transposes the first operand before it multiplies, so the narrower one comes first. This does not apply to
    # bfloat16, for which it has no such product.
    contract = functools.partial(
        jax.lax.dot_general, dimension_numbers=((leading, leading), ((), ())), precision=precision
    )
    if x.shape[-1] > dy.shape[-1] and x.dtype == wide(x.dtype):
        dkernel = contract(dy, x, preferred_element_type=wide(x.dtype)).T
    else:
        dkernel = contract(x, dy, preferred_element_type=wide(x.dtype))
    return dx, dkernel.astype(kernel_IO.dtype), dbias


class Linear(nnx.Module):
    """A linear layer, with an optional bias, from dims `in_shape` to dims `out_shape`.

    Args:
        in_shape, out_shape: for example (D,) and (N, H) for a projection into heads, or (N, H) and (D,) out of them.
        axes: the logical name of each dim of the kernel, `in_shape` first; None for a dim that is never sharded.
        kernel_init: called on the kernel as a matrix, so that fan-in and fan-out are computed correctly.
        dtype: the type to compute in; parameters are kept in `param_dtype`.
        is_exact: as for `dense`.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        use_bias: bool = True,
        kernel_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        is_exact: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_in = len(in_shape)
        self.dtype, self.is_exact = dtype, is_exact
        matrix = (math.prod(in_shape), math.prod(out_shape))
        shape = (*in_shape, *out_shape)

        def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return kernel_init(key, matrix, dtype).reshape(shape)

        self.kernel = nnx.Param(with_axes(init, *axes)(rngs.params(), shape, param_dtype))
        zeros = with_axes(nnx.initializers.zeros, *axes[self.num_in :])
        self.bias = nnx.Param(zeros(rngs.params(), out_shape, param_dtype)) if use_bias else None
        # Fine-tuning may give it one (`models/adapted.py`).
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(self, x: Float[Array, ...], adapter_key: Keys | None = None) -> Float[Array, ...]:
        """[..., *in_shape] → [..., *out_shape] in `dtype`; a key enables the dropout of an adapter."""
        return self._mapped(x, adapter_key=adapter_key)

    def logits(self, x: Float[Array, ...]) -> Float[Array, ...]:
        """As a call, with operands in `dtype`, but accumulated and returned in float32 (float64 for float64): scores are not
        rounded before a softmax."""
        return self._mapped(x, wide(self.dtype))

    def _mapped(self, x: Array, out_dtype: DTypeLike | None = None, adapter_key: Keys | None = None) -> Array:
        kernel = self.kernel[...].astype(self.dtype)
        # As a matrix: one well-tuned product on every device, whatever the dims mean.
        rows = x.astype(self.dtype).reshape(*x.shape[: x.ndim - self.num_in], -1)
        if self.adapter is None:
            bias = None if self.bias is None else self.bias[...].astype(out_dtype or self.dtype).reshape(-1)
            y = dense(rows, kernel.reshape(rows.shape[-1], -1), bias, out_dtype=out_dtype, is_exact=self.is_exact)
        else:
            bias = None if self.bias is None else self.bias[...].astype(self.dtype).reshape(-1)
            y = self.adapter(rows, self.kernel[...].reshape(rows.shape[-1], -1), bias, adapter_key)
            y = y.astype(out_dtype or self.dtype)
        return y.reshape(*y.shape[:-1], *kernel.shape[self.num_in :])

    def cast_parameters(self) -> None:
        """Keep the kernel in `dtype`, for inference: it is cast once, and not each time that it is read. An adapter, which needs
        it as it was trained, stays as it is."""
        if self.adapter is None:
            self.kernel.set_value(self.kernel[...].astype(self.dtype))

    def plain(self) -> Linear:
        """The same layer without an adapter: its one kernel includes the adapter's product."""
        if self.adapter is None:
            return self
        linear = jax.tree.map(lambda leaf: leaf, self)
        linear.kernel.set_value(self.adapter.merged(self.kernel[...]))
        linear.adapter = None
        return linear


def join(maps: Sequence[Linear]) -> Linear:
    """One layer whose outputs are those of `maps`, concatenated along the first output dim: one product instead of several."""
    maps = [linear.plain() for linear in maps]
    first = maps[0]
    joined = nnx.merge(*nnx.split(first))
    joined.kernel.set_value(jnp.concatenate([m.kernel[...] for m in maps], axis=first.num_in))
    if joined.bias is not None:
        joined.bias.set_value(jnp.concatenate([m.bias[...] for m in maps if m.bias is not None], axis=0))
    return joined
