"""Linearised self-attention: a kernel φ(q)·φ(k) in place of exp(q·k), so that keys and values can be summed first.

B batch, T query position, S key position, D embed, N query heads, K key/value heads, G = N / K query heads a group,
H head_dim, M features, V value features.

    out_t = φ(q_t)ᵀ Σ_s φ(k_s) v_sᵀ / (φ(q_t)ᵀ Σ_s φ(k_s))             Katharopoulos et al. 2020, equation 5

If causal, s runs up to t: the sums are then fast weights that the rule `sum` writes (Schlag et al. 2021, section 3.2). With
a 1 appended to each value, one memory holds both numerator and denominator.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention.common import check_shapes
from transformer.attention.linear.fast_weights import fast_weights
from transformer.attention.linear.feature_maps import FeatureMap, feature_map_of
from transformer.precision import einsum
from transformer.types import Array, Bool, Float, Int, widen


def linear_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    *,
    causal: bool = True,
    feature_map: str | FeatureMap = "elu",
    chunk: int | None = 64,
    valid_BS: Bool[Array, "B S"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    state_BKMV: Float[Array, "B K M V+1"] | None = None,
    epsilon: float = 1e-6,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K M V+1"] | None]:
    """Normalised linear attention. The weights are a distribution if the features are positive.

    Args:
        causal: position t sees keys up to t. Otherwise it sees every key, and T and S may differ.
        feature_map: φ, of both queries and keys; a name of `FEATURE_MAPS` or a function.
        chunk: number of positions computed at once. A number sums keys and values first, in O(T + S); None computes all
            weights, in O(T S). The result is the same.
        valid_BS: keys that may be seen.
        segments_BT: document numbers (0 is padding) of queries and keys; each document is contiguous, and attention stays in it.
        state_BKMV: the initial state, as returned by an earlier causal call.
        epsilon: added to the denominator; a query that sees no key gives zeros.

    Returns:
        The output in v's type; and, if causal, the sums of φ(k) [v, 1]ᵀ (of the last document), from which a call can continue.

    Raises:
        ValueError: unknown names, shapes that do not fit, or a state where attention is not causal.
    """
    shapes: dict[str, Any] = {
        "q": (q_BTNH, "B T N H"),
        "k": (k_BSKH, "B S K H"),
        "v": (v_BSKV, "B S K V"),
        "valid": (valid_BS, "B S", jnp.bool_),
        "segments": (segments_BT, "B T", jnp.integer),
    }
    check_shapes("linear_attention", **shapes)
    if (causal or segments_BT is not None) and q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise ValueError(
            f"linear_attention: q is {q_BTNH.shape} and k {k_BSKH.shape}; when causal or with segments, T and S are equal"
        )
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(
            f"linear_attention: q has {q_BTNH.shape[2]} heads {q_BTNH.shape}, not a multiple of k's {k_BSKH.shape[2]} "
            f"{k_BSKH.shape}"
        )
    if state_BKMV is not None and not causal:
        raise ValueError(
            f"linear_attention: state has shape {state_BKMV.shape}; only causal attention continues from a state"
        )
    phi = feature_map_of(feature_map)
    with jax.named_scope("linear_attention"):
        # A value of 1 next to the others sums the denominator of the weights; a key that is not seen adds to neither.
        v = widen(v_BSKV)
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        for seen_BS in (valid_BS, None if segments_BT is None else segments_BT != 0):
            v = v if seen_BS is None else jnp.where(seen_BS[:, :, None, None], v, 0)
        if causal:
            sums_BTNV, state_BKMV = fast_weights(
                q_BTNH, k_BSKH, v, rule="sum", feature_map=phi, chunk=chunk, segments_BT=segments_BT,
                state_BKMV=state_BKMV,
            )  # fmt: skip
        else:
            sums_BTNV = _both_ways(q_BTNH, k_BSKH, v, segments_BT, feature_map=phi, chunk=chunk)
        if segments_BT is not None:
            sums_BTNV = jnp.where((segments_BT != 0)[..., None, None], sums_BTNV, 0)
        out_BTNV = sums_BTNV[..., :-1] / (sums_BTNV[..., -1:] + epsilon)
        return out_BTNV.astype(v_BSKV.dtype), state_BKMV


def _both_ways(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKV: Array,
    segments_BT: Array | None,
    *,
    feature_map: FeatureMap,
    chunk: int | None,
) -> Array:
    """Σ_s φ(q_t)·φ(k_s) v_s over all keys of the query's document, [B, T, N, V] in v's type."""
    (B, T, N, _), K, wide = q_BTNH.shape, k_BSKH.shape[2], v_BSKV.dtype
    write = functools.partial(fast_weights, rule="sum", feature_map=feature_map, chunk=chunk)
    q_BTKGM = feature_map(q_BTNH.astype(wide)).reshape(B, T, K, N // K, -1)
    if chunk is None:
        weights = einsum("BTKGM,BSKM->BKGTS", q_BTKGM, feature_map(k_BSKH.astype(wide)))
        if segments_BT is not None:
            same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
            weights = jnp.where(same_BTS[:, None, None], weights, 0)
        return einsum("BKGTS,BSKV->BTKGV", weights, v_BSKV).reshape(B, T, N, -1)
    if segments_BT is None:
        # All keys write; the array of queries is empty.
        _, state_BKMV = write(k_BSKH[:, :, :0], k_BSKH, v_BSKV)
        return einsum("BTKGM,BKMV->BTKGV", q_BTKGM, state_BKMV).reshape(B, T, N, -1)
    past, _ = write(q_BTNH, k_BSKH, v_BSKV, segments_BT=segments_BT)
    flipped = (jnp.flip(x, axis=1) for x in (q_BTNH, k_BSKH, v_BSKV))
    future = jnp.flip(write(*flipped, segments_BT=jnp.flip(segments_BT, axis=1))[0], axis=1)
    # Both terms include the position itself.
    own_BTKG = einsum("BTKGM,BTKM->BTKG", q_BTKGM, feature_map(k_BSKH.astype(wide)))
    own_BTKGV = own_BTKG[..., None] * v_BSKV[:, :, :, None]
    return past + future - own_BTKGV.reshape(past.shape)
