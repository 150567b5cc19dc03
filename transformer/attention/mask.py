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
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from transformer.types import Array, Bool, Int

TermT = TypeVar("TermT", bound="Term")


def _register(cls: type[TermT]) -> type[TermT]:
    """Make a term a pytree: arrays are its leaves; plain numbers stay in its structure, where a kernel can read them."""
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten(term: TermT) -> tuple[list[Any], tuple[tuple[str, Any], ...]]:
        values = [(name, getattr(term, name)) for name in names]
        static = tuple((name, value) for name, value in values if value is None or isinstance(value, int))
        known = dict(static)
        return [value for name, value in values if name not in known], static

    def unflatten(static: tuple[tuple[str, Any], ...], leaves: Iterable[Any]) -> TermT:
        # Not by the constructor: JAX also puts placeholders where arrays belong.
        term, known, rest = object.__new__(cls), dict(static), iter(leaves)
        for name in names:
            object.__setattr__(term, name, known[name] if name in known else next(rest))
        return term

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


@dataclasses.dataclass(frozen=True)
class Term:
    """One condition that a (query, key) pair must meet."""

    def allowed(self, queries: range, keys: range) -> Bool[Array, "B_ N_ T_ S_"]:
        """True where the pair may attend, for a block of queries and keys; each of the four dims is broadcastable."""
        raise NotImplementedError

    def extent(self) -> tuple[int | None, int | None]:
        """How many queries and keys it is made for; None where any number fits."""
        return None, None

    def moved(self, offset: int | Int[Array, " B"]) -> Term:
        """This term when query t of the call stands at position `offset + t` among the keys."""
        return self


def _positions(queries: range, offset: int | Array) -> Int[Array, "B_ 1 T 1"]:
    """Where the queries stand among the keys, [1 or B, 1, T, 1]."""
    positions = jnp.arange(queries.start, queries.stop)
    return (jnp.asarray(offset, positions.dtype).reshape(-1, 1) + positions)[:, None, :, None]


@_register
@dataclasses.dataclass(frozen=True)
class Causal(Term):
    """Key s is seen by query t when s ≤ offset + t."""

    offset: int | Int[Array, " B"] = 0

    def allowed(self, queries, keys):
        return jnp.arange(keys.start, keys.stop)[None, None, None] <= _positions(queries, self.offset)

    def moved(self, offset):
        return Causal(self.offset + offset)


@_register
@dataclasses.dataclass(frozen=True)
class Window(Term):
    """Key s is seen by query t when -left ≤ s - (offset + t) ≤ right; None leaves a side open."""

    left: int | None
    right: int | None
    offset: int | Int[Array, " B"] = 0

    def allowed(self, queries, keys):
        distance = jnp.arange(keys.start, keys.stop)[None, None, None] - _positions(queries, self.offset)
        inside = jnp.ones_like(distance, bool)
        if self.left is not None:
            inside &= distance >= -self.left
        if self.right is not None:
            inside &= distance <= self.right
        return inside

    def moved(self, offset):
        return dataclasses.replace(self, offset=self.offset + offset)


@_register
@dataclasses.dataclass(frozen=True)
class Padding(Term):
    """Keys that are real."""

    valid_BS: Bool[Array, "B S"]

    def extent(self):
        return None, self.valid_BS.shape[1]

    def allowed(self, queries, keys):
        return self.valid_BS[:, None, None, keys.start : keys.stop]


@_register
@dataclasses.dataclass(frozen=True)
class Segments(Term):
    """Query and key belong to the same packed document. Segment 0 is padding, and sees and is seen by nothing."""

    q_BT: Int[Array, "B T"]
    k_BS: Int[Array, "B S"]

    def extent(self):
        return self.q_BT.shape[1], self.k_BS.shape[1]

    def allowed(self, queries, keys):
        q, k = self.q_BT[:, queries.start : queries.stop], self.k_BS[:, keys.start : keys.stop]
        return (q[:, None, :, None] == k[:, None, None, :]) & (k != 0)[:, None, None, :]


@_register
@dataclasses.dataclass(frozen=True)
class Explicit(Term):
    """Any array, each of its four dims broadcastable."""

    mask_BNTS: Bool[Array, "B_ N_ T_ S_"]

    def extent(self):
        num_queries, num_keys = (None if size == 1 else size for size in self.mask_BNTS.shape[2:])
        return num_queries, num_keys

    def allowed(self, queries, keys):
        mask = self.mask_BNTS
        mask = mask if mask.shape[2] == 1 else mask[:, :, queries.start : queries.stop]
        return mask if mask.shape[3] == 1 else mask[..., keys.start : keys.stop]


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

    def check(self, num_queries: int, num_keys: int) -> None:
        """Raise a `ValueError` for a term that is made for other numbers of queries or keys."""
        for term in self.terms:
            for given, wanted, name in zip(term.extent(), (num_queries, num_keys), ("queries", "keys"), strict=True):
                if given not in (None, wanted):
                    raise ValueError(f"mask: {type(term).__name__} is made for {given} {name}; this call has {wanted}")

    def materialize(self, num_queries: int, num_keys: int) -> Bool[Array, "B_ N_ T_ S_"] | None:
        """The array, as small as broadcasting allows; None when everything is allowed.

        Raises:
            ValueError: a term is made for other numbers of queries or keys.
        """
        self.check(num_queries, num_keys)
        return self.block(range(num_queries), range(num_keys))

    def block(self, queries: range, keys: range) -> Bool[Array, "B_ N_ T_ S_"] | None:
        """As `materialize`, for some of the queries and some of the keys."""
        parts = [term.allowed(queries, keys) for term in self.terms]
        return functools.reduce(operator.and_, parts) if parts else None


def _is_plain_causal(term: Term) -> bool:
    return isinstance(term, Causal) and isinstance(term.offset, int) and term.offset == 0


def _check(name: str, array: Array, ndim: int, dtype: type) -> None:
    if array.ndim != ndim or not jnp.issubdtype(array.dtype, dtype):
        raise ValueError(f"mask: {name} takes {dtype.__name__} with {ndim} dims; got {array.dtype} {array.shape}")
