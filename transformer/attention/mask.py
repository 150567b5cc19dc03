"""Which query may look at which key, as a structure rather than as an array.

B batch, T query position, S key position, N query heads.

A mask is a conjunction of terms. A kernel that understands all of them never needs the T×S array; one that does not
asks for `materialize`. Masks are pytrees: they pass through `jax.jit`, and what shapes a program (the kinds of terms,
a window's width) is static.

    mask = AttentionMask.causal() & AttentionMask.segments(segments_BT) & AttentionMask.window(left=128)
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import TypeVar

import jax
import jax.numpy as jnp

from transformer.types import Array, Bool, Int

TermT = TypeVar("TermT", bound="Term")


@dataclasses.dataclass(frozen=True)
class Term:
    """One condition that a (query, key) pair must meet."""

    def allowed(self, q_positions: Int[Array, "... T"], k_positions: Int[Array, "S"]) -> Bool[Array, "B_ N_ T S"]:
        """True where the pair may attend; each of the four dims is broadcastable."""
        raise NotImplementedError

    def moved(self, offset: int | Int[Array, " B"]) -> Term:
        """This term when query t of the call stands at position `offset + t` among the keys."""
        return self


def _relative(offset: int | Array, q_positions: Array) -> Array:
    """Absolute query positions, [1 or B, 1, T, 1]."""
    offset = jnp.asarray(offset, q_positions.dtype)
    return (offset.reshape(-1, 1) + q_positions)[:, None, :, None]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["offset"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Causal(Term):
    """Key s is seen by query t when s ≤ offset + t."""

    offset: int | Int[Array, " B"] = 0

    def allowed(self, q_positions, k_positions):
        return k_positions[None, None, None, :] <= _relative(self.offset, q_positions)

    def moved(self, offset):
        return Causal(self.offset + offset)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["offset"], meta_fields=["left", "right"])
@dataclasses.dataclass(frozen=True)
class Window(Term):
    """Key s is seen by query t when -left ≤ s - (offset + t) ≤ right; None leaves a side open."""

    left: int | None
    right: int | None
    offset: int | Int[Array, " B"] = 0

    def allowed(self, q_positions, k_positions):
        distance = k_positions[None, None, None, :] - _relative(self.offset, q_positions)
        inside = jnp.ones_like(distance, bool)
        if self.left is not None:
            inside &= distance >= -self.left
        if self.right is not None:
            inside &= distance <= self.right
        return inside

    def moved(self, offset):
        return dataclasses.replace(self, offset=self.offset + offset)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padding(Term):
    """Keys that are real."""

    valid_BS: Bool[Array, "B S"]

    def allowed(self, q_positions, k_positions):
        return self.valid_BS[:, None, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments(Term):
    """Query and key belong to the same packed document. Segment 0 is padding, and sees and is seen by nothing."""

    q_BT: Int[Array, "B T"]
    k_BS: Int[Array, "B S"]

    def allowed(self, q_positions, k_positions):
        same = self.q_BT[:, None, :, None] == self.k_BS[:, None, None, :]
        return same & (self.k_BS != 0)[:, None, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Explicit(Term):
    """Any array, each of its four dims broadcastable."""

    mask_BNTS: Bool[Array, "B_ N_ T_ S_"]

    def allowed(self, q_positions, k_positions):
        return self.mask_BNTS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A conjunction of terms; with none of them, every query sees every key."""

    terms: tuple[Term, ...] = ()

    @staticmethod
    def none() -> AttentionMask:
        """Every query sees every key."""
        return AttentionMask()

    @staticmethod
    def causal(offset: int | Int[Array, " B"] = 0) -> AttentionMask:
        """Query t, standing at position offset + t, sees the keys up to its own position."""
        return AttentionMask((Causal(offset),))

    @staticmethod
    def window(left: int | None = None, right: int | None = None) -> AttentionMask:
        """Query t sees from `left` keys before it to `right` keys after it.

        Raises:
            ValueError: a negative width.
        """
        for name, width in (("left", left), ("right", right)):
            if width is not None and width < 0:
                raise ValueError(f"window: {name}={width}; a width is 0 (the position itself) or more")
        return AttentionMask((Window(left, right),))

    @staticmethod
    def padding(valid_BS: Bool[Array, "B S"]) -> AttentionMask:
        """Only keys where `valid_BS` is true are seen."""
        _check("padding", valid_BS, 2, jnp.bool_)
        return AttentionMask((Padding(valid_BS),))

    @staticmethod
    def segments(q_BT: Int[Array, "B T"], k_BS: Int[Array, "B S"] | None = None) -> AttentionMask:
        """Query and key must carry the same segment number, which is not 0."""
        k_BS = q_BT if k_BS is None else k_BS
        for array in (q_BT, k_BS):
            _check("segments", array, 2, jnp.integer)
        return AttentionMask((Segments(q_BT, k_BS),))

    @staticmethod
    def explicit(mask_BNTS: Bool[Array, "B_ N_ T_ S_"]) -> AttentionMask:
        """Exactly the pairs where the array is true."""
        _check("explicit", mask_BNTS, 4, jnp.bool_)
        return AttentionMask((Explicit(mask_BNTS),))

    def __and__(self, other: AttentionMask) -> AttentionMask:
        extra = tuple(term for term in other.terms if not (_is_plain_causal(term) and self.is_causal))
        return AttentionMask(self.terms + extra)

    def moved(self, offset: int | Int[Array, " B"]) -> AttentionMask:
        """The mask of queries that stand `offset` positions further along the keys (decoding with a cache)."""
        return AttentionMask(tuple(term.moved(offset) for term in self.terms))

    def of_type(self, kind: type[TermT]) -> tuple[TermT, ...]:
        """The terms of one kind."""
        return tuple(term for term in self.terms if isinstance(term, kind))

    @property
    def is_causal(self) -> bool:
        """Whether a causal term with no offset is among the terms."""
        return any(map(_is_plain_causal, self.terms))

    def materialize(self, num_queries: int, num_keys: int) -> Bool[Array, "B_ N_ T_ S_"] | None:
        """The array, as small as broadcasting allows; None when everything is allowed.

        Raises:
            ValueError: a term does not broadcast to [B, N, num_queries, num_keys].
        """
        if not self.terms:
            return None
        q_positions, k_positions = jnp.arange(num_queries), jnp.arange(num_keys)
        parts = [term.allowed(q_positions, k_positions) for term in self.terms]
        for term, part in zip(self.terms, parts, strict=True):
            if part.shape[2] not in (1, num_queries) or part.shape[3] not in (1, num_keys):
                raise ValueError(
                    f"mask: {type(term).__name__} has shape {part.shape}, which does not broadcast to "
                    f"[B, N, T={num_queries}, S={num_keys}]"
                )
        return functools.reduce(operator.and_, parts)


def _is_plain_causal(term: Term) -> bool:
    return isinstance(term, Causal) and isinstance(term.offset, int) and term.offset == 0


def _check(name: str, array: Array, ndim: int, dtype: type) -> None:
    if array.ndim != ndim or not jnp.issubdtype(array.dtype, dtype):
        raise ValueError(f"mask: {name} takes {dtype.__name__} with {ndim} dims; got {array.dtype} {array.shape}")
