"""What the mechanisms share: a masked softmax, a weighted mean, and the checks of their arguments.

B batch, T query position, S key position, V value features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention.spec.mask import AttentionMask
from transformer.errors import nearest
from transformer.precision import matmul
from transformer.types import Array, Bool, Float, widen

Normalizer = Callable[[Array, Array | None], Array]
"""From scores [B, T, S], and where they are allowed, to weights: `softmax`, or one of `sparse_softmax.NORMALIZERS`."""


def softmax(scores: Float[Array, "*#dims"], allowed: Bool[Array, "*#dims"] | None = None) -> Float[Array, "*#dims"]:
    """Softmax over the last dim in float32 or wider, zero where not allowed; all zeros for a row that allows nothing."""
    scores = widen(scores)
    if allowed is None:
        return jax.nn.softmax(scores, axis=-1)
    # A finite floor keeps an empty row free of NaN, in the gradient too; the second `where` sets it to zeros.
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(allowed, weights, 0)


def context(weights_BTS: Float[Array, "B T S"], values_BSV: Float[Array, "B S V"]) -> Float[Array, "B T V"]:
    """Σ_s α_ts v_s, computed in the weights' type, in the values' type."""
    return matmul(weights_BTS, values_BSV.astype(weights_BTS.dtype)).astype(values_BSV.dtype)


def headless_mask(
    mask: AttentionMask | None, batch_size: int, num_queries: int, num_keys: int
) -> Bool[Array, "B_ T_ S_"] | None:
    """The mask of a mechanism with one head; None if everything is allowed.

    Raises:
        ValueError: a mask that differs by head, or is made for other numbers of rows, queries or keys.
    """
    allowed_BNTS = None if mask is None else mask.materialize(num_queries, num_keys, batch_size=batch_size)
    if allowed_BNTS is None:
        return None
    if allowed_BNTS.shape[1] != 1:
        raise ValueError(f"mask: it has {allowed_BNTS.shape[1]} heads {allowed_BNTS.shape}; this attention has one")
    return allowed_BNTS[:, 0]


def check_shapes(caller: str, **arguments: tuple[Array | None, str] | tuple[Array | None, str, Any]) -> None:
    """Raise a `ValueError` unless every array is floating-point (or of the type given) and its dims match the letters.

        check_shapes("attention", q=(q, "B T D"), valid=(valid, "B T", jnp.bool_))

    A letter is the same size in each argument; an argument that is None always fits.
    """
    sizes: dict[str, int] = {}
    for name, (array, letters, *kinds) in arguments.items():
        if array is None:
            continue
        dims, kind = letters.split(), kinds[0] if kinds else jnp.floating
        fits = len(dims) == array.ndim and all(
            sizes.get(dim, size) == size for dim, size in zip(dims, array.shape, strict=True)
        )
        if not (fits and jnp.issubdtype(array.dtype, kind)):
            wanted = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in dims)
            raise ValueError(f"{caller}: {name} is {array.dtype} {array.shape}; expected {kind.__name__} [{wanted}]")
        sizes |= zip(dims, array.shape, strict=True)


def check_name(caller: str, argument: str, name: str, names: Iterable[str]) -> None:
    """Raise a `ValueError` for a name that is not among `names`."""
    names = tuple(names)
    if name not in names:
        raise ValueError(
            f"{caller}: {argument}={name!r} does not exist; there are {', '.join(names)}.{nearest(name, names)}"
        )
