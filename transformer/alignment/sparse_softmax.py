"""From scores to weights with exact zeros: sparsemax and 1.5-entmax, and multi-head attention with either.

S key position, always the last dim of scores; "*dims" is any number of leading dims, usually B batch and T query position.
B batch, T query position, S key position, D embed, N query heads, K key/value heads, H head_dim.

Like softmax (α = 1), both solve max over p in the simplex of pᵀz + H_α(p), with the Tsallis entropy of order α = 2 and
α = 1.5 (Peters et al. 2019, section 3). The solution is exact, by sorting, in O(S log S), with a hand-written derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention.common import Normalizer, check_name, check_shapes, softmax
from transformer.attention.spec.mask import AttentionMask
from transformer.types import Array, Bool, Float, widen


def sparsemax(scores: Float[Array, "*#dims"], allowed: Bool[Array, "*#dims"] | None = None) -> Float[Array, "*#dims"]:
    """The point of the simplex nearest to the scores: p_s = max(z_s - τ, 0), with τ such that Σ p = 1.

    Martins & Astudillo 2016, equation 2 and algorithm 1; its Jacobian is diag(u) - u uᵀ / Σ u, where u is 1 on the
    support and 0 elsewhere (their section 2.5).

    Args:
        allowed: broadcastable to the scores; other keys get no weight. A row that allows nothing gives zeros.

    Returns:
        Weights in float32 (float64 for float64 scores).
    """
    return _masked(_sparsemax, scores, allowed)


def entmax15(scores: Float[Array, "*#dims"], allowed: Bool[Array, "*#dims"] | None = None) -> Float[Array, "*#dims"]:
    """1.5-entmax, between softmax and sparsemax: p_s = max(z_s / 2 - τ, 0)², with τ such that Σ p = 1.

    Peters et al. 2019, section 3; its Jacobian is diag(u) - u uᵀ / Σ u with u = √p.
    Arguments and result are as for `sparsemax`.
    """
    return _masked(_entmax15, scores, allowed)


NORMALIZERS: dict[str, Normalizer] = {"softmax": softmax, "sparsemax": sparsemax, "entmax15": entmax15}
"""Functions from scores, and where they are allowed, to weights."""


def sparse_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: AttentionMask | None = None,
    *,
    normalizer: str = "entmax15",
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """Dot-product attention with softmax replaced (Correia et al. 2019, at a fixed α).

    Args:
        normalizer: a name of `NORMALIZERS`.
        scale: multiplies the scores; 1/√H by default.

    Returns:
        The output in v's type, and the weights in float32 or wider.

    Raises:
        ValueError: an unknown name, or shapes that do not fit.
    """
    shapes = {"q": (q_BTNH, "B T N H"), "k": (k_BSKH, "B S K H"), "v": (v_BSKH, "B S K H")}
    check_shapes("sparse_attention", **shapes)
    check_name("sparse_attention", "normalizer", normalizer, NORMALIZERS)
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if N % K:
        raise ValueError(f"sparse_attention: q has {N} heads, not a multiple of k's {K} {k_BSKH.shape}")
    scale = H**-0.5 if scale is None else scale
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    dtype = widen(q_BTNH).dtype
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=dtype).reshape(B, N, T, S) * scale
    weights_BNTS = NORMALIZERS[normalizer](
        scores, None if mask is None else mask.materialize(T, S, batch_size=B, num_heads=N)
    )
    weights = weights_BNTS.astype(v_BSKH.dtype).reshape(B, K, N // K, T, S)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH, preferred_element_type=dtype).astype(v_BSKH.dtype)
    return out.reshape(B, T, N, H), weights_BNTS


def _masked(solve: Callable[[Array], Array], scores: Array, allowed: Array | None) -> Array:
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"sparse_softmax: scores is {scores.dtype} {scores.shape}; expected floating [..., S], S > 0")
    scores = widen(scores)
    if allowed is None:
        return solve(scores)
    return jnp.where(allowed, solve(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)), 0)


def _descending(z: Array) -> tuple[Array, Array]:
    """z sorted in descending order, and the number of terms up to each."""
    return jnp.flip(jnp.sort(z, axis=-1), axis=-1), jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)


def _from_top(z: Array) -> Array:
    """z minus its maximum, clipped at -2. A value 1 or more below the maximum has no weight in either function, so clipping
    does not change the result, and it keeps a mask's floor out of the sums."""
    return jnp.maximum(z - z.max(-1, keepdims=True), -2)


@jax.custom_jvp
def _sparsemax(z: Array) -> Array:
    z = _from_top(z)
    ordered, count = _descending(z)
    total = jnp.cumsum(ordered, axis=-1)
    size = jnp.sum(1 + count * ordered > total, axis=-1, keepdims=True)
    threshold = (jnp.take_along_axis(total, size - 1, axis=-1) - 1) / size.astype(z.dtype)
    return jnp.maximum(z - threshold, 0)


@_sparsemax.defjvp
def _sparsemax_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    p = _sparsemax(*primals)
    return p, _centred((p > 0).astype(p.dtype), *tangents)


@jax.custom_jvp
def _entmax15(z: Array) -> Array:
    z = _from_top(z / 2)
    ordered, count = _descending(z)
    mean = jnp.cumsum(ordered, axis=-1) / count
    variance = jnp.cumsum(ordered**2, axis=-1) / count - mean**2
    # Over its first terms, τ is the smaller root of Σ (z - τ)² = 1; the support is where the last of them exceeds it.
    threshold = mean - jnp.sqrt(jnp.maximum(1 / count - variance, 0))
    size = jnp.sum(threshold <= ordered, axis=-1, keepdims=True)
    return jnp.maximum(z - jnp.take_along_axis(threshold, size - 1, axis=-1), 0) ** 2


@_entmax15.defjvp
def _entmax15_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    p = _entmax15(*primals)
    return p, _centred(jnp.sqrt(p), *tangents)


def _centred(u: Array, dz: Any) -> Array:
    """(diag(u) - u uᵀ / Σ u) dz; u is never all zeros, since some weight is positive."""
    return u * (dz - jnp.sum(u * dz, axis=-1, keepdims=True) / jnp.sum(u, axis=-1, keepdims=True))
