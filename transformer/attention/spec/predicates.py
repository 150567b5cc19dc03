"""The conditions that a mask is made of.

B batch, T query position, S key position, N query heads.

A predicate answers two questions: which pairs of a tile are allowed, and which tiles of a grid can have an allowed pair at all.
The second is answered without the first where that is cheap; it may include tiles without an allowed pair, but misses none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from transformer.attention.spec.mods import Mod
from transformer.attention.spec.tile import Blocks, Grid, Span, Tile, filled, plane_filled
from transformer.types import Array, Bool, Int

TermT = TypeVar("TermT", bound="MaskPredicate")


def register(cls: type[TermT]) -> type[TermT]:
    """Make a predicate a pytree: arrays are its leaves; plain numbers stay in its structure, where a kernel can read them."""
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten(predicate: TermT) -> tuple[list[Any], tuple[tuple[str, Any], ...]]:
        values = [(name, getattr(predicate, name)) for name in names]
        static = tuple((name, value) for name, value in values if value is None or isinstance(value, int))
        known = dict(static)
        return [value for name, value in values if name not in known], static

    def unflatten(static: tuple[tuple[str, Any], ...], leaves: Iterable[Any]) -> TermT:
        # Bypasses the constructor, since JAX also puts placeholders in place of arrays.
        predicate, known, rest = object.__new__(cls), dict(static), iter(leaves)
        for name in names:
            object.__setattr__(predicate, name, known[name] if name in known else next(rest))
        return predicate

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


Extent = tuple[int | None, int | None, int | None, int | None]


@dataclasses.dataclass(frozen=True)
class MaskPredicate:
    """One condition that a (query, key) pair must meet."""

    def allowed(self, tile: Tile) -> Bool[Array, "B_ N_ T_ S_"]:
        """True where the pair may attend; each of the four dims is broadcastable."""
        raise NotImplementedError

    def visible(self, grid: Grid) -> Any:
        """Which tiles may have an allowed pair, [query blocks, key blocks]: a numpy array if that is known before the program
        runs."""
        return np.ones((grid.queries.count, grid.keys.count), bool)

    def extent(self) -> Extent:
        """The numbers of rows, heads, queries and keys that it is made for; None where any number fits."""
        return None, None, None, None

    def depends_on(self) -> tuple[bool, bool]:
        """Whether it depends on the row and on the head in addition to its own arrays."""
        return False, False

    def shift_queries(self, offset: int | Int[Array, " B"]) -> MaskPredicate:
        """This predicate with query t of the call at position `offset + t` among the keys."""
        return self

    def padded(self, num_queries: int, num_keys: int) -> MaskPredicate:
        """This predicate with its arrays padded to these numbers of queries and keys; padding is not seen."""
        return self


@dataclasses.dataclass(frozen=True)
class PositionalPredicate(MaskPredicate):
    """A condition on positions: query t is at position `offset + t` among the keys."""

    offset: int | Int[Array, " B"] = dataclasses.field(default=0, kw_only=True)

    def extent(self):
        return None if isinstance(self.offset, int) else _rows(self.offset), None, None, None

    def shift_queries(self, offset):
        return dataclasses.replace(self, offset=self.offset + offset)

    def _pairs(self, tile: Tile) -> tuple[Array, Array]:
        """Positions of queries, [B_, 1, t, 1], and of keys, [1, 1, 1, s]."""
        _, _, queries, keys = tile.indices
        offset = self.offset if isinstance(self.offset, int) else self.offset[:, None, None, None]
        return queries + offset, keys

    def _ranges(self, grid: Grid) -> tuple[Any, Any, Any, Any]:
        """Lowest and highest position in each block of queries, [n, 1], and in each block of keys, [1, m]."""
        least, most = (
            (self.offset, self.offset) if isinstance(self.offset, int) else (self.offset.min(), self.offset.max())
        )
        queries, keys = grid.queries, grid.keys
        return (
            (queries.first + least)[:, None],
            (queries.last + most)[:, None],
            keys.first[None],
            keys.last[None],
        )


@register
@dataclasses.dataclass(frozen=True)
class Causal(PositionalPredicate):
    """Keys up to the query's own position."""

    def allowed(self, tile):
        queries, keys = self._pairs(tile)
        return keys <= queries

    def visible(self, grid):
        _, last_query, first_key, _ = self._ranges(grid)
        return first_key <= last_query


@register
@dataclasses.dataclass(frozen=True)
class Window(PositionalPredicate):
    """Keys from `left` before the query to `right` after it; None leaves a side open."""

    left: int | None
    right: int | None

    def allowed(self, tile):
        queries, keys = self._pairs(tile)
        inside = jnp.ones((1, 1, 1, 1), bool)
        if self.left is not None:
            inside &= keys >= queries - self.left
        if self.right is not None:
            inside &= keys <= queries + self.right
        return inside

    def visible(self, grid):
        first_query, last_query, first_key, last_key = self._ranges(grid)
        inside = np.ones((1, 1), bool)
        if self.left is not None:
            inside = inside & (last_key >= first_query - self.left)
        if self.right is not None:
            inside = inside & (first_key <= last_query + self.right)
        return inside


@register
@dataclasses.dataclass(frozen=True)
class Dilated(PositionalPredicate):
    """Keys at a distance that is a multiple of `step`."""

    step: int

    def allowed(self, tile):
        queries, keys = self._pairs(tile)
        return (queries - keys) % self.step == 0


@register
@dataclasses.dataclass(frozen=True)
class Prefix(MaskPredicate):
    """Keys at the first `length` positions; an array gives each row its own length."""

    length: int | Int[Array, " B"]

    def extent(self):
        return None if isinstance(self.length, int) else _rows(self.length), None, None, None

    def allowed(self, tile):
        length = self.length if isinstance(self.length, int) else self.length[:, None, None, None]
        return tile.indices[3] < length

    def visible(self, grid):
        longest = self.length if isinstance(self.length, int) else self.length.max()
        return (grid.keys.first < longest)[None]


@register
@dataclasses.dataclass(frozen=True)
class FirstQueries(PositionalPredicate):
    """Any key, for queries at the first `length` positions."""

    length: int

    def allowed(self, tile):
        return self._pairs(tile)[0] < self.length

    def visible(self, grid):
        return self._ranges(grid)[0] < self.length


@register
@dataclasses.dataclass(frozen=True)
class Padding(MaskPredicate):
    """Keys that are not padding."""

    valid_BS: Bool[Array, "B S"]

    def extent(self):
        return _rows(self.valid_BS), None, None, self.valid_BS.shape[1]

    def allowed(self, tile):
        return tile.keys.cut(self.valid_BS, 1)[:, None, None]

    def visible(self, grid):
        return grid.keys.split(self.valid_BS, 1, False).any((0, 2))[None]

    def padded(self, num_queries, num_keys):
        return Padding(filled(self.valid_BS, num_keys, 1))


@register
@dataclasses.dataclass(frozen=True)
class Segments(MaskPredicate):
    """Query and key belong to the same packed document. Segment 0 is padding: it sees nothing and is not seen."""

    q_BT: Int[Array, "B T"]
    k_BS: Int[Array, "B S"]
    q_lengths_BM: Int[Array, "B M"] | None = None
    """Lengths of the documents, where these lie one after the other from the first position on, and only padding follows: for
    kernels that need to know where each begins. 0 after a row's last one."""
    k_lengths_BM: Int[Array, "B M"] | None = None

    def extent(self):
        return _rows(self.q_BT), None, self.q_BT.shape[1], self.k_BS.shape[1]

    def allowed(self, tile):
        q, k = tile.queries.cut(self.q_BT, 1), tile.keys.cut(self.k_BS, 1)
        return (q[:, None, :, None] == k[:, None, None, :]) & (k != 0)[:, None, None, :]

    def visible(self, grid):
        # Blocks whose ranges of segment numbers do not overlap share no document.
        (low_q, high_q), (low_k, high_k) = _extremes(grid.queries, self.q_BT), _extremes(grid.keys, self.k_BS)
        meet = (low_k[:, None] <= high_q[:, :, None]) & (low_q[:, :, None] <= high_k[:, None])
        return meet.any(0)

    def padded(self, num_queries, num_keys):
        return dataclasses.replace(self, q_BT=filled(self.q_BT, num_queries, 1), k_BS=filled(self.k_BS, num_keys, 1))


@register
@dataclasses.dataclass(frozen=True)
class Explicit(MaskPredicate):
    """Any array, each of its four dims broadcastable."""

    mask_BNTS: Bool[Array, "B_ N_ T_ S_"]

    def extent(self):
        rows, heads, queries, keys = (None if size == 1 else size for size in self.mask_BNTS.shape)
        return rows, heads, queries, keys

    def allowed(self, tile):
        return tile.cut(self.mask_BNTS)

    def visible(self, grid):
        plane = self.mask_BNTS.any((0, 1))
        for axis, blocks in ((1, grid.keys), (0, grid.queries)):
            if plane.shape[axis] > 1:
                plane = blocks.split(plane, axis, False).any(axis + 1)
        return plane

    def padded(self, num_queries, num_keys):
        return Explicit(plane_filled(self.mask_BNTS, num_queries, num_keys))


@register
@dataclasses.dataclass(frozen=True)
class BlockSparse(PositionalPredicate):
    """Pairs whose block is on in `layout_QK`; a block is `size` positions of queries by `size` of keys."""

    layout_QK: Bool[Array, "Q K"]
    size: int

    def allowed(self, tile):
        queries, keys = self._pairs(tile)
        rows, columns = self.layout_QK.shape
        # Positions after the end of the layout are off, rather than in the layout's last block.
        inside = (queries // self.size < rows) & (keys // self.size < columns)
        return (
            inside
            & self.layout_QK[jnp.minimum(queries // self.size, rows - 1), jnp.minimum(keys // self.size, columns - 1)]
        )

    def visible(self, grid):
        first_query, last_query, first_key, last_key = (edge // self.size for edge in self._ranges(grid))
        rows, columns = (jnp.arange(size) for size in self.layout_QK.shape)
        # [query block, layout row] and [layout column, key block]: which of the layout's blocks touch which of the grid's.
        touches_row = ((rows >= first_query) & (rows <= last_query)).astype(jnp.float32)
        touches_column = ((columns[:, None] >= first_key) & (columns[:, None] <= last_key)).astype(jnp.float32)
        return touches_row @ jnp.asarray(self.layout_QK, jnp.float32) @ touches_column > 0


@register
@dataclasses.dataclass(frozen=True)
class MaskMod(PositionalPredicate):
    """Pairs for which the user's `mask_mod(b, h, q, k)` is true."""

    mod: Mod

    def depends_on(self):
        row, head, _, _ = self.mod.depends_on
        return row, head

    def allowed(self, tile):
        if isinstance(self.offset, int) and self.offset == 0:
            return self.mod(tile)
        if isinstance(self.offset, int):
            return self.mod(_shifted(tile, self.offset))
        raise ValueError(
            "mask: a mask_mod cannot be moved by another offset in each row; write the offset into the function"
        )

    def visible(self, grid):
        def table() -> Array:
            def row(query_block: Array) -> Array:
                return jax.lax.map(lambda key_block: self.allowed(grid.tile(query_block, key_block)).any(), keys)

            keys = jnp.arange(grid.keys.count)
            return jax.lax.map(row, jnp.arange(grid.queries.count))

        if jax.tree.leaves(self) or not isinstance(grid.queries.base, int) or not isinstance(grid.keys.base, int):
            return table()
        with jax.ensure_compile_time_eval():
            return np.asarray(table())


@register
@dataclasses.dataclass(frozen=True)
class Either(MaskPredicate):
    """Pairs that meet all of one list of predicates or all of another."""

    one: tuple[MaskPredicate, ...]
    other: tuple[MaskPredicate, ...]

    def allowed(self, tile):
        return all_allowed(self.one, tile) | all_allowed(self.other, tile)

    def visible(self, grid):
        return all_visible(self.one, grid) | all_visible(self.other, grid)

    def extent(self):
        extents = [predicate.extent() for predicate in self.one + self.other]
        rows, heads, queries, keys = map(_one_size, zip(*extents, strict=True))
        return rows, heads, queries, keys

    def depends_on(self):
        rows, heads = zip(*(predicate.depends_on() for predicate in self.one + self.other), strict=True)
        return any(rows), any(heads)

    def shift_queries(self, offset):
        return self._each(lambda predicate: predicate.shift_queries(offset))

    def padded(self, num_queries, num_keys):
        return self._each(lambda predicate: predicate.padded(num_queries, num_keys))

    def _each(self, change):
        return Either(tuple(map(change, self.one)), tuple(map(change, self.other)))


def all_allowed(predicates: tuple[MaskPredicate, ...], tile: Tile) -> Bool[Array, "B_ N_ T_ S_"]:
    """The pairs that meet every predicate, of which there is at least one."""
    allowed = predicates[0].allowed(tile)
    for predicate in predicates[1:]:
        allowed = allowed & predicate.allowed(tile)
    return allowed


def all_visible(predicates: Iterable[MaskPredicate], grid: Grid) -> Any:
    """The tiles in which every predicate may allow a pair; a numpy array if all the predicates are known beforehand."""
    visible = np.ones((grid.queries.count, grid.keys.count), bool)
    for predicate in predicates:
        visible = visible & predicate.visible(grid)
    return visible


def _one_size(sizes: tuple[int | None, ...]) -> int | None:
    known = {size for size in sizes if size is not None}
    if len(known) > 1:
        raise ValueError(
            f"mask: its parts are made for {' and '.join(map(str, sorted(known)))} rows, heads, queries or keys"
        )
    return next(iter(known), None)


def _rows(x_BS: Array) -> int | None:
    return None if x_BS.shape[0] == 1 else x_BS.shape[0]


def _extremes(blocks: Blocks, segments_BS: Array) -> tuple[Array, Array]:
    """Lowest and highest segment number in each block that is not padding, both [B, count]."""
    split = blocks.split(segments_BS, 1, 0)
    top = jnp.iinfo(split.dtype).max
    return jnp.where(split == 0, top, split).min(-1), split.max(-1)


def _shifted(tile: Tile, offset: int) -> Tile:
    return dataclasses.replace(tile, queries=Span(tile.queries.start + offset, tile.queries.size))
