"""What decoding carries from token to token: keys and values, the latents that they are computed from, the states of a
recurrent cell, or a matrix of fixed size.

B batch, S cache position, K key/value heads, H head_dim, T new positions, R latent dim with the rotary key, M features,
V value features, F features of a recurrent cell.

Each kind has `length` [B], the number of tokens that a row has read. A mixer creates it (`make_state`) and fills it. A state
belongs to one layer; a model has a list with one for each layer, and a scan stacks them, with a leading L.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from transformer.alignment.intra import Tape
from transformer.types import Array, Bool, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values seen so far, of one layer.

    Rows fill independently: row b holds `length[b]` positions. Positions beyond them are hidden, because a query at position p
    only sees cache positions up to p. Prompts of different lengths therefore need no padding on the left.

    Stored in the layouts that the products with queries and with weights need, to avoid a transpose for each token.
    """

    k: Float[Array, "*L B K H S"]
    v: Float[Array, "*L B K S H"]
    length: Int[Array, "*L B"]

    @staticmethod
    def empty(batch_size: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
        """Room for `max_length` positions in each row."""
        return KVCache(
            jnp.zeros((batch_size, num_kv_heads, head_dim, max_length), dtype),
            jnp.zeros((batch_size, num_kv_heads, max_length, head_dim), dtype),
            jnp.zeros(batch_size, jnp.int32),
        )

    @staticmethod
    def holding(k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"]) -> KVCache:
        """A full cache of these keys and values: a memory for cross-attention."""
        B, S = k_BSKH.shape[:2]
        return KVCache(k_BSKH.transpose(0, 2, 3, 1), v_BSKH.swapaxes(1, 2), jnp.full(B, S, jnp.int32))

    @property
    def room(self) -> int:
        """Positions that a row can hold."""
        return self.v.shape[-2]

    def append(
        self,
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        valid_BT: Bool[Array, "B T"] | None = None,
    ) -> KVCache:
        """Append T positions to each row.

        Args:
            valid_BT: tokens that are not padding; padding follows them in a row, and is not counted in `length`. All by default.

        Raises:
            ValueError: no room. Where the lengths are traced, `length` exceeds `room` instead, and attention gives NaN.
        """
        length_B = grown(self.length, k_BTKH.shape[1], valid_BT, self.room)
        k_BTKH, v_BTKH = k_BTKH.astype(self.k.dtype), v_BTKH.astype(self.v.dtype)
        rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
        positions_BT = self.length[:, None] + jnp.arange(k_BTKH.shape[1])
        k = self.k.at[rows_B1, :, :, positions_BT].set(k_BTKH, unique_indices=True, mode="drop")
        v = self.v.at[rows_B1, :, positions_BT].set(v_BTKH, unique_indices=True, mode="drop")
        return KVCache(k, v, length_B)

    def with_room(self, room: int) -> KVCache:
        """The same positions, with room for `room` of them."""
        return KVCache(_with_room(self.k, -1, room), _with_room(self.v, -2, room), self.length)

    def keys_and_values(self, dtype: DTypeLike) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values in attention's layout; a mask has to hide what is beyond `length`."""
        return _in_attentions_layout(self.k, self.v, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowCache:
    """The newest keys and values of one layer, as many as its window sees; for steps of one token.

    Position p is in slot p mod S: a new one replaces the one that leaves the window.
    """

    k: Float[Array, "*L B K H S"]
    v: Float[Array, "*L B K S H"]
    length: Int[Array, "*L B"]

    @staticmethod
    def of(cache: KVCache, size: int) -> WindowCache:
        """The last `size` positions of each row of a cache."""
        last_B1 = cache.length[:, None] - 1
        # Slots of positions that a short row does not have get any values, which `seen` hides.
        positions_BS = jnp.maximum(last_B1 - (last_B1 - jnp.arange(size)) % size, 0)
        return WindowCache(
            jnp.take_along_axis(cache.k, positions_BS[:, None, None], axis=-1),
            jnp.take_along_axis(cache.v, positions_BS[:, None, :, None], axis=-2),
            cache.length,
        )

    @property
    def seen(self) -> Bool[Array, "B S"]:
        """The slots that have been written."""
        return jnp.arange(self.v.shape[-2]) < self.length[:, None]

    def append(
        self,
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        valid_BT: Bool[Array, "B T"] | None = None,
    ) -> WindowCache:
        """Append one position to each row.

        Raises:
            ValueError: several positions, or padding.
        """
        if k_BTKH.shape[1] != 1 or valid_BT is not None:
            raise ValueError(
                f"cache: got {k_BTKH.shape[1]} positions; a window's cache takes one at a time, and no padding"
            )
        rows_B, slot_B = jnp.arange(k_BTKH.shape[0]), self.length % self.v.shape[-2]
        k = self.k.at[rows_B, :, :, slot_B].set(k_BTKH[:, 0].astype(self.k.dtype), unique_indices=True)
        v = self.v.at[rows_B, :, slot_B].set(v_BTKH[:, 0].astype(self.v.dtype), unique_indices=True)
        return WindowCache(k, v, grown(self.length, 1, None, None))

    def keys_and_values(self, dtype: DTypeLike) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """As of `KVCache`, in the order of the slots."""
        return _in_attentions_layout(self.k, self.v, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """What multi-head latent attention keeps of each position: the compressed keys and values, followed by the rotary key.

    Rows fill independently, as in `KVCache`.
    """

    latents: Float[Array, "*L B S R"]
    length: Int[Array, "*L B"]

    @staticmethod
    def empty(batch_size: int, max_length: int, latent_dim: int, dtype: DTypeLike) -> LatentCache:
        """Room for `max_length` positions in each row."""
        return LatentCache(jnp.zeros((batch_size, max_length, latent_dim), dtype), jnp.zeros(batch_size, jnp.int32))

    @property
    def room(self) -> int:
        """Positions that a row can hold."""
        return self.latents.shape[-2]

    def append(self, latents_BTR: Float[Array, "B T R"], valid_BT: Bool[Array, "B T"] | None = None) -> LatentCache:
        """Append T positions to each row, as `KVCache.append`."""
        T = latents_BTR.shape[1]
        length_B = grown(self.length, T, valid_BT, self.room)
        rows_B1 = jnp.arange(latents_BTR.shape[0])[:, None]
        positions_BT = self.length[:, None] + jnp.arange(T)
        latents_BTR = latents_BTR.astype(self.latents.dtype)
        latents = self.latents.at[rows_B1, positions_BT].set(latents_BTR, unique_indices=True, mode="drop")
        return LatentCache(latents, length_B)

    def with_room(self, room: int) -> LatentCache:
        """The same positions, with room for `room` of them."""
        return LatentCache(_with_room(self.latents, -2, room), self.length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TapeState:
    """Hidden states and memories of all positions, of one layer of a long short-term memory-network.

    Rows fill independently, as in `KVCache`.
    """

    hidden: Float[Array, "*L B S F"]
    memory: Float[Array, "*L B S F"]
    summary: Float[Array, "*L B F"]
    """The last position's summary h̃ of the hidden states."""
    length: Int[Array, "*L B"]

    @staticmethod
    def empty(batch_size: int, max_length: int, num_features: int) -> TapeState:
        """Room for `max_length` positions in each row, in float32."""
        zeros = jnp.zeros((batch_size, max_length, num_features), jnp.float32)
        summary = jnp.zeros((batch_size, num_features), jnp.float32)
        return TapeState(zeros, zeros, summary, jnp.zeros(batch_size, jnp.int32))

    @property
    def room(self) -> int:
        """Positions that a row can hold."""
        return self.hidden.shape[-2]

    def advanced(self, tape: Tape, num_tokens: int, valid_BT: Bool[Array, "B T"] | None) -> TapeState:
        """The state after `num_tokens` more tokens, which `tape` holds; padding does not count."""
        return TapeState(*tape, grown(self.length, num_tokens, valid_BT, self.room))

    def with_room(self, room: int) -> TapeState:
        """The same positions, with room for `room` of them."""
        hidden, memory = (_with_room(x, -2, room) for x in (self.hidden, self.memory))
        return TapeState(hidden, memory, self.summary, self.length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixState:
    """The fast weights of one layer, whose size does not depend on the number of tokens read."""

    matrix: Float[Array, "*L B K M V"]
    length: Int[Array, "*L B"]

    @staticmethod
    def empty(batch_size: int, num_kv_heads: int, num_features: int, num_values: int) -> MatrixState:
        """The state before the first token, in float32."""
        shape = (batch_size, num_kv_heads, num_features, num_values)
        return MatrixState(jnp.zeros(shape, jnp.float32), jnp.zeros(batch_size, jnp.int32))

    def advanced(
        self, matrix: Float[Array, "B K M V"], num_tokens: int, valid_BT: Bool[Array, "B T"] | None
    ) -> MatrixState:
        """The state after `num_tokens` more tokens; padding does not count."""
        return MatrixState(matrix, grown(self.length, num_tokens, valid_BT, None))


State = KVCache | WindowCache | LatentCache | TapeState | MatrixState
"""The state of one layer."""


def grown(
    length_B: Int[Array, " B"], num_tokens: int, valid_BT: Bool[Array, "B T"] | None, room: int | None
) -> Int[Array, " B"]:
    """Lengths after `num_tokens` more tokens; padding does not count.

    Raises:
        ValueError: more tokens than there is room for, as far as that is known before the program runs.
    """
    after_B = length_B + (num_tokens if valid_BT is None else valid_BT.sum(1, dtype=jnp.int32))
    if room is None:
        return after_B
    if num_tokens > room:
        raise ValueError(f"cache: {num_tokens} more positions do not fit; it has room for {room} in all")
    if not isinstance(after_B, jax.core.Tracer) and (most := int(np.asarray(after_B).max(initial=0))) > room:
        raise ValueError(
            f"cache: row {int(np.asarray(after_B).argmax())} would hold {most} positions; it has room for {room}"
        )
    return after_B


def nan_on_overflow(out: Float[Array, "B ..."], state: KVCache | LatentCache | TapeState) -> Float[Array, "B ..."]:
    """NaN in rows that hold more than there is room for: inside a compiled program no error can be raised."""
    return jnp.where(jnp.expand_dims(state.length > state.room, range(1, out.ndim)), jnp.nan, out)


def _in_attentions_layout(k_BKHS: Array, v_BKSH: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """Stored keys and values as [B, S, K, H]."""
    return k_BKHS.transpose(0, 3, 1, 2).astype(dtype), v_BKSH.swapaxes(1, 2).astype(dtype)


def _with_room(x: Array, axis: int, room: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, room - x.shape[axis])
    return jnp.pad(x, widths)
