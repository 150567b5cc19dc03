"""The key/value cache of incremental decoding.

L layers, B batch, S cache position, K key/value heads, H head_dim, T new positions.
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
    """

    k: Float[Array, "*L B S K H"]
    v: Float[Array, "*L B S K H"]
    length: Int[Array, "*L B"]

    @staticmethod
    def empty(
        num_layers: int, batch_size: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> KVCache:
        """Room for `max_length` positions in each of `num_layers` layers."""
        shape = (num_layers, batch_size, max_length, num_kv_heads, head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[:2], jnp.int32))

    def append(self, k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"]) -> KVCache:
        """One layer's cache with T more positions in each row, behind those it holds."""

        def write(row_SKH: Array, new_TKH: Array, start: Array) -> Array:
            return jax.lax.dynamic_update_slice(row_SKH, new_TKH.astype(row_SKH.dtype), (start, 0, 0))

        write_rows = jax.vmap(write)
        return KVCache(
            write_rows(self.k, k_BTKH, self.length),
            write_rows(self.v, v_BTKH, self.length),
            self.length + k_BTKH.shape[1],
        )

    def with_length(self, length_B: Int[Array, " B"]) -> KVCache:
        """A model's cache cut to the first `length_B` positions of each row (after a prefill of padded prompts)."""
        return dataclasses.replace(self, length=jnp.broadcast_to(length_B, self.length.shape))
