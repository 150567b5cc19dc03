"""What incremental decoding keeps of the tokens before: keys and values, or the latents that they are made of.

L layers, B batch, S cache position, K key/value heads, H head_dim, T new positions, R latent dim with the rotary key.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from transformer.types import Array, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values seen so far. A model's cache has a leading L on every field; a layer's has none.

    Rows fill independently: row b holds `length[b]` positions, and what lies beyond them is never seen, because a query
    at position p sees cache positions up to p alone. Prompts of different lengths therefore need no padding on the left.

    Each head's keys and values lie as its products with a query and with weights read them, so that neither is turned round
    for every token.
    """

    k: Float[Array, "*L B K H S"]
    v: Float[Array, "*L B K S H"]
    length: Int[Array, "*L B"]

    @staticmethod
    def empty(
        num_layers: int, batch_size: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> KVCache:
        """Room for `max_length` positions in each of `num_layers` layers."""
        rows = (num_layers, batch_size)
        return KVCache(
            jnp.zeros((*rows, num_kv_heads, head_dim, max_length), dtype),
            jnp.zeros((*rows, num_kv_heads, max_length, head_dim), dtype),
            jnp.zeros(rows, jnp.int32),
        )

    @staticmethod
    def holding(k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"]) -> KVCache:
        """One layer's cache that is full of these: a memory for cross-attention."""
        B, S = k_BSKH.shape[:2]
        return KVCache(k_BSKH.transpose(0, 2, 3, 1), v_BSKH.swapaxes(1, 2), jnp.full(B, S, jnp.int32))

    def append(self, k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"]) -> KVCache:
        """One layer's cache with T more positions in each row, behind those it holds. There must be room for them."""
        T, room = k_BTKH.shape[1], self.v.shape[-2]
        if room < T:
            raise ValueError(f"cache: {T} more positions, and it has room for {room} in all")
        k_BTKH, v_BTKH = k_BTKH.astype(self.k.dtype), v_BTKH.astype(self.v.dtype)
        rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
        positions_BT = self.length[:, None] + jnp.arange(T)
        k = self.k.at[rows_B1, :, :, positions_BT].set(k_BTKH, unique_indices=True, mode="drop")
        v = self.v.at[rows_B1, :, positions_BT].set(v_BTKH, unique_indices=True, mode="drop")
        return KVCache(k, v, self.length + T)

    def keys_and_values(self, dtype: DTypeLike) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """One layer's keys and values as attention takes them; what lies beyond `length` is to be masked."""
        return self.k.transpose(0, 3, 1, 2).astype(dtype), self.v.swapaxes(1, 2).astype(dtype)

    def with_length(self, length_B: Int[Array, " B"]) -> KVCache:
        """A model's cache cut to the first `length_B` positions of each row (after a prefill of padded prompts)."""
        return dataclasses.replace(self, length=jnp.broadcast_to(length_B, self.length.shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """What multi-head latent attention keeps: each position's compressed keys and values, and its rotary key behind them.

    Rows fill independently, as in `KVCache`.
    """

    latents: Float[Array, "*L B S R"]
    length: Int[Array, "*L B"]

    @staticmethod
    def empty(num_layers: int, batch_size: int, max_length: int, latent_dim: int, dtype: DTypeLike) -> LatentCache:
        """Room for `max_length` positions in each of `num_layers` layers."""
        rows = (num_layers, batch_size)
        return LatentCache(jnp.zeros((*rows, max_length, latent_dim), dtype), jnp.zeros(rows, jnp.int32))

    def append(self, latents_BTR: Float[Array, "B T R"]) -> LatentCache:
        """One layer's cache with T more positions in each row, behind those it holds. There must be room for them."""
        T = latents_BTR.shape[1]
        rows_B1 = jnp.arange(latents_BTR.shape[0])[:, None]
        positions_BT = self.length[:, None] + jnp.arange(T)
        latents_BTR = latents_BTR.astype(self.latents.dtype)
        latents = self.latents.at[rows_B1, positions_BT].set(latents_BTR, unique_indices=True, mode="drop")
        return LatentCache(latents, self.length + T)

    def with_length(self, length_B: Int[Array, " B"]) -> LatentCache:
        """A model's cache cut to the first `length_B` positions of each row (after a prefill of padded prompts)."""
        return dataclasses.replace(self, length=jnp.broadcast_to(length_B, self.length.shape))
