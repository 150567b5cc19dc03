"""Differential attention: the difference of two softmax maps, in which what both of them see by accident cancels.

B batch, T query position, S key position, D embed, N query heads, K key/value heads, H head_dim of one of the two maps.
Ye et al. 2024 (Differential Transformer), equations 1 to 3.

    DiffAttn(x) = (softmax(q1 k1ᵀ / √H) - λ softmax(q2 k2ᵀ / √H)) v            values are 2H wide
    λ           = exp(λq1 · λk1) - exp(λq2 · λk2) + λ_init                      one for all heads of a layer
    head        = (1 - λ_init) · RMSNorm(DiffAttn(x))                           each head by itself
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.dispatch import attend
from transformer.attention.mask import AttentionMask
from transformer.decode.cache import KVCache
from transformer.layers.linear import Linear
from transformer.layers.norm import RMSNorm
from transformer.layers.position import NO_SCALING, RotaryScaling, ScoreMod, rotary, token_positions
from transformer.sharding import constrain, with_axes
from transformer.types import Array, DTypeLike, Float, Int, PRNGKeyArray, widen


def initial_lambda(layer: int) -> float:
    """λ_init of a layer, counted from 0: 0.8 - 0.6 exp(-0.3 layer), from 0.2 towards 0.8 (section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class DifferentialAttention(nnx.Module):
    """Self-attention in N heads of 2H values each, over K key/value heads.

    Each map is a call of `attend`, so that whatever backend serves values wider than keys computes it; the T×S arrays are
    never made unless they are asked for.

    Args:
        num_heads: half of what a Transformer of the same width has, since each head is twice as wide.
        head_dim: H; None: embed_dim / (2 num_heads).
        layer: this layer's number from 0, which gives λ_init.
        rotary_period, rotary_scaling: as in `MultiHeadAttention`.
        dropout_rate: of the weights of both maps.
        backend: `auto` or a name of `dispatch.BACKENDS`.
        kernel_init, out_init: initialisers of the projections in, and of the one back to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer: int,
        use_bias: bool = False,
        rotary_period: float | None = None,
        rotary_scaling: RotaryScaling = NO_SCALING,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        kernel_init: Callable[..., Array],
        out_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        head_dim = embed_dim // (2 * num_heads) if head_dim is None else head_dim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.initial_lambda = initial_lambda(layer)
        self.rotary_period, self.rotary_scaling = rotary_period, rotary_scaling
        self.dropout_rate = dropout_rate
        self.backend = backend

        def project(heads: int, axis: str) -> Linear:
            return Linear(
                (embed_dim,), (heads, 2 * head_dim), axes=("embed", axis, "head_dim"), use_bias=use_bias,
                kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        # Queries and keys of the first map, and those of the second behind them.
        self.query = project(num_heads, "heads")
        self.key = project(num_kv_heads, "kv_heads")
        self.value = project(num_kv_heads, "kv_heads")
        # λq1, λk1, λq2, λk2.
        vectors = with_axes(nnx.initializers.normal(0.1), None, "head_dim")
        self.lambdas = nnx.Param(vectors(rngs.params(), (4, head_dim), param_dtype))
        self.norm = RMSNorm(2 * head_dim, axis="head_dim", epsilon=1e-5, param_dtype=param_dtype, rngs=rngs)
        self.out = Linear(
            (num_heads, 2 * head_dim), (embed_dim,), axes=("heads", "head_dim", "embed"), use_bias=use_bias,
            kernel_init=out_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: AttentionMask | None = None,
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        score_mod: ScoreMod | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | tuple[int, ...] = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Float[Array, "B n T S"] | None]:
        """Self-attention over x, or over the cache with x appended to it; arguments as in `MultiHeadAttention`.

        Args:
            cache: one layer's cache, of K heads with 2H numbers each.
            score_mod: of the logits of both maps.

        Returns:
            The output, the cache with x in it (None without one), and the difference of the two maps (None unless asked
            for), whose rows sum to 1 - λ and which may be negative.
        """
        mask = AttentionMask.none() if mask is None else mask
        B, T, _ = x_BTD.shape
        with jax.named_scope("differential_attention"):
            q = constrain(self.query(x_BTD), "batch", "seq", "heads", "head_dim")
            k, v = (
                constrain(linear(x_BTD), "batch", "seq", "kv_heads", "head_dim") for linear in (self.key, self.value)
            )
            if self.rotary_period is not None:
                if positions_BT is None:
                    positions_BT = token_positions(B, T, 0 if cache is None else cache.length)
                q, k = self._rotary(q, positions_BT), self._rotary(k, positions_BT)
            if cache is not None:
                mask = mask.moved(cache.length)
                cache = cache.append(k, v)
                k, v = cache.keys_and_values(q.dtype)
            maps = zip(jnp.split(q, 2, -1), jnp.split(k, 2, -1), _two_keys(key), strict=True)
            (first, first_weights), (second, second_weights) = (
                attend(
                    q_BTNH,
                    k_BSKH,
                    v,
                    mask,
                    score_mod=score_mod,
                    dropout_rate=self.dropout_rate,
                    dropout_key=dropout_key,
                    backend=self.backend,
                    return_weights=return_weights,
                )
                for q_BTNH, k_BSKH, dropout_key in maps
            )
            lam = self.value_of_lambda()
            # The maps are nearly equal at first: their difference, and λ's gradient by it, need the wider type.
            first, second = widen(first), widen(second)
            out = first - lam.astype(first.dtype) * second
            out = (self.norm(out) * (1 - self.initial_lambda)).astype(x_BTD.dtype)
            weights = None
            if first_weights is not None and second_weights is not None:
                weights = first_weights - lam.astype(first_weights.dtype) * second_weights
            return constrain(self.out(out), "batch", "stream", None), cache, weights

    def value_of_lambda(self) -> Float[Array, ""]:
        """λ as it is now (equation 2), in float32."""
        q1, k1, q2, k2 = self.lambdas[...].astype(jnp.float32)
        return jnp.exp(q1 @ k1) - jnp.exp(q2 @ k2) + self.initial_lambda

    def _rotary(self, x: Array, positions_BT: Array) -> Array:
        """Each map's half by itself."""
        assert self.rotary_period is not None
        halves = (
            rotary(half, positions_BT, max_period=self.rotary_period, scaling=self.rotary_scaling)
            for half in jnp.split(x, 2, axis=-1)
        )
        return jnp.concatenate(list(halves), axis=-1)


def _two_keys(key: PRNGKeyArray | None) -> tuple[PRNGKeyArray | None, PRNGKeyArray | None]:
    if key is None:
        return None, None
    first, second = jax.random.split(key)
    return first, second
