"""Which query may see which key, as a structure rather than as an array.

B batch, T query position, S key position, N query heads.

A mask is a conjunction of predicates (`predicates.py`). A kernel that understands all of them never needs the T×S array; any
other kernel calls `materialize`, or asks for one tile after another. Masks are pytrees: they pass through `jax.jit`, and what
determines a program's structure (the kinds of predicates, a window's width) is static.

    mask = AttentionMask.causal() & AttentionMask.segments(segments_BT) & AttentionMask.window(left=128)
    longformer = AttentionMask.window(left=64, right=64) | AttentionMask.global_tokens(4)
    streaming = AttentionMask.causal() & (AttentionMask.window(left=1024) | AttentionMask.sinks(4))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.attention.spec import predicates as p
from transformer.attention.spec.mods import Mod
from transformer.attention.spec.predicates import MaskPredicate
from transformer.attention.spec.tile import Grid, Tile
from transformer.types import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A conjunction of predicates; without any, every query sees every key."""

    predicates: tuple[MaskPredicate, ...] = ()

    @staticmethod
    def none() -> AttentionMask:
        """Every query sees every key."""
        return AttentionMask()

    @staticmethod
    def causal(offset: int | Int[Array, " B"] = 0) -> AttentionMask:
        """Query t, at position offset + t, sees the keys up to its own position."""
        return AttentionMask((p.Causal(offset=_whole("causal", "offset", offset)),))

    @staticmethod
    def window(left: int | None = None, right: int | None = None) -> AttentionMask:
        """Query t sees from `left` keys before it to `right` keys after it; None leaves a side open.

        Raises:
            ValueError: a negative width, or widths with which a query sees itself alone.
        """
        for name, width in (("left", left), ("right", right)):
            if width is not None and (not isinstance(width, int) or width < 0):
                raise ValueError(
                    f"window: {name}={width}; expected 1 or more, 0 for nothing on that side, or None for all"
                )
        if left == 0 and not right:
            raise ValueError(
                f"window: left=0, right={right} has no width: a causal query would see itself alone; expected 1 or more"
            )
        return AttentionMask((p.Window(left, right),))

    @staticmethod
    def dilated(step: int) -> AttentionMask:
        """Query t sees the keys at a distance that is a multiple of `step` (Beltagy et al. 2020; with a window around it).

        Raises:
            ValueError: a step below 1.
        """
        _at_least_one("dilated", "step", step)
        return AttentionMask((p.Dilated(step),))

    @staticmethod
    def prefix(length: int | Int[Array, " B"]) -> AttentionMask:
        """Every query sees the first `length` keys; `causal() | prefix(n)` is a prefix language model's mask."""
        return AttentionMask((p.Prefix(_whole("prefix", "length", length)),))

    @staticmethod
    def sinks(count: int) -> AttentionMask:
        """Every query sees the first `count` keys, the attention sinks (Xiao et al. 2023), also outside a window.

        Raises:
            ValueError: a count below 1.
        """
        _at_least_one("sinks", "count", count)
        return AttentionMask((p.Prefix(int(count)),))

    @staticmethod
    def global_tokens(count: int) -> AttentionMask:
        """The first `count` positions see everything and are seen by everything (Beltagy et al. 2020, section 3.1).

        Raises:
            ValueError: a count below 1.
        """
        _at_least_one("global_tokens", "count", count)
        return AttentionMask((p.Prefix(count),)) | AttentionMask((p.FirstQueries(count),))

    @staticmethod
    def block_sparse(layout_QK: Bool[Array | np.ndarray, "Q K"], size: int) -> AttentionMask:
        """Blocks of `size` queries see blocks of `size` keys where the layout is true (Child et al. 2019; Zaheer et al. 2020).

        Raises:
            ValueError: a layout that is not a matrix of booleans, or a size below 1.
        """
        _check("block_sparse", layout_QK, 2, jnp.bool_)
        _at_least_one("block_sparse", "size", size)
        return AttentionMask((p.BlockSparse(jnp.asarray(layout_QK), size),))

    @staticmethod
    def padding(valid_BS: Bool[Array, "B S"]) -> AttentionMask:
        """Only keys where `valid_BS` is true are seen."""
        _check("padding", valid_BS, 2, jnp.bool_)
        return AttentionMask((p.Padding(valid_BS),))

    @staticmethod
    def segments(
        q_BT: Int[Array, "B T"],
        k_BS: Int[Array, "B S"] | None = None,
        *,
        lengths_BM: Int[Array, "B M"] | None = None,
        k_lengths_BM: Int[Array, "B M"] | None = None,
    ) -> AttentionMask:
        """Query and key must carry the same segment number, which is not 0.

        Args:
            lengths_BM: number of positions with segment 1, 2, ... M, in rows where these come one after the other from the first
                position on, and nothing but 0 follows. The mask is the same without it; a kernel for packed documents needs it.
            k_lengths_BM: the same for `k_BS`.
        """
        k_BS, k_lengths_BM = (q_BT, lengths_BM) if k_BS is None else (k_BS, k_lengths_BM)
        for array in (q_BT, k_BS):
            _check("segments", array, 2, jnp.integer)
        for lengths, ids in ((lengths_BM, q_BT), (k_lengths_BM, k_BS)):
            if lengths is None:
                continue
            _check("segments", lengths, 2, jnp.integer)
            if lengths.shape[0] not in (1, ids.shape[0]):
                raise ValueError(f"mask: lengths of {lengths.shape[0]} rows for segments of {ids.shape[0]}")
        if q_BT.shape[0] != k_BS.shape[0] and 1 not in (q_BT.shape[0], k_BS.shape[0]):
            raise ValueError(f"mask: segments of {q_BT.shape[0]} rows of queries and {k_BS.shape[0]} of keys")
        return AttentionMask((p.Segments(q_BT, k_BS, lengths_BM, k_lengths_BM),))

    @staticmethod
    def explicit(mask_BNTS: Bool[Array, "B_ N_ T_ S_"]) -> AttentionMask:
        """Exactly the pairs for which the array is true."""
        _check("explicit", mask_BNTS, 4, jnp.bool_)
        return AttentionMask((p.Explicit(mask_BNTS),))

    @staticmethod
    def mod(mask_mod: Callable[..., Any]) -> AttentionMask:
        """The pairs for which `mask_mod(b, h, q, k)`, a function of four integers, is true (Dong et al. 2024).

        Raises:
            ValueError: the function returns anything but one boolean.
        """
        return AttentionMask((p.MaskMod(Mod.mask(mask_mod)),))

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """The pairs that both masks allow."""
        extra = tuple(
            predicate for predicate in other.predicates if not (_is_plain_causal(predicate) and self.is_causal)
        )
        return AttentionMask(self.predicates + extra)

    def __or__(self, other: AttentionMask) -> AttentionMask:
        """The pairs that at least one of the two masks allows."""
        if not self.predicates or not other.predicates:
            return AttentionMask()
        return AttentionMask((p.Either(self.predicates, other.predicates),))

    def shift_queries(self, offset: int | Int[Array, " B"]) -> AttentionMask:
        """The mask for queries that are `offset` positions further along the keys (decoding with a cache)."""
        offset = _whole("moved", "offset", offset)
        return AttentionMask(tuple(predicate.shift_queries(offset) for predicate in self.predicates))

    def padded(self, num_queries: int, num_keys: int) -> AttentionMask:
        """The mask with its arrays padded to these numbers of queries and keys; padding is not seen."""
        return AttentionMask(tuple(predicate.padded(num_queries, num_keys) for predicate in self.predicates))

    @property
    def is_causal(self) -> bool:
        """Whether a causal predicate with no offset is among the predicates."""
        return any(map(_is_plain_causal, self.predicates))

    def check(self, *sizes: int) -> None:
        """Raise a `ValueError` for a predicate that is made for other numbers of rows, heads, queries or keys."""
        for predicate in self.predicates:
            for given, wanted, name in zip(
                predicate.extent(), sizes, ("rows", "heads", "queries", "keys"), strict=True
            ):
                if given not in (None, wanted):
                    raise ValueError(
                        f"mask: {type(predicate).__name__} is made for {given} {name}; this call has {wanted}"
                    )

    def materialize(
        self, num_queries: int, num_keys: int, *, batch_size: int | None = None, num_heads: int | None = None
    ) -> Bool[Array, "B_ N_ T_ S_"] | None:
        """The array, as small as broadcasting allows; None if everything is allowed.

        Args:
            batch_size, num_heads: by default those that the predicates are made for; a `mask_mod` that uses the row or the head
                needs them.

        Raises:
            ValueError: a predicate is made for other numbers of rows, heads, queries or keys.
        """
        made_for = [
            [size for size in sizes if size is not None]
            for sizes in zip(*(t.extent() for t in self.predicates), strict=True)
        ]
        rows, heads = (max(sizes, default=1) for sizes in made_for[:2]) if made_for else (1, 1)
        for axis, (given, name) in enumerate(((batch_size, "batch_size"), (num_heads, "num_heads"))):
            if given is None and any(predicate.depends_on()[axis] for predicate in self.predicates):
                raise ValueError(f"materialize: this mask_mod uses the batch or head index; {name} must be given")
        rows, heads = rows if batch_size is None else batch_size, heads if num_heads is None else num_heads
        self.check(rows, heads, num_queries, num_keys)
        return self.allowed(Tile.whole(rows, heads, num_queries, num_keys))

    def allowed(self, tile: Tile) -> Bool[Array, "B_ N_ T_ S_"] | None:
        """As `materialize`, for one tile."""
        return p.all_allowed(self.predicates, tile) if self.predicates else None

    def visible(self, grid: Grid) -> Any:
        """Which tiles of a grid may have an allowed pair; a numpy array if that is known before the program runs."""
        return p.all_visible(self.predicates, grid)

    def visible_beforehand(self, grid: Grid) -> Bool[np.ndarray, "Q K"]:
        """As `visible`, as far as it is known before the program runs: predicates with arrays count as allowing all."""
        known = [predicate.visible(grid) for predicate in self.predicates if not jax.tree.leaves(predicate)]
        visible = np.ones((grid.queries.count, grid.keys.count), bool)
        for table in known:
            visible = visible & np.asarray(table)
        return visible


def _is_plain_causal(predicate: MaskPredicate) -> bool:
    return isinstance(predicate, p.Causal) and isinstance(predicate.offset, int) and predicate.offset == 0


def _whole(name: str, argument: str, value: Any) -> int | Array:
    """A plain whole number, or one for each row."""
    if isinstance(value, int | np.integer):
        return int(value)
    if not hasattr(value, "ndim") or value.ndim > 1 or not jnp.issubdtype(value.dtype, jnp.integer):
        given = f"{value.dtype} {value.shape}" if hasattr(value, "ndim") else repr(value)
        raise ValueError(f"{name}: {argument} is {given}; expected a whole number, or one for each row")
    return jnp.asarray(value).reshape(-1)


def _at_least_one(name: str, argument: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}: {argument}={value}; expected 1 or more")


def _check(name: str, array: Any, ndim: int, dtype: type) -> None:
    if not hasattr(array, "ndim"):
        raise ValueError(f"mask: {name} takes an array with {ndim} dims; got {type(array).__name__}")
    if array.ndim != ndim or not jnp.issubdtype(array.dtype, dtype):
        raise ValueError(f"mask: {name} takes {dtype.__name__} with {ndim} dims; got {array.dtype} {array.shape}")
