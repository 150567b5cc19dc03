"""Multi-head attention as a module: projections, positions, `attend`, and a cache to decode with.

B batch, T query position, S key position, D embed, M a memory's embed, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.dispatch import attend
from transformer.attention.mask import AttentionMask
from transformer.decode.cache import KVCache
from transformer.layers.linear import Linear, join
from transformer.layers.norm import RMSNorm
from transformer.layers.position import NO_SCALING, RotaryScaling, ScoreMod, rotary, token_positions
from transformer.sharding import constrain, with_axes
from transformer.types import Array, DTypeLike, Float, Int, PRNGKeyArray


class MultiHeadAttention(nnx.Module):
    """Attention in N heads over K key/value heads: multi-head (K = N), grouped-query, or multi-query (K = 1).

    Vaswani et al. 2017, section 3.2.2; Shazeer 2019; Ainslie et al. 2023.

    Args:
        memory_dim: width of another sequence that keys and values come from (cross-attention); None: they come from the
            queries' own.
        use_bias: of the projections in; `out_bias` of the one out, by default alike.
        rotary_period: longest period of rotary positions over 2π; None for no rotation.
        rotary_dim: how many first features of a head are rotated; None for all.
        rotary_scaling: how they are stretched to a longer context.
        qk_norm: RMS-normalise each head's queries and keys (Henry et al. 2020; Dehghani et al. 2023), with `norm_epsilon`.
        scale: of the logits; None for 1 / sqrt(head_dim).
        learned_temperature: multiply each head's logits by a number of its own, which is 1 at first (Henry et al. 2020, g).
        logit_soft_cap: bound of the attention logits, or None.
        dropout_rate: of the attention weights.
        backend: `auto` or a name of `dispatch.BACKENDS`.
        kernel_init, out_init: initialisers of the projections in, and of the one back to the residual stream.

    Raises:
        ValueError: rotary positions in cross-attention, where the two sequences' positions have no distance.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        memory_dim: int | None = None,
        use_bias: bool = True,
        out_bias: bool | None = None,
        rotary_period: float | None = None,
        rotary_dim: int | None = None,
        rotary_scaling: RotaryScaling = NO_SCALING,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        scale: float | None = None,
        learned_temperature: bool = False,
        logit_soft_cap: float | None = None,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        kernel_init: Callable[..., Array],
        out_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if memory_dim is not None and rotary_period is not None:
            raise ValueError(
                "attention: memory_dim and rotary_period are both set; cross-attention takes no rotary positions"
            )
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.is_cross = memory_dim is not None
        self.rotary_period, self.rotary_dim, self.rotary_scaling = rotary_period, rotary_dim, rotary_scaling
        self.logit_scale, self.logit_soft_cap = scale, logit_soft_cap
        self.dropout_rate = dropout_rate
        self.backend = backend
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads

        def project(dim: int, heads: int, axis: str) -> Linear:
            return Linear(
                (dim,), (heads, head_dim), axes=("embed", axis, "head_dim"), use_bias=use_bias,
                kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        from_dim = embed_dim if memory_dim is None else memory_dim
        self.query: Linear | None = nnx.data(project(embed_dim, num_heads, "heads"))
        self.key: Linear | None = nnx.data(project(from_dim, num_kv_heads, "kv_heads"))
        self.value: Linear | None = nnx.data(project(from_dim, num_kv_heads, "kv_heads"))
        self.joint: Linear | None = nnx.data(None)
        self.out = Linear(
            (num_heads, head_dim), (embed_dim,), axes=("heads", "head_dim", "embed"),
            use_bias=use_bias if out_bias is None else out_bias,
            kernel_init=out_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

        def norm() -> RMSNorm | None:
            if not qk_norm:
                return None
            return RMSNorm(head_dim, epsilon=norm_epsilon, axis="head_dim", param_dtype=param_dtype, rngs=rngs)

        self.query_norm, self.key_norm = norm(), norm()
        ones = with_axes(nnx.initializers.ones, "heads")
        self.scale = nnx.Param(ones(rngs.params(), (num_heads,), param_dtype)) if learned_temperature else None

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: AttentionMask | None = None,
        *,
        memory: Float[Array, "B S M"] | KVCache | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        score_mod: ScoreMod | None = None,
        rotary_period: float | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | tuple[int, ...] = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Float[Array, "B n T S"] | None]:
        """Self-attention over x, or over the cache with x appended to it; or cross-attention over a memory.

        Args:
            mask: in positions of this call; with a cache it is moved behind what the cache holds. A memory's padding is for
                the mask to hide.
            memory: what cross-attention looks at, or its keys and values from `remember`, computed once for many calls.
            positions_BT: where each token stands, for rotary positions; 0 to T-1 (after the cache) by default.
            cache: one layer's cache. It must have room for T more positions.
            rotary_period: in the place of the module's own, which must have one.
            score_mod: as in `attend`; query t is number t of this call, whatever a cache holds before it.
            key: turns dropout on.
            return_weights: for all heads, or for those that a tuple names, as in `attend`.

        Returns:
            The output, the cache with x in it (None without one), and the weights (None unless asked for).

        Raises:
            ValueError: cross-attention without a memory or with a cache for x, or self-attention with a memory.
        """
        if self.is_cross != (memory is not None) or (self.is_cross and cache is not None):
            kind, wants = ("cross", "a memory and no cache") if self.is_cross else ("self", "no memory")
            raise ValueError(f"attention: this is {kind}-attention; expected {wants}")
        mask = AttentionMask.none() if mask is None else mask
        with jax.named_scope("attention"):
            if memory is not None:
                memory = memory if isinstance(memory, KVCache) else self.remember(memory)
                assert self.query is not None
                q_BTNH = self._queries(self.query(x_BTD))
                k_BSKH, v_BSKH = memory.keys_and_values(q_BTNH.dtype)
            else:
                q_BTNH, k_BSKH, v_BSKH = self._project(x_BTD)
                if self.rotary_period is not None:
                    if positions_BT is None:
                        B, T, _ = x_BTD.shape
                        positions_BT = token_positions(B, T, 0 if cache is None else cache.length)
                    period = self.rotary_period if rotary_period is None else rotary_period
                    q_BTNH, k_BSKH = (
                        rotary(x, positions_BT, max_period=period, scaling=self.rotary_scaling, dim=self.rotary_dim)
                        for x in (q_BTNH, k_BSKH)
                    )
                if cache is not None:
                    mask = mask.moved(cache.length)
                    cache = cache.append(k_BSKH, v_BSKH)
                    k_BSKH, v_BSKH = cache.keys_and_values(q_BTNH.dtype)
            out_BTNH, weights = attend(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                mask,
                score_mod=score_mod,
                scale=self.logit_scale,
                logit_soft_cap=self.logit_soft_cap,
                dropout_rate=self.dropout_rate,
                dropout_key=key,
                backend=self.backend,
                return_weights=return_weights,
            )
            return constrain(self.out(out_BTNH), "batch", "stream", None), cache, weights

    def remember(self, memory_BSM: Float[Array, "B S M"]) -> KVCache:
        """Cross-attention's keys and values of a memory, for every call that looks at it."""
        assert self.key is not None and self.value is not None
        return KVCache.holding(*self._keys_and_values(self.key(memory_BSM), self.value(memory_BSM)))

    def joined(self) -> MultiHeadAttention:
        """The same attention with its three projections as one product, for decoding; cross-attention as it is.

        One token gives three thin products, each of which is over before a device is busy. In training they are wide,
        and apart each can be sharded by its own heads.
        """
        # Its own variables, so that joining leaves those of this one alone.
        attention = jax.tree.map(lambda leaf: leaf, self)
        if not self.is_cross:
            attention.joint = join(
                [linear for linear in (attention.query, attention.key, attention.value) if linear is not None]
            )
            attention.query = attention.key = attention.value = None
        return attention

    def _project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], and keys and values [B, T, K, H], before any rotation."""
        if self.joint is not None:
            q, k, v = jnp.split(self.joint(x_BTD), [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        else:
            assert self.query is not None and self.key is not None and self.value is not None
            q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        return self._queries(q), *self._keys_and_values(k, v)

    def _queries(self, q_BTNH: Array) -> Array:
        q_BTNH = constrain(q_BTNH, "batch", "seq", "heads", "head_dim")
        q_BTNH = q_BTNH if self.query_norm is None else self.query_norm(q_BTNH)
        return q_BTNH if self.scale is None else q_BTNH * self.scale[...].astype(q_BTNH.dtype)[:, None]

    def _keys_and_values(self, k_BSKH: Array, v_BSKH: Array) -> tuple[Array, Array]:
        k_BSKH, v_BSKH = (constrain(x, "batch", "seq", "kv_heads", "head_dim") for x in (k_BSKH, v_BSKH))
        return k_BSKH if self.key_norm is None else self.key_norm(k_BSKH), v_BSKH
