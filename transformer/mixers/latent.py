"""Multi-head latent attention: keys and values of all heads from one small vector a token, which alone is cached.

B batch, T query position, S key position, D embed, N heads, H head_dim without rotation, C value dim, R latent dim (d_c),
P rotary dim (d_h^R). DeepSeek-AI 2024 (DeepSeek-V2), section 2.1; equations by their numbers there.

    c = norm(W_DKV x)                  (9)   the latent, shared by all heads
    k = [W_UK c ; rotary(W_KR x)]      (10, 15, 17)   the rotary part is shared by all heads too
    v = W_UV c                         (11)
    q = [W_UQ cq ; rotary(W_QR cq)]    (12-14, 16)   cq = norm(W_DQ x), or x itself

A head's product W_UQ·q with W_UK·c is that of W_UKᵀ·q with c: absorbed so, attention runs over the cached latents as if they
were one key/value head's keys and values, and nothing is expanded. Decoding does that; training expands, which takes fewer
products where there are as many queries as keys.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.dispatch import attend
from transformer.attention.mask import AttentionMask
from transformer.decode.cache import LatentCache
from transformer.layers.linear import Linear
from transformer.layers.norm import RMSNorm
from transformer.layers.position import NO_SCALING, RotaryScaling, rotary, token_positions
from transformer.sharding import constrain
from transformer.types import Array, DTypeLike, Float, Int, PRNGKeyArray


class LatentAttention(nnx.Module):
    """Self-attention in N heads over latents of `latent_dim` numbers a token.

    Args:
        latent_dim: of the compressed keys and values, d_c.
        query_latent_dim: of the compressed queries, d_c'; None: queries are projected at once.
        head_dim: of each head's queries and keys, beside the rotary part.
        rotary_dim: of the rotated queries, one a head, and of the rotated key that all heads share, d_h^R.
        value_dim: of each head's values; None: head_dim.
        rotary_period, rotary_scaling: as in `MultiHeadAttention`.
        dropout_rate: of the attention weights.
        backend: `auto` or a name of `dispatch.BACKENDS`.
        kernel_init, out_init: initialisers of the projections in, and of the one back to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        latent_dim: int,
        query_latent_dim: int | None = None,
        head_dim: int,
        rotary_dim: int,
        value_dim: int | None = None,
        rotary_period: float = 10_000.0,
        rotary_scaling: RotaryScaling = NO_SCALING,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        kernel_init: Callable[..., Array],
        out_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        self.num_heads = num_heads
        self.latent_dim, self.head_dim, self.rotary_dim, self.value_dim = latent_dim, head_dim, rotary_dim, value_dim
        self.rotary_period, self.rotary_scaling = rotary_period, rotary_scaling
        self.dropout_rate = dropout_rate
        self.backend = backend

        def linear(dim: int, *out: int, init: Callable[..., Array] = kernel_init) -> Linear:
            # A latent stands where the residual stream does: sharded with it, and whole in every head.
            axes = ("embed", "head_dim") if len(out) == 1 else ("embed", "heads", "head_dim")
            return Linear(
                (dim,), out, axes=axes, use_bias=False, kernel_init=init,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        def norm(dim: int) -> RMSNorm:
            return RMSNorm(dim, axis="head_dim", param_dtype=param_dtype, rngs=rngs)

        # W_DQ; W_UQ and W_QR as one; W_DKV and W_KR as one; W_UK; W_UV.
        self.query_down = None if query_latent_dim is None else linear(embed_dim, query_latent_dim)
        self.query_norm = None if query_latent_dim is None else norm(query_latent_dim)
        self.query = linear(query_latent_dim or embed_dim, num_heads, head_dim + rotary_dim)
        self.down = linear(embed_dim, latent_dim + rotary_dim)
        self.norm = norm(latent_dim)
        self.key_up = linear(latent_dim, num_heads, head_dim)
        self.value_up = linear(latent_dim, num_heads, value_dim)
        self.out = Linear(
            (num_heads, value_dim), (embed_dim,), axes=("heads", "head_dim", "embed"), use_bias=False,
            kernel_init=out_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: AttentionMask | None = None,
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: LatentCache | None = None,
        absorb: bool | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | tuple[int, ...] = False,
    ) -> tuple[Float[Array, "B T D"], LatentCache | None, Float[Array, "B n T S"] | None]:
        """Self-attention over x, or over the cache with x appended to it.

        Args:
            mask: in positions of this call; with a cache it is moved behind what the cache holds.
            positions_BT: where each token stands; 0 to T-1 (after the cache) by default.
            cache: one layer's cache. It must have room for T more positions.
            absorb: attend to the latents themselves; False: to keys and values expanded from them; None: to whichever takes
                fewer multiplications for this many queries and keys. The result is the same.
            key: turns dropout on.
            return_weights: for all heads, or for those that a tuple names, as in `attend`.

        Returns:
            The output, the cache with x in it (None without one), and the weights (None unless asked for).
        """
        mask = AttentionMask.none() if mask is None else mask
        B, T, _ = x_BTD.shape
        with jax.named_scope("latent_attention"):
            if positions_BT is None:
                positions_BT = token_positions(B, T, 0 if cache is None else cache.length)
            q_BTNH, turned_BTNP = self._queries(x_BTD, positions_BT)
            latents_BSR = self._latents(x_BTD, positions_BT)
            if cache is not None:
                mask = mask.moved(cache.length)
                cache = cache.append(latents_BSR)
                latents_BSR = cache.latents.astype(q_BTNH.dtype)
            if absorb is None:
                absorb = self._absorbing_is_cheaper(T, latents_BSR.shape[1])
            if absorb:
                # W_UKᵀ q, [B, T, N, R]: a query of the latents.
                q_BTNH = jnp.einsum("BTNH,RNH->BTNR", q_BTNH, self.key_up.kernel[...].astype(q_BTNH.dtype))
                k, v = latents_BSR[:, :, None], latents_BSR[:, :, None, : self.latent_dim]
            else:
                c_BSR, turned_BSP = jnp.split(latents_BSR, [self.latent_dim], axis=-1)
                k, v = self.key_up(c_BSR), self.value_up(c_BSR)
                turned = jnp.broadcast_to(turned_BSP[:, :, None], (*k.shape[:3], self.rotary_dim))
                k = constrain(jnp.concatenate([k, turned], axis=-1), "batch", "seq", "heads", "head_dim")
                v = constrain(v, "batch", "seq", "heads", "head_dim")
            out_BTNC, weights = attend(
                jnp.concatenate([q_BTNH, turned_BTNP], axis=-1),
                k,
                v,
                mask,
                scale=(self.head_dim + self.rotary_dim) ** -0.5,
                dropout_rate=self.dropout_rate,
                dropout_key=key,
                backend=self.backend,
                return_weights=return_weights,
            )
            if absorb:
                # The weighted latents expanded, in the place of the values.
                out_BTNC = jnp.einsum("BTNR,RNC->BTNC", out_BTNC, self.value_up.kernel[...].astype(out_BTNC.dtype))
            return constrain(self.out(out_BTNC), "batch", "stream", None), cache, weights

    def make_cache(self, num_layers: int, batch_size: int, max_length: int) -> LatentCache:
        """An empty cache for so many layers of this kind: R + P numbers a token."""
        dim = self.latent_dim + self.rotary_dim
        return LatentCache.empty(num_layers, batch_size, max_length, dim, self.down.dtype)

    def _queries(self, x_BTD: Array, positions_BT: Array) -> tuple[Array, Array]:
        """[B, T, N, H] and, rotated, [B, T, N, P]."""
        if self.query_down is not None and self.query_norm is not None:
            x_BTD = self.query_norm(self.query_down(x_BTD))
        q = constrain(self.query(x_BTD), "batch", "seq", "heads", "head_dim")
        q_BTNH, turned_BTNP = jnp.split(q, [self.head_dim], axis=-1)
        return q_BTNH, self._rotary(turned_BTNP, positions_BT)

    def _latents(self, x_BTD: Array, positions_BT: Array) -> Array:
        """What is cached, [B, T, R + P]: the latent, and the rotated key behind it."""
        c_BTR, turned_BTP = jnp.split(self.down(x_BTD), [self.latent_dim], axis=-1)
        turned_BTP = self._rotary(turned_BTP[:, :, None], positions_BT)[:, :, 0]
        return constrain(jnp.concatenate([self.norm(c_BTR), turned_BTP], axis=-1), "batch", "seq", None)

    def _rotary(self, x: Array, positions_BT: Array) -> Array:
        return rotary(x, positions_BT, max_period=self.rotary_period, scaling=self.rotary_scaling)

    def _absorbing_is_cheaper(self, num_queries: int, num_keys: int) -> bool:
        """Multiplications of a head in both forms, of T queries with S keys."""
        T, S, both = num_queries, num_keys, self.head_dim + self.value_dim
        return T * self.latent_dim * both + T * S * 2 * self.latent_dim < S * self.latent_dim * both + T * S * both
