"""Linearised self-attention: a kernel φ(q)·φ(k) in place of exp(q·k), so that keys and values can be summed first.

B batch, T query position, S key position, D embed, N query heads, K key/value heads, G = N / K query heads a group,
H head_dim, M features, V value features.

    out_t = φ(q_t)ᵀ Σ_s φ(k_s) v_sᵀ / (φ(q_t)ᵀ Σ_s φ(k_s))             Katharopoulos et al. 2020, equation 5

Causally, s runs up to t: the sums are then fast weights that the rule `sum` writes (Schlag et al. 2021, section 3.2), and with
a 1 appended to each value the one memory holds both numerator and denominator.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention.common import check_name, check_shapes
from transformer.attention.fast_weights import FORMS, fast_weights
from transformer.attention.feature_maps import FeatureMap, feature_map_of
from transformer.precision import einsum
from transformer.types import Array, Bool, Float, Int, widen


def linear_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    *,
    causal: bool = True,
    feature_map: str | FeatureMap = "elu",
    form: str = "chunked",
    chunk: int = 64,
    valid_BS: Bool[Array, "B S"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    state_BKMV: Float[Array, "B K M V+1"] | None = None,
    epsilon: float = 1e-6,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K M V+1"] | None]:
    """Normalised linear attention, of positive features for the weights to be a distribution.

    Args:
        causal: position t sees keys up to t. Otherwise every key, and T and S may differ.
        feature_map: φ, of both queries and keys; a name of `FEATURE_MAPS` or a function.
        form: `parallel` computes all weights, O(T S); `chunked` and `recurrent` sum keys and values first, O(T + S).
        chunk: positions a chunk.
        valid_BS: keys that are seen.
        segments_BT: document numbers (0 is padding) of queries and keys, each document in one piece: attention stays in it.
        state_BKMV: what to start from, as an earlier causal call returned it.
        epsilon: added to the denominator; a query that sees no key gives zeros.

    Returns:
        The output in v's type; and, when causal, the sums of φ(k) [v, 1]ᵀ (of the last document) to go on from.

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
    check_name("linear_attention", "form", form, FORMS)
    if (causal or segments_BT is not None) and q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise ValueError(
            f"linear_attention: q is {q_BTNH.shape} and k {k_BSKH.shape}; when causal or with segments, T and S are equal"
        )
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(
            f"linear_attention: q has {q_BTNH.shape[2]} heads {q_BTNH.shape}, no multiple of k's {k_BSKH.shape[2]} {k_BSKH.shape}"
        )
    if state_BKMV is not None and not causal:
        raise ValueError(
            f"linear_attention: state has shape {state_BKMV.shape}; only causal attention goes on from one"
        )
    options: dict[str, Any] = {"feature_map": feature_map_of(feature_map), "form": form, "chunk": chunk}
    with jax.named_scope("linear_attention"):
        if causal:
            return fast_weights(
                q_BTNH, k_BSKH, v_BSKV, rule="sum", valid_BT=valid_BS, segments_BT=segments_BT,
                state_BKMV=state_BKMV, epsilon=epsilon, **options,
            )  # fmt: skip
        v = widen(v_BSKV)
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        sums_BTNV = _both_ways(q_BTNH, k_BSKH, v, valid_BS, segments_BT, **options)
        return (sums_BTNV[..., :-1] / (sums_BTNV[..., -1:] + epsilon)).astype(v_BSKV.dtype), None


def _both_ways(
    q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, valid_BS: Array | None, segments_BT: Array | None, *,
    feature_map: FeatureMap, form: str, chunk: int,
) -> Array:  # fmt: skip
    """Σ_s φ(q_t)·φ(k_s) v_s over all keys that are seen, [B, T, N, V] in v's type."""
    (B, T, N, _), (S, K), wide = q_BTNH.shape, k_BSKH.shape[1:3], v_BSKV.dtype
    write = functools.partial(fast_weights, rule="sum", feature_map=feature_map, form=form, chunk=chunk)
    q_BTKGM = feature_map(q_BTNH.astype(wide)).reshape(B, T, K, N // K, -1)
    if form == "parallel":
        seen_BTS = jnp.ones((1, 1, S), bool) if valid_BS is None else valid_BS[:, None]
        if segments_BT is not None:
            same = segments_BT[:, :, None] == segments_BT[:, None, :]
            seen_BTS = seen_BTS & same & (segments_BT != 0)[:, None, :]
        weights = einsum("BTKGM,BSKM->BKGTS", q_BTKGM, feature_map(k_BSKH.astype(wide)))
        weights = jnp.where(seen_BTS[:, None, None], weights, 0)
        return einsum("BKGTS,BSKV->BTKGV", weights, v_BSKV).reshape(B, T, N, -1)
    if segments_BT is None:
        # Written by all keys while no query reads.
        _, state_BKMV = write(k_BSKH[:, :, :0], k_BSKH, v_BSKV, valid_BT=valid_BS)
        return einsum("BTKGM,BKMV->BTKGV", q_BTKGM, state_BKMV).reshape(B, T, N, -1)
    written_BS = segments_BT != 0 if valid_BS is None else valid_BS & (segments_BT != 0)
    past, _ = write(q_BTNH, k_BSKH, v_BSKV, valid_BT=written_BS, segments_BT=segments_BT)
    flipped = (jnp.flip(x, axis=1) for x in (q_BTNH, k_BSKH, v_BSKV))
    flags: dict[str, Any] = {"valid_BT": jnp.flip(written_BS, axis=1), "segments_BT": jnp.flip(segments_BT, axis=1)}
    future = jnp.flip(write(*flipped, **flags)[0], axis=1)
    # Both count the position itself.
    own_BTKG = einsum("BTKGM,BTKM->BTKG", q_BTKGM, feature_map(k_BSKH.astype(wide)))
    own_BTKGV = jnp.where(written_BS[:, :, None, None], own_BTKG, 0)[..., None] * v_BSKV[:, :, :, None]
    return past + future - own_BTKGV.reshape(past.shape)
