"""One tile of exact attention, forward and backward: the arithmetic that `blockwise` and `ring` share.

B batch, T query position, S key position, K key/value heads, G query heads a group, H head_dim, C value dim.

Softmax is computed online (Milakov and Gimelshein 2018; Rabe and Staats 2021): with a running maximum, sum and weighted sum of
values, one pass over the keys is enough. The backward pass recomputes the weights from one log-sum-exp per row, as in Dao et
al. 2022, algorithm 4. Arrays are heads first, so that every product is a batch of plain matrices.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from transformer.attention.spec.spec import AttentionSpec
from transformer.attention.spec.tile import Tile
from transformer.types import Array, DTypeLike, Float, wide, widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running:
    """An online softmax over the keys seen so far; for a ring's two chunks, with a leading dim of 2."""

    top: Float[Array, "*chunks B K G T 1"]
    """The largest logit so far."""
    total: Float[Array, "*chunks B K G T 1"]
    """The sum of exp(logit - top)."""
    values: Float[Array, "*chunks B K G T C"]
    """The sum of exp(logit - top) · value, with dropout."""

    @staticmethod
    def start(shape: tuple[int, ...], value_dim: int, dtype: DTypeLike) -> Running:
        """The state before any keys, for queries of shape [B, K, G, T]."""
        return Running(
            jnp.full((*shape, 1), jnp.finfo(dtype).min, dtype),
            jnp.zeros((*shape, 1), dtype),
            jnp.zeros((*shape, value_dim), dtype),
        )

    def finish(self, dtype: DTypeLike) -> tuple[Float[Array, "*chunks B K G T C"], Float[Array, "*chunks B K G T 1"]]:
        """The output, with zeros where there was no key, and the log-sum-exp of the logits."""
        # Without any key the divisor is 1: forward mode squares its inverse, which overflows for a tiny one.
        total = jnp.where(self.total > 0, self.total, 1)
        return (self.values / total).astype(dtype), self.top + jnp.log(total)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradients:
    """Sums of gradients over the tiles so far, in the type that softmax is computed in."""

    q: Float[Array, "*chunks B K G T H"]
    k: Float[Array, "*chunks B K S H"]
    v: Float[Array, "*chunks B K S C"]
    score: list[Array]

    @staticmethod
    def zero(q: Array, k: Array, v: Array, spec: AttentionSpec) -> Gradients:
        """The sums before any tile."""
        q, k, v = (jnp.zeros(x.shape, wide(x.dtype)) for x in (q, k, v))
        return Gradients(q, k, v, spec.score.zero_gradients())


def forward(
    running: Running,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S C"],
    spec: AttentionSpec,
    tile: Tile,
) -> Running:
    """The softmax after one more tile of keys."""
    _, logits, allowed = _logits(q, k, spec, tile)
    # The output does not depend on the maximum; in forward mode its derivative divides by the number of maxima, which may be 0 if
    # a compiler computes the logits twice.
    top = jnp.maximum(running.top, jax.lax.stop_gradient(logits).max(-1, keepdims=True))
    powers = jnp.exp(logits - top)
    if allowed is not None:
        # For a row with no key so far, the floor is the maximum, and all powers are 1.
        powers = jnp.where(allowed, powers, 0)
    shrink = jnp.exp(running.top - top)
    total = shrink * running.total + powers.sum(-1, keepdims=True)
    if spec.dropout is not None:
        powers = _by_group(spec.dropout(_by_head(powers), tile), powers.shape)
    values = jnp.einsum("BKGTS,BKSC->BKGTC", powers.astype(v.dtype), v, preferred_element_type=powers.dtype)
    return Running(top, total, shrink * running.values + values)


def backward(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S C"],
    lse: Float[Array, "B K G T 1"],
    delta: Float[Array, "B K G T 1"],
    dout: Float[Array, "B K G T C"],
    spec: AttentionSpec,
    tile: Tile,
) -> Gradients:
    """The gradients with a tile's contribution added; `lse` as `Running.finish` returns it, and `delta` of the whole row."""
    products, logits, allowed = _logits(q, k, spec, tile)
    weights = jnp.exp(logits - lse)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0)
    dweights = jnp.einsum("BKGTC,BKSC->BKGTS", dout, v, preferred_element_type=weights.dtype)
    kept = weights
    if spec.dropout is not None:
        # Dropout is linear in the weights, so it is its own transpose.
        kept = _by_group(spec.dropout(_by_head(weights), tile), weights.shape)
        dweights = _by_group(spec.dropout(_by_head(dweights), tile), weights.shape)
    dlogits = weights * (dweights - delta)
    dproducts, dscore = spec.score.pullback(_by_head(products), _by_head(dlogits), tile)
    dproducts = _by_group(dproducts, products.shape).astype(q.dtype)
    return Gradients(
        jnp.einsum("BKGTS,BKSH->BKGTH", dproducts, k, preferred_element_type=weights.dtype),
        jnp.einsum("BKGTS,BKGTH->BKSH", dproducts, q, preferred_element_type=weights.dtype),
        jnp.einsum("BKGTS,BKGTC->BKSC", kept.astype(dout.dtype), dout, preferred_element_type=weights.dtype),
        dscore,
    )


def delta(
    dout: Float[Array, "*chunks B K G T C"], out: Float[Array, "*chunks B K G T C"]
) -> Float[Array, "*chunks B K G T 1"]:
    """The sum over C of dout · out: the term that the gradients of all of a row's weights share."""
    return (widen(dout) * widen(out)).sum(-1, keepdims=True)


def _logits(q: Array, k: Array, spec: AttentionSpec, tile: Tile) -> tuple[Array, Array, Array | None]:
    """A tile's products, its logits, and where the mask allows them, all [B_, K_, G_, t, s]."""
    products = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=wide(q.dtype))
    logits, allowed = spec.logits(_by_head(products), tile)
    allowed = None if allowed is None else _mask_by_group(allowed, products.shape)
    return products, _by_group(logits, products.shape), allowed


def _by_head(x: Array) -> Array:
    """[B, K, G, t, s] to [B, N, t, s]: N runs over K first."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _by_group(x: Array, shape: tuple[int, ...]) -> Array:
    return x.reshape(shape)


def _mask_by_group(allowed: Array, shape: tuple[int, ...]) -> Array:
    """[B_, N_, t_, s_] to [B_, K_, G_, t_, s_]."""
    heads = (1, 1) if allowed.shape[1] == 1 else shape[1:3]
    return allowed.reshape(allowed.shape[0], *heads, *allowed.shape[2:])
