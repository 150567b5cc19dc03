"""Relative embeddings: a vector for each distance of two tokens, or for each range of distances, which all layers share.

D embed, R rows of the table; "..." is any number of dims.

He et al. 2021 (DeBERTa), section 3.1; ranges of distances are those of the released code for its second and third version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.layers.norm import LayerNorm
from transformer.sharding import with_axes
from transformer.types import Array, DTypeLike, Float, Int


def distance_rows(
    distances: Int[np.ndarray, ...], *, max_distance: int, num_buckets: int | None = None
) -> Int[np.ndarray, ...]:
    """The row of the table for each distance δ of a query from a key, which is negative for keys after the query.

    Without buckets it is δ + k, at least 0 and at most 2k - 1, with k = max_distance (equation 3). With k = num_buckets,
    distances up to k/2 have a row each; the rows beyond, on both sides, are for ranges that widen geometrically up to
    max_distance.
    """
    half = max_distance
    if num_buckets is not None:
        half, exact = num_buckets, num_buckets // 2
        # In float32 as the model's authors compute it, since some boundaries are at whole numbers.
        ratio = np.log(np.maximum(np.abs(distances), exact).astype(np.float32) / np.float32(exact))
        longest = np.log(np.float32((max_distance - 1) / exact))
        wide = exact + np.ceil(ratio / longest * np.float32(exact - 1)).astype(np.int64)
        distances = np.where(np.abs(distances) <= exact, distances, np.sign(distances) * wide)
    return np.clip(distances + half, 0, 2 * half - 1)


class RelativeEmbedding(nnx.Module):
    """A table with two rows for each of `max_distance` distances, or of `num_buckets` ranges of them: one for each sign.

    Args:
        max_distance: from this distance on, in tokens, all distances share a row.
        num_buckets: None: a row for each distance.
        norm_epsilon: of a layer norm of the rows; None: they are used as they are.
        init: initialiser of the table.
        dtype: the type of the rows that a call returns.
    """

    def __init__(
        self,
        dim: int,
        *,
        max_distance: int,
        num_buckets: int | None = None,
        norm_epsilon: float | None = None,
        init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.max_distance, self.num_buckets, self.dtype = max_distance, num_buckets, dtype
        shape = (2 * (num_buckets or max_distance), dim)
        self.table = nnx.Param(with_axes(init, None, "embed")(rngs.params(), shape, param_dtype))
        self.norm: LayerNorm | None = None
        if norm_epsilon is not None:
            self.norm = nnx.data(LayerNorm(dim, epsilon=norm_epsilon, param_dtype=param_dtype, rngs=rngs))

    def __call__(self) -> Float[Array, "R D"]:
        """All rows, normalised if they have a norm."""
        with jax.named_scope("relative_embedding"):
            rows_RD = self.table[...].astype(self.dtype)
            return rows_RD if self.norm is None else self.norm(rows_RD)

    def rows(self, distances: Any) -> Any:
        """The number of the row for each distance of a query from a key: of a NumPy array as one, also while tracing."""
        rows_of = functools.partial(distance_rows, max_distance=self.max_distance, num_buckets=self.num_buckets)
        if isinstance(distances, np.ndarray):
            return rows_of(distances)
        # Beyond max_distance the row is the same.
        known = rows_of(np.arange(-self.max_distance, self.max_distance + 1))
        return jnp.asarray(known)[jnp.clip(distances, -self.max_distance, self.max_distance) + self.max_distance]
