"""The position-wise feed-forward network, plain and gated.

B batch, T position, D embed, F mlp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.differentiation import with_backward
from transformer.layers.linear import Linear
from transformer.sharding import constrain
from transformer.types import Array, DTypeLike, Float

_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu_tanh(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016, section 2).

    Saves its input alone and computes one tanh again backwards; automatic differentiation saves four arrays as large.
    """
    return with_backward(_gelu_forward, _gelu_backward, x)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return 0.5 * x * (1 + jnp.tanh(_SLOPE * (x + _CUBIC * x * x * x))), x


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    t = jnp.tanh(_SLOPE * (x + _CUBIC * x * x * x))
    return (dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (_SLOPE * (1 + 3 * _CUBIC * x * x))),)


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "relu": (jax.nn.relu, False),
    "gelu": (gelu_tanh, False),
    "gelu_exact": (functools.partial(jax.nn.gelu, approximate=False), False),
    "silu": (jax.nn.silu, False),
    "geglu": (gelu_tanh, True),
    "geglu_exact": (functools.partial(jax.nn.gelu, approximate=False), True),
    "swiglu": (jax.nn.silu, True),
}
"""Name → the function and whether a second projection is gated by it (Shazeer 2020, equations 5 and 6)."""


class FeedForward(nnx.Module):
    """down(f(up(x))), or down(f(gate(x)) · up(x)) for a gated activation.

    Vaswani et al. 2017, equation 2; Shazeer 2020.

    Args:
        activation: a name of `ACTIVATIONS`.
        kernel_init, out_init: initialisers of the projections in, and of the one back to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str = "gelu",
        use_bias: bool = True,
        kernel_init: Callable[..., Array],
        out_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        into = functools.partial(
            Linear, (embed_dim,), (mlp_dim,), axes=("embed", "mlp"), use_bias=use_bias, kernel_init=kernel_init,
            dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.up = into()
        self.gate = into() if ACTIVATIONS[activation][1] else None
        self.down = Linear(
            (mlp_dim,), (embed_dim,), axes=("mlp", "embed"), use_bias=use_bias, kernel_init=out_init,
            dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Each position on its own, [B, T, D] → [B, T, D]."""
        function, _ = ACTIVATIONS[self.activation]
        with jax.named_scope("feed_forward"):
            up = constrain(self.up(x_BTD), "batch", "seq", "mlp")
            hidden = function(up) if self.gate is None else function(self.gate(x_BTD)) * up
            return constrain(self.down(hidden), "batch", "stream", None)
