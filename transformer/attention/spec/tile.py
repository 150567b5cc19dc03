"""The part of the T×S plane that a kernel works on: spans, tiles of four spans, and the grid of all tiles.

B batch, T query position, S key position, N query heads.

A mask or a score function is evaluated for one tile at a time, so that the whole plane is never created. A tile's positions
are those of the whole sequence, even if a device holds only a part of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.types import Array, Int


def filled(x: Array, size: int, axis: int, fill: Any = 0) -> Array:
    """`x` with `axis` padded at its end to `size` places."""
    around = [(0, 0)] * x.ndim
    around[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, around, constant_values=fill)


def plane_filled(x_BNTS: Array, num_queries: int, num_keys: int) -> Array:
    """An array over the plane, padded to these numbers of queries and keys; a dim of 1 applies to every place and is kept."""
    for axis, size in ((2, num_queries), (3, num_keys)):
        if x_BNTS.shape[axis] > 1:
            x_BNTS = filled(x_BNTS, size, axis)
    return x_BNTS


@dataclasses.dataclass(frozen=True)
class Span:
    """`size` places of one dim from `start` on; `start` may be traced."""

    start: int | Array
    size: int

    @property
    def positions(self) -> Int[Array, " n"]:
        """The places, one by one."""
        return self.start + jnp.arange(self.size)

    def cut(self, x: Array, axis: int) -> Array:
        """These places of `x`; a dim of 1 applies to every place and is kept."""
        if x.shape[axis] == 1 or x.shape[axis] == self.size:
            return x
        if isinstance(self.start, int):
            return jax.lax.slice_in_dim(x, self.start, self.start + self.size, axis=axis)
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=axis)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block of queries against a block of keys, for some rows of the batch and some heads."""

    batch: Span
    heads: Span
    queries: Span
    keys: Span

    @staticmethod
    def whole(batch_size: int, num_heads: int, num_queries: int, num_keys: int) -> Tile:
        """The whole plane."""
        return Tile(Span(0, batch_size), Span(0, num_heads), Span(0, num_queries), Span(0, num_keys))

    @property
    def indices(self) -> tuple[Array, Array, Array, Array]:
        """Row, head, query position and key position, shaped to broadcast to [B, N, t, s]."""
        b, h, q, k = (span.positions for span in (self.batch, self.heads, self.queries, self.keys))
        return b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], k[None, None, None, :]

    def cut(self, x_BNTS: Array) -> Array:
        """The tile's part of an array over heads and plane, any of whose dims may be 1."""
        return self.keys.cut(self.queries.cut(self.heads.cut(x_BNTS, 1), 2), 3)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A range of one dim, from `base` on, divided into `count` blocks of `size` places."""

    size: int
    count: int
    base: int | Array = 0

    @property
    def first(self) -> Any:
        """Each block's first place: numpy if `base` is a plain number, so that it stays static."""
        return np.arange(self.count) * self.size + self.base

    @property
    def last(self) -> Any:
        """Each block's last place."""
        return self.first + (self.size - 1)

    def span(self, index: int | Array) -> Span:
        """One of the blocks, in places of the whole dim."""
        return Span(self.base + index * self.size, self.size)

    def part(self, index: int | Array) -> Span:
        """One of the blocks, in places of the range."""
        return Span(index * self.size, self.size)

    def split(self, x: Array, axis: int, fill: Any) -> Array:
        """The range of `x` with `axis` as [count, size], padded with `fill` after the end of the dim."""
        length = self.size * self.count
        if isinstance(self.base, int):
            x = filled(x, max(self.base + length, x.shape[axis]), axis, fill)
        stretch = Span(self.base, length).cut(x, axis)
        return stretch.reshape(*x.shape[:axis], self.count, self.size, *x.shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Grid:
    """The plane as blocks of queries × blocks of keys."""

    batch: Span
    heads: Span
    queries: Blocks
    keys: Blocks

    def tile(self, query_block: int | Array, key_block: int | Array) -> Tile:
        """One of the tiles."""
        return Tile(self.batch, self.heads, self.queries.span(query_block), self.keys.span(key_block))
