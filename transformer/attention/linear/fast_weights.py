"""Fast weight programmers: each position writes to a matrix, and queries read it. Time is linear in T, the state's size is fixed.

B batch, T query position, S key position, D embed, N query heads, K memories (key/value heads), G = N / K query heads a
memory, H head_dim, M features, V value features.

With φ a feature map, W_t the fast weights [M, V], β_t the write strength and α_t the fraction of the past that is kept:

    sum           W_t = W_t-1 + β_t φ(k_t) v_tᵀ                                     Schmidhuber 1992
    gated_sum     W_t = α_t W_t-1 + β_t φ(k_t) v_tᵀ                                 with decay
    delta         W_t = W_t-1 + β_t φ(k_t) (v_t - W_t-1ᵀ φ(k_t))ᵀ                   Schlag et al. 2021, section 4.2
    gated_delta   W_t = α_t W_t-1 + β_t φ(k_t) (v_t - α_t W_t-1ᵀ φ(k_t))ᵀ           Yang et al. 2024, Gated DeltaNet
    out_t = W_tᵀ φ(q_t)

Computing one position after another is the definition. Computing a chunk at once gives the same up to rounding: what the
positions of a chunk write, u_t = β_t (v_t - recalled), depends on the chunk's own earlier writes through a unit lower triangular
system (the UT transform of the WY representation, Yang et al. 2024, Parallelizing linear transformers with the delta rule).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer.attention.common import check_name, check_shapes
from transformer.attention.linear.chunks import scan_chunks
from transformer.attention.linear.feature_maps import FeatureMap, feature_dim, feature_map_of
from transformer.precision import einsum, matmul
from transformer.types import Array, Bool, DTypeLike, Float, Int, widen


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """How fast weights change: `erases` removes what the key recalls before writing, `decays` lets the past fade."""

    erases: bool
    decays: bool


RULES: dict[str, UpdateRule] = {
    "sum": UpdateRule(erases=False, decays=False),
    "gated_sum": UpdateRule(erases=False, decays=True),
    "delta": UpdateRule(erases=True, decays=False),
    "gated_delta": UpdateRule(erases=True, decays=True),
}


def fast_weights(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKV: Float[Array, "B T K V"],
    beta_BTK: Float[Array, "B T K"] | None = None,
    log_decay_BTK: Float[Array, "B T K"] | None = None,
    *,
    rule: str = "delta",
    feature_map: str | FeatureMap = "identity",
    chunk: int | None = 64,
    segments_BT: Int[Array, "B T"] | None = None,
    state_BKMV: Float[Array, "B K M V"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K M V"]]:
    """Write and read a whole sequence, causally: position t reads what was written up to t.

    The result does not depend on `chunk`, up to rounding. It takes O(T · chunk) time, and memory for one chunk's work in
    addition to inputs, outputs and (for gradients) one state per chunk; the backward pass recomputes each chunk.

    Args:
        beta_BTK: β, 1 by default. The delta rules are stable for β |φ(k)|² from 0 to 2.
        log_decay_BTK: log α, finite and at most 0; the gated rules need it, and only they take it.
        rule: a name of `RULES`.
        feature_map: φ, of both queries and keys; a name of `FEATURE_MAPS` or a function.
        chunk: number of positions computed at once: 1 is the definition, one after another; None is all of them.
        segments_BT: document numbers. The state restarts where a different number follows. 0 is padding: it writes nothing and
            fades nothing, and the document before it, or the initial state, continues after it.
        state_BKMV: the initial state, as returned by an earlier call; zeros by default.

    Returns:
        What each query read, in v's type, and the state after the last position, in float32 (float64 for float64 values).

    Raises:
        ValueError: unknown names, shapes that do not fit, a decay that is missing or not allowed, or a chunk below 1.
    """
    shapes: dict[str, Any] = {
        "q": (q_BTNH, "B T N H"),
        "k": (k_BTKH, "B T K H"),
        "v": (v_BTKV, "B T K V"),
        "beta": (beta_BTK, "B T K"),
        "log_decay": (log_decay_BTK, "B T K"),
        "segments": (segments_BT, "B T", jnp.integer),
        "state": (state_BKMV, "B K M V"),
    }
    check_shapes("fast_weights", **shapes)
    if chunk is not None and chunk < 1:
        raise ValueError(f"fast_weights: chunk={chunk}; expected 1 or more, or None")
    phi = feature_map_of(feature_map)
    state = _state_or_zeros(state_BKMV, k_BTKH, v_BTKV.shape[-1], phi, widen(v_BTKV).dtype)
    tokens = _tokens(q_BTNH, k_BTKH, v_BTKV, beta_BTK, log_decay_BTK, rule, segments_BT)
    T = q_BTNH.shape[1]
    chunk = max(T, 1) if chunk is None else min(chunk, max(T, 1))
    with jax.named_scope("fast_weights"):
        body = functools.partial(_step if chunk == 1 else _chunk, feature_map=phi, erases=RULES[rule].erases)
        if chunk == 1:
            state, out_TBKGV = jax.lax.scan(body, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
            out_BTKGV = jnp.moveaxis(out_TBKGV, 0, 1)
        else:
            state, out_BTKGV = scan_chunks(body, state, tokens, chunk)
    return out_BTKGV.reshape(*q_BTNH.shape[:3], v_BTKV.shape[-1]), state


def fast_weights_step(
    state_BKMV: Float[Array, "B K M V"],
    q_BNH: Float[Array, "B N H"],
    k_BKH: Float[Array, "B K H"],
    v_BKV: Float[Array, "B K V"],
    beta_BK: Float[Array, "B K"] | None = None,
    log_decay_BK: Float[Array, "B K"] | None = None,
    *,
    rule: str = "delta",
    feature_map: str | FeatureMap = "identity",
    valid_B: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, "B N V"], Float[Array, "B K M V"]]:
    """One position, with arguments as for `fast_weights`: what the query reads, and the next state, of the same fixed size."""

    def one(x: Any) -> Any:
        return None if x is None else x[:, None]

    out_B1NV, state_BKMV = fast_weights(
        one(q_BNH), one(k_BKH), one(v_BKV), one(beta_BK), one(log_decay_BK),
        rule=rule, feature_map=feature_map, state_BKMV=state_BKMV,
        segments_BT=None if valid_B is None else valid_B[:, None].astype(jnp.int32),
    )  # fmt: skip
    return out_B1NV[:, 0], state_BKMV


class _Tokens(NamedTuple):
    """Inputs of the positions: [B, T, ...] for many, [B, ...] for one. `starts` is true where the state restarts."""

    q_KGH: Array
    k_KH: Array
    v_KV: Array
    beta_K: Array
    log_decay_K: Array | None
    starts: Array | None


def _tokens(
    q: Array, k: Array, v: Array, beta: Array | None, log_decay: Array | None, rule: str, segments: Array | None
) -> _Tokens:  # fmt: skip
    check_name("fast_weights", "rule", rule, RULES)
    if RULES[rule].decays != (log_decay is not None):
        given = "None" if log_decay is None else f"of shape {log_decay.shape}"
        raise ValueError(f"fast_weights: log_decay is {given}; only the gated rules take it, and rule={rule!r}")
    N, K = q.shape[-2], k.shape[-2]
    if N % K:
        raise ValueError(f"fast_weights: q has {N} heads {q.shape}, not a multiple of k's {K} {k.shape}")
    dtype = widen(v).dtype
    beta = jnp.ones(k.shape[:-1], dtype) if beta is None else beta.astype(dtype)
    log_decay = None if log_decay is None else log_decay.astype(dtype)
    if segments is not None:
        valid_BT1 = (segments != 0)[..., None]
        beta = jnp.where(valid_BT1, beta, 0)
        log_decay = None if log_decay is None else jnp.where(valid_BT1, log_decay, 0)
    starts = None if segments is None else _starts(segments)
    return _Tokens(q.reshape(*k.shape[:-1], N // K, q.shape[-1]), k, v, beta, log_decay, starts)


def _state_or_zeros(state: Array | None, k: Array, num_values: int, feature_map: FeatureMap, dtype: DTypeLike) -> Array:
    shape = (k.shape[0], k.shape[-2], feature_dim(feature_map, k.shape[-1]), num_values)
    if state is None:
        return jnp.zeros(shape, dtype)
    if state.shape != shape:
        raise ValueError(f"fast_weights: state has shape {state.shape}; expected [B, K, M, V] = {shape}")
    return state.astype(dtype)


def _starts(segments_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where a document begins that is not the first of its row; padding is ignored."""
    places_BT = jnp.where(segments_BT != 0, jnp.arange(segments_BT.shape[1]), -1)
    before_BT = jnp.pad(jax.lax.cummax(places_BT, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    last_BT = jnp.take_along_axis(segments_BT, jnp.maximum(before_BT, 0), axis=1)
    return (segments_BT != 0) & (before_BT >= 0) & (segments_BT != last_BT)


def _step(state_BKMV: Array, tokens: _Tokens, *, feature_map: FeatureMap, erases: bool) -> tuple[Array, Array]:
    """One position, by the definition: the next state, and what the queries read, in v's type."""
    dtype = state_BKMV.dtype
    q_BKGM, k_BKM = feature_map(tokens.q_KGH.astype(dtype)), feature_map(tokens.k_KH.astype(dtype))
    v_BKV = tokens.v_KV.astype(dtype)
    if tokens.starts is not None:
        state_BKMV = jnp.where(tokens.starts[:, None, None, None], 0, state_BKMV)
    if tokens.log_decay_K is not None:
        state_BKMV = jnp.exp(tokens.log_decay_K)[..., None, None] * state_BKMV
    if erases:
        v_BKV = v_BKV - einsum("BKM,BKMV->BKV", k_BKM, state_BKMV)
    state_BKMV = state_BKMV + einsum("BKM,BKV->BKMV", k_BKM, tokens.beta_K[..., None] * v_BKV)
    return state_BKMV, einsum("BKGM,BKMV->BKGV", q_BKGM, state_BKMV).astype(tokens.v_KV.dtype)


def _chunk(state_BKMV: Array, tokens: _Tokens, *, feature_map: FeatureMap, erases: bool) -> tuple[Array, Array]:
    """`_step` over all positions of a chunk at once."""
    dtype = state_BKMV.dtype
    q_BTKGM, k_BTKM = feature_map(tokens.q_KGH.astype(dtype)), feature_map(tokens.k_KH.astype(dtype))
    written_BKTS, carried_BKT = _kept(tokens)
    beta_BKT = tokens.beta_K.swapaxes(1, 2)
    u_BKTV = beta_BKT[..., None] * tokens.v_KV.astype(dtype).swapaxes(1, 2)
    if erases:
        recalled_BKTV = einsum("BTKM,BKMV->BKTV", k_BTKM, state_BKMV)
        u_BKTV = u_BKTV - (beta_BKT * carried_BKT)[..., None] * recalled_BKTV
        overlap_BKTS = einsum("BTKM,BSKM->BKTS", k_BTKM, k_BTKM) * written_BKTS * beta_BKT[..., None]
        u_BKTV = matmul(unit_lower_inverse(overlap_BKTS), u_BKTV)
    scores_BKGTS = einsum("BTKGM,BSKM->BKGTS", q_BTKGM, k_BTKM) * written_BKTS[:, :, None]
    out_BTKGV = einsum("BKGTS,BKSV->BTKGV", scores_BKGTS, u_BKTV)
    from_state_BTKGV = einsum("BTKGM,BKMV->BTKGV", q_BTKGM, state_BKMV)
    out_BTKGV = out_BTKGV + carried_BKT.swapaxes(1, 2)[..., None, None] * from_state_BTKGV
    u_BKTV = written_BKTS[:, :, -1, :, None] * u_BKTV
    state_BKMV = carried_BKT[:, :, -1, None, None] * state_BKMV + einsum("BSKM,BKSV->BKMV", k_BTKM, u_BKTV)
    return state_BKMV, out_BTKGV.astype(tokens.v_KV.dtype)


def unit_lower_inverse(lower_TS: Float[Array, "*dims T T"]) -> Float[Array, "*dims T T"]:
    """(I + L)⁻¹ with L the strictly lower triangular part of each matrix; the other entries are not read.

    By halving: the inverse of [[A, 0], [C, B]] is [[A⁻¹, 0], [-B⁻¹ C A⁻¹, B⁻¹]], for all blocks of a size at once. As stable as
    substitution, with log₂ T products instead of T steps. (XLA's batched triangular solve may never return on a CPU with few
    cores.)
    """
    T, dims = lower_TS.shape[-1], lower_TS.shape[:-2]
    whole = 1 << max(T - 1, 0).bit_length()
    around = [(0, 0)] * len(dims) + [(0, whole - T)] * 2
    lower_TS = jnp.pad(lower_TS, around)
    inverse = jnp.ones((*dims, whole, 1, 1), lower_TS.dtype)
    for size in (1 << level for level in range(whole.bit_length() - 1)):
        pairs = whole // (2 * size)
        blocks = lower_TS.reshape(*dims, pairs, 2, size, pairs, 2, size)
        # For each pair of blocks on the diagonal, the block below it.
        corner = jnp.moveaxis(jnp.diagonal(blocks, axis1=-6, axis2=-3)[..., 1, :, 0, :, :], -1, -3)
        upper, last = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        top = jnp.concatenate([upper, jnp.zeros_like(corner)], axis=-1)
        inverse = jnp.concatenate(
            [top, jnp.concatenate([matmul(matmul(-last, corner), upper), last], axis=-1)], axis=-2
        )
    return inverse[..., 0, :T, :T]


def _kept(tokens: _Tokens) -> tuple[Array, Array]:
    """What remains at t of what was written at s, and of the state before the chunk: [B_, K_, T, S] and [B_, K_, T]."""
    T = tokens.beta_K.shape[1]
    seen_BTS = jnp.tril(jnp.ones((1, T, T), bool))
    carried_BT = jnp.ones((1, T), bool)
    if tokens.starts is not None:
        document_BT = jnp.cumsum(tokens.starts, axis=1)
        seen_BTS &= document_BT[:, :, None] == document_BT[:, None, :]
        carried_BT = document_BT == 0
    if tokens.log_decay_K is None:
        dtype = tokens.beta_K.dtype
        return seen_BTS[:, None].astype(dtype), carried_BT[:, None].astype(dtype)
    age_BKT = jnp.cumsum(tokens.log_decay_K, axis=1).swapaxes(1, 2)
    # Differences first: exp might overflow for a pair that is not seen.
    written_BKTS = jnp.exp(jnp.where(seen_BTS[:, None], age_BKT[..., None] - age_BKT[..., None, :], -jnp.inf))
    return written_BKTS, jnp.where(carried_BT[:, None], jnp.exp(age_BKT), 0)
