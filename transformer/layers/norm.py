"""Layer norm and root-mean-square norm, each with a custom backward pass.

D embed (the normalised dim, always the last); "..." is any number of leading dims, usually B batch and T position.

Both have hand-written derivatives: the backward pass keeps the input and one or two numbers per row, where automatic
differentiation keeps more copies of the activation. On XLA:CPU a small GPT's training step needs less memory with it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.differentiation import with_backward
from transformer.sharding import with_axes
from transformer.types import Array, DTypeLike, Float, widen


def layer_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None = None,
    *,
    epsilon: float,
) -> Float[Array, "... D"]:
    """scale · (x - mean(x)) / sqrt(var(x) + epsilon) + bias, over the last dim (Ba et al. 2016, equation 4).

    Statistics and arithmetic are in float32 (float64 for a float64 `x`), the result in `x.dtype`. The variance is
    the biased one, taken about the mean.
    """
    forward = functools.partial(_layer_norm_forward, epsilon=epsilon)
    return with_backward(forward, _layer_norm_backward, x, scale, bias)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], *, epsilon: float) -> Float[Array, "... D"]:
    """scale · x / sqrt(mean(x²) + epsilon), over the last dim (Zhang & Sennrich 2019, equation 4).

    Statistics and arithmetic are in float32 (float64 for a float64 `x`), the result in `x.dtype`.
    """
    return with_backward(functools.partial(_rms_norm_forward, epsilon=epsilon), _rms_norm_backward, x, scale)


class LayerNorm(nnx.Module):
    """`layer_norm` with a learned gain and, unless `use_bias` is off, a learned bias.

    Args:
        dim: the length of the last dim of the input.
        axis: its logical name; None: it is never sharded.
    """

    def __init__(
        self,
        dim: int,
        *,
        use_bias: bool = True,
        epsilon: float = 1e-5,
        axis: str | None = "embed",
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.epsilon = epsilon
        ones, zeros = with_axes(nnx.initializers.ones, axis), with_axes(nnx.initializers.zeros, axis)
        self.scale = nnx.Param(ones(rngs.params(), (dim,), param_dtype))
        self.bias = nnx.Param(zeros(rngs.params(), (dim,), param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """[..., D] → [..., D], in the type of `x`."""
        with jax.named_scope("layer_norm"):
            bias = None if self.bias is None else self.bias[...]
            return layer_norm(x, self.scale[...], bias, epsilon=self.epsilon)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned gain.

    Args:
        dim: the length of the last dim of the input.
        axis: its logical name.
    """

    def __init__(
        self,
        dim: int,
        *,
        epsilon: float = 1e-6,
        axis: str = "embed",
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(with_axes(nnx.initializers.ones, axis)(rngs.params(), (dim,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """[..., D] → [..., D], in the type of `x`."""
        with jax.named_scope("rms_norm"):
            return rms_norm(x, self.scale[...], epsilon=self.epsilon)


def _layer_norm_forward(x: Array, scale: Array, bias: Array | None, *, epsilon: float) -> tuple[Array, tuple]:
    widened = widen(x)
    mean = widened.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(widened - mean).mean(-1, keepdims=True) + epsilon)
    y = (widened - mean) * rstd * _row(scale, widened)
    if bias is not None:
        y = y + _row(bias, widened)
    return y.astype(x.dtype), (x, scale, bias, mean, rstd)


def _layer_norm_backward(saved: tuple, dy: Array) -> tuple[Array, Array, Array | None]:
    x, scale, bias, mean, rstd = saved
    unit = (widen(x) - mean) * rstd
    dy = dy.astype(unit.dtype)
    dunit = dy * _row(scale, unit)
    # The projections remove what changes the mean or the variance: neither affects the output.
    dx = rstd * (dunit - dunit.mean(-1, keepdims=True) - unit * (dunit * unit).mean(-1, keepdims=True))
    dbias = None if bias is None else _column_sum(dy).astype(bias.dtype)
    return dx.astype(x.dtype), _column_sum(dy * unit).astype(scale.dtype), dbias


def _rms_norm_forward(x: Array, scale: Array, *, epsilon: float) -> tuple[Array, tuple]:
    widened = widen(x)
    rstd = jax.lax.rsqrt(jnp.square(widened).mean(-1, keepdims=True) + epsilon)
    return (widened * rstd * _row(scale, widened)).astype(x.dtype), (x, scale, rstd)


def _rms_norm_backward(saved: tuple, dy: Array) -> tuple[Array, Array]:
    x, scale, rstd = saved
    unit = widen(x) * rstd
    dy = dy.astype(unit.dtype)
    dunit = dy * _row(scale, unit)
    dx = rstd * (dunit - unit * (dunit * unit).mean(-1, keepdims=True))
    return dx.astype(x.dtype), _column_sum(dy * unit).astype(scale.dtype)


def _row(param: Array, like: Array) -> Array:
    """[D] as [1, ..., 1, D], in the type of `like`."""
    return jnp.expand_dims(param.astype(like.dtype), range(like.ndim - 1))


def _column_sum(x: Array) -> Array:
    """[..., D] → [D]. The leading dims are summed in place: flattening them first would make a partitioner
    gather a batch and a sequence that are sharded separately."""
    return x.sum(range(x.ndim - 1))
