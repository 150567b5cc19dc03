"""A user's own function of (row, head, query, key), as in FlexAttention (Dong et al. 2024).

B batch, T query position, S key position, N query heads.

The function is written for one pair, in scalars; it is traced once and evaluated for a tile at a time. What it captures, such
as a tensor of slopes or a table of biases, becomes data of the `Mod`, so that it may be traced, batched and differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from transformer.attention.spec.tile import Tile
from transformer.types import Array, DTypeLike

_INDEX = jax.ShapeDtypeStruct((), jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mod:
    """A traced function: its program is static, and the arrays that it captured are leaves."""

    program: Any = dataclasses.field(metadata={"static": True})
    captured: list[Any]
    """Arrays; the annotation is not more specific, since JAX also puts placeholders in place of arrays."""

    @staticmethod
    def mask(function: Callable[..., Any]) -> Mod:
        """From a `mask_mod(b, h, q, k) -> bool`.

        Raises:
            ValueError: it returns anything but one boolean.
        """
        return _trace("mask_mod", function, (), jnp.bool_)

    @staticmethod
    def score(function: Callable[..., Any], dtype: DTypeLike) -> Mod:
        """From a `score_mod(score, b, h, q, k) -> score`, for scores of type `dtype`.

        Raises:
            ValueError: it returns anything but one number of that type.
        """
        return _trace("score_mod", function, (jax.ShapeDtypeStruct((), dtype),), dtype)

    @property
    def depends_on(self) -> tuple[bool, bool, bool, bool]:
        """Whether it uses the row, the head, the query and the key."""
        used = {id(atom) for equation in self.program.eqns for atom in equation.invars}
        used |= {id(atom) for atom in self.program.outvars}
        row, head, query, key = (id(atom) in used for atom in self.program.invars[-4:])
        return row, head, query, key

    def __call__(self, tile: Tile, scores_BNTS: Array | None = None) -> Array:
        """Its values over a tile, [B_, N_, t, s]; without scores, the dims of rows and heads that it does not use are 1."""
        function = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.program, self.captured))
        scores = () if scores_BNTS is None else (scores_BNTS,)
        shape = [
            span.size if scores or used or axis >= 2 else 1
            for axis, (span, used) in enumerate(
                zip((tile.batch, tile.heads, tile.queries, tile.keys), self.depends_on, strict=True)
            )
        ]

        def evaluate(*arguments: Array) -> Array:
            return function(*arguments)[0]

        positions = [index.astype(jnp.int32) for index in tile.indices]
        for axis in reversed(range(4)):
            # Each index runs along its own dim; scores, where there are any, along all four.
            in_axes = (0,) * len(scores) + tuple(0 if other == axis else None for other in range(4))
            evaluate = jax.vmap(evaluate, in_axes=in_axes)
        return evaluate(*scores, *(index.reshape(-1)[:size] for index, size in zip(positions, shape, strict=True)))


def _trace(name: str, function: Callable[..., Any], scores: tuple[Any, ...], dtype: DTypeLike) -> Mod:
    # Traced without a mesh, the program can run under any mesh, also on one device's share of a sequence.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*scores, *(_INDEX,) * 4)
    if getattr(shape, "shape", None) != () or shape.dtype != dtype:
        given = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", shape)
        raise ValueError(f"{name}: gives {given} for one pair; expected one {jnp.dtype(dtype).name} with no dims")
    return Mod(closed.jaxpr, list(closed.consts))
