"""Multi-head attention as a module: projections, positions, `attend`, and a cache to decode with.

B batch, T query position, S key position, D embed, N query heads, K key/value heads, H head_dim.
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
from transformer.layers.position import rotary
from transformer.sharding import constrain
from transformer.types import Array, DTypeLike, Float, Int, PRNGKeyArray


class MultiHeadAttention(nnx.Module):
    """Attention in N heads over K key/value heads: multi-head (K = N), grouped-query, or multi-query (K = 1).

    Vaswani et al. 2017, section 3.2.2; Shazeer 2019; Ainslie et al. 2023.

    Args:
        rotary_period: longest period of rotary positions over 2π; None for no rotation.
        qk_norm: RMS-normalise each head's queries and keys (Henry et al. 2020; Dehghani et al. 2023).
        logit_soft_cap: bound of the attention logits, or None.
        dropout_rate: of the attention weights.
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
        use_bias: bool = True,
        rotary_period: float | None = None,
        qk_norm: bool = False,
        logit_soft_cap: float | None = None,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        kernel_init: Callable[..., Array],
        out_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.rotary_period = rotary_period
        self.logit_soft_cap = logit_soft_cap
        self.dropout_rate = dropout_rate
        self.backend = backend
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads

        def project(heads: int, axis: str) -> Linear:
            return Linear(
                (embed_dim,), (heads, head_dim), axes=("embed", axis, "head_dim"), use_bias=use_bias,
                kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.query: Linear | None = nnx.data(project(num_heads, "heads"))
        self.key: Linear | None = nnx.data(project(num_kv_heads, "kv_heads"))
        self.value: Linear | None = nnx.data(project(num_kv_heads, "kv_heads"))
        self.joint: Linear | None = nnx.data(None)
        self.out = Linear(
            (num_heads, head_dim), (embed_dim,), axes=("heads", "head_dim", "embed"), use_bias=use_bias,
            kernel_init=out_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.query_norm = RMSNorm(head_dim, axis="head_dim", param_dtype=param_dtype, rngs=rngs) if qk_norm else None
        self.key_norm = RMSNorm(head_dim, axis="head_dim", param_dtype=param_dtype, rngs=rngs) if qk_norm else None

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: AttentionMask | None = None,
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | tuple[int, ...] = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Float[Array, "B n T S"] | None]:
        """Self-attention over x, or over the cache with x appended to it.

        Args:
            mask: in positions of this call; with a cache it is moved behind what the cache holds.
            positions_BT: where each token stands, for rotary positions; 0 to T-1 (after the cache) by default.
            cache: one layer's cache. It must have room for T more positions.
            key: turns dropout on.
            return_weights: for all heads, or for those that a tuple names, as in `attend`.

        Returns:
            The output, the cache with x in it (None without one), and the weights (None unless asked for).
        """
        mask = AttentionMask.none() if mask is None else mask
        with jax.named_scope("attention"):
            q_BTNH, k_BSKH, v_BSKH = self._project(x_BTD)
            q_BTNH = constrain(q_BTNH, "batch", "seq", "heads", "head_dim")
            k_BSKH = constrain(k_BSKH, "batch", "seq", "kv_heads", "head_dim")
            v_BSKH = constrain(v_BSKH, "batch", "seq", "kv_heads", "head_dim")
            if self.query_norm is not None and self.key_norm is not None:
                q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
            if self.rotary_period is not None:
                if positions_BT is None:
                    start = 0 if cache is None else cache.length[:, None]
                    positions_BT = jnp.broadcast_to(start + jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
                q_BTNH = rotary(q_BTNH, positions_BT, max_period=self.rotary_period)
                k_BSKH = rotary(k_BSKH, positions_BT, max_period=self.rotary_period)
            if cache is not None:
                mask = mask.moved(cache.length)
                cache = cache.append(k_BSKH, v_BSKH)
                k_BSKH, v_BSKH = cache.keys_and_values(q_BTNH.dtype)
            out_BTNH, weights = attend(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                mask,
                logit_soft_cap=self.logit_soft_cap,
                dropout_rate=self.dropout_rate,
                dropout_key=key,
                backend=self.backend,
                return_weights=return_weights,
            )
            return constrain(self.out(out_BTNH), "batch", "seq", None), cache, weights

    def joined(self) -> MultiHeadAttention:
        """The same attention with its three projections as one product, for decoding.

        One token gives three thin products, each of which is over before a device is busy. In training they are wide,
        and apart each can be sharded by its own heads.
        """
        attention = nnx.merge(*nnx.split(self))
        attention.joint = join([linear for linear in (self.query, self.key, self.value) if linear is not None])
        attention.query = attention.key = attention.value = None
        return attention

    def _project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], and keys and values [B, T, K, H]."""
        if self.joint is not None:
            q, k, v = jnp.split(self.joint(x_BTD), [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
            return q, k, v
        assert self.query is not None and self.key is not None and self.value is not None
        return self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
