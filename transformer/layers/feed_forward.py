"""The position-wise feed-forward network, plain and gated.

B batch, T position, D embed, F mlp.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.differentiation import with_backward
from transformer.errors import Config, require
from transformer.layers.linear import DEFAULT_INIT, Linear
from transformer.sharding import constrain
from transformer.types import Array, DTypeLike, Float, Keys

_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu_tanh(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016, section 2).

    Saves only its input and recomputes one tanh in the backward pass; automatic differentiation saves four arrays of that size.
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

Activation = Literal["relu", "gelu", "gelu_exact", "silu", "geglu", "geglu_exact", "swiglu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(Config):
    """One feed-forward network for all tokens."""

    kind: Literal["dense"] = "dense"
    """The same network for every token."""
    dim: int | None = None
    """Width of the hidden layer. null: 4 embed_dim, or 8/3 embed_dim (rounded up to a multiple of 64) when gated."""
    activation: Activation = "gelu"
    """geglu, geglu_exact and swiglu are gated. gelu and geglu use the tanh approximation, as in GPT-2."""
    bias: bool = True
    """Biases in the linear layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "dim", self.dim is None or self.dim >= 1, "allowed: 1 or more, or null")

    def width(self, embed_dim: int) -> int:
        """`dim` with its default filled in."""
        return mlp_width(self.dim, self.activation, embed_dim)

    def flops(self, embed_dim: int) -> float:
        """FLOPs of one token; a multiply-add counts as two."""
        return 2.0 * num_matrices(self.activation) * embed_dim * self.width(embed_dim)


def mlp_width(dim: int | None, activation: str, embed_dim: int) -> int:
    """The width of a hidden layer, with its default filled in."""
    if dim is not None:
        return dim
    return -(-8 * embed_dim // (3 * 64)) * 64 if ACTIVATIONS[activation][1] else 4 * embed_dim


def num_matrices(activation: str) -> int:
    """Number of matrices of a feed-forward network: three if gated, else two."""
    return 3 if ACTIVATIONS[activation][1] else 2


class FeedForward(nnx.Module):
    """down(f(up(x))), or down(f(gate(x)) · up(x)) for a gated activation.

    Vaswani et al. 2017, equation 2; Shazeer 2020.

    Args:
        activation: a name of `ACTIVATIONS`.
        kernel_init, out_init: initialisers of the input projections, and of the output projection to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str = "gelu",
        use_bias: bool = True,
        kernel_init: Callable[..., Array] = DEFAULT_INIT,
        out_init: Callable[..., Array] = DEFAULT_INIT,
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

    def __call__(self, x_BTD: Float[Array, "B T D"], adapter_key: Keys | None = None) -> Float[Array, "B T D"]:
        """Each position separately, [B, T, D] → [B, T, D]; a key enables the dropout of adapters."""
        function, _ = ACTIVATIONS[self.activation]
        with jax.named_scope("feed_forward"):
            up = constrain(self.up(x_BTD, adapter_key), "batch", "seq", "mlp")
            hidden = function(up) if self.gate is None else function(self.gate(x_BTD, adapter_key)) * up
            return constrain(self.down(hidden, adapter_key), "batch", "stream", None)
