"""Differential attention: the difference of two softmax maps, in which the noise that they share cancels.

B batch, T query position, S key position, D embed, N query heads, K key/value heads, H head_dim of one of the two maps.
Ye et al. 2024 (Differential Transformer), equations 1 to 3.

    DiffAttn(x) = (softmax(q1 k1ᵀ / √H) - λ softmax(q2 k2ᵀ / √H)) v            values are 2H wide
    λ           = exp(λq1 · λk1) - exp(λq2 · λk2) + λ_init                      one for all heads of a layer
    head        = (1 - λ_init) · RMSNorm(DiffAttn(x))                           each head separately
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.dispatch import attend
from transformer.errors import Config, require
from transformer.layers.linear import DEFAULT_INIT, Linear
from transformer.layers.norm import RMSNorm
from transformer.layers.position import NoPositionConfig, PositionConfig, RotaryConfig, rotary
from transformer.mixers.context import NO_CONTEXT, Context
from transformer.mixers.heads import Backend, check_heads, check_rotary, seen_keys
from transformer.mixers.state import KVCache, nan_on_overflow
from transformer.randomness import split
from transformer.resume import Free
from transformer.sharding import constrain, with_axes
from transformer.types import Array, DTypeLike, Float, Int, Keys, widen


def initial_lambda(layer: int | Int[Array, ""]) -> Float[Array, ""]:
    """λ_init of a layer, counted from 0: 0.8 - 0.6 exp(-0.3 layer), from 0.2 towards 0.8 (section 2.1)."""
    return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(layer, jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentialConfig(Config):
    """Differential attention: the difference of two softmax maps (Ye et al. 2024)."""

    causal_only: ClassVar[bool] = False
    has_distributions: ClassVar[bool] = False

    kind: Literal["differential"] = "differential"
    """A difference of two softmax maps, in which the noise that they share cancels."""
    num_heads: int = 6
    """Number of heads: half of those of a Transformer of the same width, since each head is twice as wide."""
    num_kv_heads: int | None = None
    """Number of key/value heads, which divides num_heads. null: num_heads."""
    head_dim: int | None = None
    """Features of a head's queries in one of the two maps. null: embed_dim / (2 num_heads)."""
    position: PositionConfig = NoPositionConfig()
    """How attention knows positions: none, rotary, alibi, or relative."""
    window: int | None = None
    """Each token sees this many tokens before itself, and in an encoder as many after. null: all."""
    bias: bool = False
    """Biases in the linear layers."""
    backend: Free[Backend] = "auto"
    """Implementation of attention. It is an error to name one that cannot run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)
        require(self, "window", self.window is None or self.window >= 1, "allowed: 1 or more, or null")

    @property
    def structure(self) -> DifferentialConfig:
        """The settings that determine the parameters: layers in which these are equal can be stacked."""
        return dataclasses.replace(self, position=NoPositionConfig(), window=None, backend="auto")

    def sizes(self, embed_dim: int) -> tuple[int, int, int]:
        """N, K and H with their defaults filled in."""
        return self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim or embed_dim // (2 * self.num_heads)

    def check(self, embed_dim: int) -> tuple[str, str] | None:
        """The field that does not suit `embed_dim` and what is allowed, or None."""
        if self.head_dim is None and embed_dim % (2 * self.num_heads):
            return "num_heads", f"allowed: a divisor of half of embed_dim ({embed_dim} / 2), or set head_dim"
        return check_rotary(self.position, self.sizes(embed_dim)[2])

    def flops(self, embed_dim: int, length: int, *, causal: bool) -> float:
        """FLOPs of one token in a context of `length`, projections included; a multiply-add counts as two."""
        N, K, H = self.sizes(embed_dim)
        # Two maps of H features each over values of 2H.
        maps = 2 * 2 * seen_keys(self, length, causal=causal) * N * 3 * H
        return 2 * embed_dim * 2 * H * (2 * N + 2 * K) + maps


class DifferentialAttention(nnx.Module):
    """Self-attention in N heads of 2H values each, over K key/value heads.

    Each map is a call of `attend`, so any backend that supports values wider than keys can compute it; the T×S arrays are
    created only if asked for.

    Args:
        config: its sizes and positions.
        dropout_rate: of the weights of both maps.
        kernel_init, out_init: initialisers of the input projections, and of the output projection to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        config: DifferentialConfig,
        *,
        dropout_rate: float = 0.0,
        kernel_init: Callable[..., Array] = DEFAULT_INIT,
        out_init: Callable[..., Array] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = c = config
        N, K, H = self.sizes = c.sizes(embed_dim)
        self.dropout_rate = dropout_rate
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def project(heads: int, axis: str) -> Linear:
            axes = ("embed", axis, "head_dim")
            return Linear((embed_dim,), (heads, 2 * H), axes=axes, use_bias=c.bias, kernel_init=kernel_init, **types)

        # Queries and keys of the first map, followed by those of the second.
        self.query = project(N, "heads")
        self.key = project(K, "kv_heads")
        self.value = project(K, "kv_heads")
        # λq1, λk1, λq2, λk2.
        vectors = with_axes(nnx.initializers.normal(0.1), None, "head_dim")
        self.lambdas = nnx.Param(vectors(rngs.params(), (4, H), param_dtype))
        self.norm = RMSNorm(2 * H, axis="head_dim", epsilon=1e-5, param_dtype=param_dtype, rngs=rngs)
        axes = ("heads", "head_dim", "embed")
        init = kernel_init if out_init is None else out_init
        self.out = Linear((N, 2 * H), (embed_dim,), axes=axes, use_bias=c.bias, kernel_init=init, **types)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context = NO_CONTEXT
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Float[Array, "B n T S"] | None]:
        """Self-attention over x, or over the state's keys with x's after them.

        Returns:
            The output, the state with x in it (None without one), and the difference of the two maps (None unless asked
            for), whose rows sum to 1 - λ and which may be negative.
        """
        c, state, key = self.config, context.state, context.adapter_key
        with jax.named_scope("differential_attention"):
            mask = context.self_mask(x_BTD, window=c.window)
            q = constrain(self.query(x_BTD, key), "batch", "seq", "heads", "head_dim")
            k, v = (
                constrain(linear(x_BTD, key), "batch", "seq", "kv_heads", "head_dim")
                for linear in (self.key, self.value)
            )
            if isinstance(c.position, RotaryConfig):
                positions_BT = context.positions(x_BTD)
                q, k = (self._rotate(x, positions_BT, c.position, context.room) for x in (q, k))
            if state is not None:
                assert isinstance(state, KVCache)
                state = state.append(k, v, context.valid_BT)
                mask = context.cached_mask(mask, state)
                k, v = state.keys_and_values(q.dtype)
            score_mod = context.scores(c.position, self.sizes[0])
            maps = zip(jnp.split(q, 2, -1), jnp.split(k, 2, -1), _two_keys(context.key), strict=True)
            (first, first_weights), (second, second_weights) = (
                attend(
                    q_BTNH, k_BSKH, v, mask, score_mod=score_mod, dropout_rate=self.dropout_rate, dropout_key=dropout_key,
                    backend=c.backend, return_weights=context.return_weights,
                )
                for q_BTNH, k_BSKH, dropout_key in maps
            )  # fmt: skip
            initial = initial_lambda(context.layer)
            lam = self.value_of_lambda(context.layer)
            # The maps are nearly equal at first: their difference, and its gradient for λ, need the wider type.
            first, second = widen(first), widen(second)
            out = first - lam.astype(first.dtype) * second
            out = (self.norm(out) * (1 - initial).astype(out.dtype)).astype(x_BTD.dtype)
            if state is not None:
                out = nan_on_overflow(out, state)
            weights = None
            if first_weights is not None and second_weights is not None:
                weights = first_weights - lam.astype(first_weights.dtype) * second_weights
            return constrain(self.out(context.at("heads", out), key), "batch", "stream", None), state, weights

    def value_of_lambda(self, layer: int | Int[Array, ""] = 0) -> Float[Array, ""]:
        """The current λ of the layer with that number (equation 2), in float32."""
        q1, k1, q2, k2 = self.lambdas[...].astype(jnp.float32)
        return jnp.exp(q1 @ k1) - jnp.exp(q2 @ k2) + initial_lambda(layer)

    def make_state(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens, with 2H numbers a head."""
        _, K, H = self.sizes
        return KVCache.empty(batch_size, max_length, K, 2 * H, self.out.dtype)

    def _rotate(self, x: Array, positions_BT: Array, position: RotaryConfig, length: int | None) -> Array:
        """Rotates each map's half separately."""
        dim = position.dim(self.sizes[2])
        halves = (
            rotary(half, positions_BT, theta=position.theta, scaling=position.scaling, dim=dim, length=length)
            for half in jnp.split(x, 2, axis=-1)
        )
        return jnp.concatenate(list(halves), axis=-1)


def _two_keys(key: Keys | None) -> tuple[Keys | None, Keys | None]:
    if key is None:
        return None, None
    first, second = split(key, 2)
    return first, second
