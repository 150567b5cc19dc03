"""Softmax attention as a sequence mixer: projections, positions, `attend`, and a cache for decoding.

B batch, T query position, S key position, D embed, M a memory's embed, N query heads, K key/value heads, H head_dim.
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
from transformer.layers.linear import DEFAULT_INIT, Linear, join
from transformer.layers.norm import RMSNorm
from transformer.layers.position import NoPositionConfig, PositionConfig, RotaryConfig, rotary
from transformer.mixers.context import NO_CONTEXT, Context
from transformer.mixers.heads import (
    Backend,
    check_heads,
    check_rotary,
    check_width,
    head_sizes,
    projection_flops,
    seen_keys,
)
from transformer.mixers.state import KVCache, WindowCache, nan_on_overflow
from transformer.resume import Free
from transformer.sharding import constrain, with_axes
from transformer.types import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(Config):
    """Softmax attention in heads (Vaswani et al. 2017): multi-head, grouped-query or multi-query by num_kv_heads."""

    causal_only: ClassVar[bool] = False
    has_distributions: ClassVar[bool] = True

    kind: Literal["softmax"] = "softmax"
    """A weighted mean of values; the weights are a softmax of products of queries and keys."""
    num_heads: int = 12
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads, which divides num_heads. null: num_heads; 1: multi-query (Shazeer 2019)."""
    head_dim: int | None = None
    """Features of a head. null: embed_dim / num_heads."""
    position: PositionConfig = NoPositionConfig()
    """How attention knows positions: none, rotary, alibi, or relative."""
    window: int | None = None
    """Each token sees this many tokens before itself, and in an encoder as many after. null: all."""
    sinks: int = 0
    """First tokens of each document that are seen beyond the window (attention sinks; Xiao et al. 2023)."""
    bias: bool = True
    """Biases in the linear layers."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values. null: same as bias."""
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys (Henry et al. 2020; Dehghani et al. 2023)."""
    learned_temperature: bool = False
    """Multiply each head's logits by a learned number, which starts at 1 (Henry et al. 2020, g)."""
    scale: float | None = None
    """Multiplies the logits. null: 1 / sqrt(head_dim)."""
    soft_cap: float | None = None
    """Soft cap c of the logits: c tanh(logits / c). null: none."""
    backend: Free[Backend] = "auto"
    """Implementation of attention. It is an error to name one that cannot run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)
        require(self, "window", self.window is None or self.window >= 1, "allowed: 1 or more, or null")
        require(self, "sinks", self.sinks >= 0, "allowed: 0 or more")
        require(self, "sinks", self.sinks == 0 or self.window is not None, "sinks need a window; allowed: 0")
        for field in ("scale", "soft_cap"):
            require(self, field, getattr(self, field) is None or getattr(self, field) > 0, "allowed: above 0, or null")

    @property
    def has_qkv_bias(self) -> bool:
        """`qkv_bias` with its default filled in."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def structure(self) -> SoftmaxConfig:
        """The settings that determine the parameters: layers in which these are equal can be stacked."""
        return dataclasses.replace(
            self, position=NoPositionConfig(), window=None, sinks=0, scale=None, soft_cap=None, backend="auto",
            qkv_bias=self.has_qkv_bias,
        )  # fmt: skip

    def check(self, embed_dim: int) -> tuple[str, str] | None:
        """The field that does not suit `embed_dim` and what is allowed, or None."""
        _, _, H = head_sizes(self, embed_dim)
        return check_width(self, embed_dim) or check_rotary(self.position, H)

    @property
    def window_size(self) -> int | None:
        """How many positions of a cache later tokens see, if those are the newest ones and their order makes no difference; None
        otherwise."""
        is_simple = self.window is not None and self.sinks == 0 and self.position.kind in ("none", "rotary")
        # The room of a cache, which these do not have, decides between the two frequencies of longrope.
        has_one = not isinstance(self.position, RotaryConfig) or self.position.scaling.boundary is None
        return None if self.window is None or not (is_simple and has_one) else self.window + 1

    def flops(self, embed_dim: int, length: int, *, causal: bool) -> float:
        """FLOPs of one token in a context of `length`, projections included; a multiply-add counts as two."""
        N, _, H = head_sizes(self, embed_dim)
        return projection_flops(self, embed_dim) + 2 * 2 * seen_keys(self, length, causal=causal) * N * H


class MultiHeadAttention(nnx.Module):
    """Attention in N heads over K key/value heads: of a sequence to itself, or to a memory.

    Vaswani et al. 2017, section 3.2.2; Shazeer 2019; Ainslie et al. 2023.

    Args:
        config: of the attention, or only its number of heads.
        memory_dim: width of a memory that keys and values come from (cross-attention); None for self-attention. A memory has no
            positions and no window.
        dropout_rate: of the attention weights.
        norm_eps: of the norms of queries and keys.
        kernel_init, out_init: initialisers of the input projections, and of the output projection to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        config: SoftmaxConfig | int,
        *,
        memory_dim: int | None = None,
        dropout_rate: float = 0.0,
        norm_eps: float = 1e-6,
        kernel_init: Callable[..., Array] = DEFAULT_INIT,
        out_init: Callable[..., Array] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        c = SoftmaxConfig(num_heads=config) if isinstance(config, int) else config
        self.config = c
        N, K, H = head_sizes(c, embed_dim)
        self.sizes = (N, K, H)
        self.is_cross = memory_dim is not None
        self.dropout_rate = dropout_rate
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def project(dim: int, heads: int, axis: str) -> Linear:
            axes = ("embed", axis, "head_dim")
            return Linear((dim,), (heads, H), axes=axes, use_bias=c.has_qkv_bias, kernel_init=kernel_init, **types)

        from_dim = embed_dim if memory_dim is None else memory_dim
        self.query: Linear | None = nnx.data(project(embed_dim, N, "heads"))
        self.key: Linear | None = nnx.data(project(from_dim, K, "kv_heads"))
        self.value: Linear | None = nnx.data(project(from_dim, K, "kv_heads"))
        self.joint: Linear | None = nnx.data(None)
        axes = ("heads", "head_dim", "embed")
        init = kernel_init if out_init is None else out_init
        self.out = Linear((N, H), (embed_dim,), axes=axes, use_bias=c.bias, kernel_init=init, **types)

        def norm() -> RMSNorm | None:
            return (
                RMSNorm(H, epsilon=norm_eps, axis="head_dim", param_dtype=param_dtype, rngs=rngs) if c.qk_norm else None
            )

        self.query_norm, self.key_norm = norm(), norm()
        ones = with_axes(nnx.initializers.ones, "heads")
        self.scale = nnx.Param(ones(rngs.params(), (N,), param_dtype)) if c.learned_temperature else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context = NO_CONTEXT
    ) -> tuple[Float[Array, "B T D"], KVCache | WindowCache | None, Float[Array, "B n T S"] | None]:
        """Self-attention over x, or over the state's keys with x's after them; or cross-attention over the memory.

        Returns:
            The output, the state with x in it (None without one), and the weights (None unless asked for).

        Raises:
            ValueError: cross-attention without a memory, or no room in the state.
        """
        if self.is_cross and context.memory is None:
            raise ValueError("attention: this is cross-attention, and the context has no memory")
        with jax.named_scope("attention"):
            return self._over_memory(x_BTD, context) if self.is_cross else self._over_itself(x_BTD, context)

    def _over_itself(self, x_BTD: Array, context: Context) -> tuple[Array, KVCache | WindowCache | None, Array | None]:
        c, state = self.config, context.state
        mask = context.self_mask(x_BTD, window=c.window, sinks=c.sinks)
        q_BTNH, k_BSKH, v_BSKH = self._project(x_BTD, context)
        if isinstance(c.position, RotaryConfig):
            positions_BT = context.positions(x_BTD)
            q_BTNH, k_BSKH = (self._rotate(x, positions_BT, c.position, context.room) for x in (q_BTNH, k_BSKH))
        if state is not None:
            assert isinstance(state, KVCache | WindowCache)
            state = state.append(k_BSKH, v_BSKH, context.valid_BT)
            mask = context.cached_mask(mask, state) if isinstance(state, KVCache) else context.window_mask(state)
            k_BSKH, v_BSKH = state.keys_and_values(q_BTNH.dtype)
        out_BTNH, weights = self._attend(q_BTNH, k_BSKH, v_BSKH, mask, context)
        if isinstance(state, KVCache):
            out_BTNH = nan_on_overflow(out_BTNH, state)
        return self._written(out_BTNH, context), state, weights

    def _over_memory(self, x_BTD: Array, context: Context) -> tuple[Array, None, Array | None]:
        assert self.query is not None and context.memory is not None
        memory = context.memory if isinstance(context.memory, KVCache) else self.remember(context.memory, context)
        q_BTNH = self._queries(self.query(x_BTD, context.adapter_key))
        k_BSKH, v_BSKH = memory.keys_and_values(q_BTNH.dtype)
        out_BTNH, weights = self._attend(q_BTNH, k_BSKH, v_BSKH, context.memory_mask(x_BTD), context)
        return self._written(out_BTNH, context), None, weights

    def _attend(self, q: Array, k: Array, v: Array, mask: Any, context: Context) -> tuple[Array, Array | None]:
        c = self.config
        return attend(
            q, k, v, mask, scale=c.scale, logit_soft_cap=c.soft_cap, backend=c.backend,
            score_mod=None if self.is_cross else context.scores(c.position, self.sizes[0]),
            dropout_rate=self.dropout_rate, dropout_key=context.key, return_weights=context.return_weights,
        )  # fmt: skip

    def remember(self, memory_BSM: Float[Array, "B S M"], context: Context | None = None) -> KVCache:
        """Cross-attention's keys and values of a memory, to be used by every call that reads it."""
        assert self.key is not None and self.value is not None
        key = None if context is None else context.adapter_key
        return KVCache.holding(*self._keys_and_values(self.key(memory_BSM, key), self.value(memory_BSM, key)))

    def make_state(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens."""
        _, K, H = self.sizes
        return KVCache.empty(batch_size, max_length, K, H, self.out.dtype)

    def joined(self) -> MultiHeadAttention:
        """The same attention with its three projections joined into one product, for decoding; cross-attention is unchanged.

        With one token, three small products are each too short to keep a device busy. In training they are large, and separate
        projections can each be sharded by their own heads.
        """
        # A copy with its own variables, so that joining does not change this one.
        attention = jax.tree.map(lambda leaf: leaf, self)
        if not self.is_cross:
            attention.joint = join(
                [linear for linear in (attention.query, attention.key, attention.value) if linear is not None]
            )
            attention.query = attention.key = attention.value = None
        return attention

    def _project(self, x_BTD: Array, context: Context) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], and keys and values [B, T, K, H], before any rotation."""
        N, K, _ = self.sizes
        if self.joint is not None:
            q, k, v = jnp.split(self.joint(x_BTD), [N, N + K], axis=2)
        else:
            assert self.query is not None and self.key is not None and self.value is not None
            q, k, v = (linear(x_BTD, context.adapter_key) for linear in (self.query, self.key, self.value))
        return self._queries(q), *self._keys_and_values(k, v)

    def _queries(self, q_BTNH: Array) -> Array:
        q_BTNH = constrain(q_BTNH, "batch", "seq", "heads", "head_dim")
        q_BTNH = q_BTNH if self.query_norm is None else self.query_norm(q_BTNH)
        return q_BTNH if self.scale is None else q_BTNH * self.scale[...].astype(q_BTNH.dtype)[:, None]

    def _keys_and_values(self, k_BSKH: Array, v_BSKH: Array) -> tuple[Array, Array]:
        k_BSKH, v_BSKH = (constrain(x, "batch", "seq", "kv_heads", "head_dim") for x in (k_BSKH, v_BSKH))
        return k_BSKH if self.key_norm is None else self.key_norm(k_BSKH), v_BSKH

    def _rotate(self, x: Array, positions_BT: Array, position: RotaryConfig, length: int | None) -> Array:
        dim = position.dim(self.sizes[2])
        return rotary(x, positions_BT, theta=position.theta, scaling=position.scaling, dim=dim, length=length)

    def _written(self, out_BTNH: Array, context: Context) -> Array:
        return constrain(self.out(context.at("heads", out_BTNH), context.adapter_key), "batch", "stream", None)
