"""Intra-attention of the long short-term memory-network, LSTMN (Cheng et al. 2016): an LSTM that attends to its own past.

B batch, T position of this call, S position on the tape, D input features, F features of hidden state and memory, A alignment
features.

Hidden states h and memories c of all positions are kept on a tape. At position t (equations 4 to 9):

    a_ts = vᵀ tanh(W_h h_s + W_x x_t + W_h̃ h̃_t-1),   α_t = softmax over s < t of a_ts
    [h̃_t, c̃_t] = Σ_s α_ts [h_s, c_s]
    [i, f, o, ĉ] = [σ, σ, σ, tanh](W [h̃_t, x_t] + b)
    c_t = f ⊙ c̃_t + i ⊙ ĉ,   h_t = o ⊙ tanh(c_t)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer.alignment.additive import additive_scores
from transformer.attention.common import check_shapes, headless_mask, softmax
from transformer.attention.spec.mask import AttentionMask
from transformer.differentiation import with_backward
from transformer.precision import einsum, matmul
from transformer.types import Array, Bool, Float, Int, widen


class LSTMNWeights(NamedTuple):
    """Parameters of `lstmn`."""

    hidden_FA: Float[Array, "F A"]
    """W_h."""
    input_DA: Float[Array, "D A"]
    """W_x."""
    summary_FA: Float[Array, "F A"]
    """W_h̃."""
    vector_A: Float[Array, " A"]
    """v."""
    summary_gates_FG: Float[Array, "F G"]
    """The part of W that multiplies h̃; G = 4 F, with the gates in the order i, f, o, ĉ."""
    input_gates_DG: Float[Array, "D G"]
    """The part of W that multiplies x."""
    bias_G: Float[Array, " G"]


class Tape(NamedTuple):
    """The states of the positions before a call."""

    hidden_BSF: Float[Array, "B S F"]
    memory_BSF: Float[Array, "B S F"]
    summary_BF: Float[Array, "B F"]
    """h̃ of the last position."""


def lstmn(
    x_BTD: Float[Array, "B T D"],
    weights: LSTMNWeights,
    mask: AttentionMask | None = None,
    *,
    tape: Tape | None = None,
    lengths_B: Int[Array, " B"] | None = None,
    valid_BT: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T F"], Tape, Float[Array, "B T S"]]:
    """Run the network over a sequence, one position after another.

    Each position attends to those before it that the mask allows; if there are none, h̃ and c̃ are zeros. Arithmetic is in
    float32 (float64 for a float64 x). The backward pass reads the finished tape, so both passes need memory linear in T
    in addition to the weights.

    Args:
        mask: of T positions over the S of the tape, in addition to causality.
        tape: the tape to continue; by default an empty one of T positions.
        lengths_B: number of positions that each row has already written to the tape; 0 by default.
        valid_BT: positions that are not padding; padding may follow them in a row, and leaves h̃ unchanged.

    Returns:
        The hidden states in x's type, the tape in float32 or wider, and the attention of each position to the tape.

    Raises:
        ValueError: shapes that do not fit, or a mask with heads.
    """
    dims = ("F A", "D A", "F A", "A", "F G", "D G", "G")
    parameters = {name: (w, letters) for name, w, letters in zip(weights._fields, weights, dims, strict=True)}
    check_shapes("lstmn", x=(x_BTD, "B T D"), **parameters)
    (B, T, _), (F, G) = x_BTD.shape, weights.summary_gates_FG.shape
    if G != 4 * F:
        raise ValueError(f"lstmn: summary_gates has shape {weights.summary_gates_FG.shape}; expected [F, 4 F]")
    dtype, x_BTD = x_BTD.dtype, widen(x_BTD)
    w = jax.tree.map(lambda parameter: parameter.astype(x_BTD.dtype), weights)
    if tape is None:
        zeros_BTF = jnp.zeros((B, T, F), x_BTD.dtype)
        tape = Tape(zeros_BTF, zeros_BTF, zeros_BTF[:, 0])
    S = tape.hidden_BSF.shape[1]
    places_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    places_BT = places_BT if lengths_B is None else places_BT + lengths_B[:, None]
    seen_BTS = jnp.arange(S, dtype=jnp.int32) < places_BT[:, :, None]
    allowed_BTS = headless_mask(mask, B, T, S)
    seen_BTS = seen_BTS if allowed_BTS is None else seen_BTS & allowed_BTS
    valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT

    with jax.named_scope("lstmn"):
        queries_BTA = matmul(x_BTD, w.input_DA)
        gates_BTG = matmul(x_BTD, w.input_gates_DG) + w.bias_G[None, None]
        tape_BS2F = jnp.concatenate([tape.hidden_BSF, tape.memory_BSF], axis=-1)
        start = (tape_BS2F, matmul(tape.hidden_BSF, w.hidden_FA), tape.summary_BF)
        over_time = tuple(jnp.moveaxis(x, 1, 0) for x in (queries_BTA, gates_BTG, seen_BTS, places_BT, valid_BT))
        recurrent = (w.hidden_FA, w.summary_FA, w.vector_A, w.summary_gates_FG)
        hidden_TBF, weights_TBS, tape_BS2F, summary_BF = with_backward(
            _forward, _backward, recurrent, start, *over_time
        )
    tape = Tape(tape_BS2F[..., :F], tape_BS2F[..., F:], summary_BF)
    return jnp.moveaxis(hidden_TBF, 0, 1).astype(dtype), tape, jnp.moveaxis(weights_TBS, 0, 1)


# Automatic differentiation of the scan would keep a copy of the tape for each position. But the part of the tape that a
# position has read is never overwritten, so the backward pass finds it on the finished tape.

_Carry = tuple[Array, Array, Array]
"""The tape [B, S, 2 F], its keys W_h h [B, S, A], and h̃ [B, F]."""


def _step(
    seen_BS: Array, recurrent: tuple[Array, ...], carry: _Carry, query_BA: Array, gates_BG: Array
) -> tuple[Array, Array, Array, Array]:
    """What a position writes, [B, 2 F] and its key [B, A]; its h̃ [B, F]; and its weights [B, S]."""
    (hidden_FA, summary_FA, vector_A, summary_gates_FG), (tape_BS2F, keys_BSA, summary_BF) = recurrent, carry
    F = summary_BF.shape[-1]
    query_BA = query_BA + matmul(summary_BF, summary_FA)
    weights_BS = softmax(additive_scores(query_BA[:, None], keys_BSA, vector_A)[:, 0], seen_BS)
    read_B2F = einsum("BS,BSW->BW", weights_BS, tape_BS2F)
    summary_BF, carried_BF = read_B2F[:, :F], read_B2F[:, F:]
    i, f, o, candidate = jnp.split(gates_BG + matmul(summary_BF, summary_gates_FG), 4, axis=-1)
    memory_BF = jax.nn.sigmoid(f) * carried_BF + jax.nn.sigmoid(i) * jnp.tanh(candidate)
    hidden_BF = jax.nn.sigmoid(o) * jnp.tanh(memory_BF)
    return jnp.concatenate([hidden_BF, memory_BF], axis=-1), matmul(hidden_BF, hidden_FA), summary_BF, weights_BS


def _forward(recurrent: tuple[Array, ...], start: _Carry, *over_time: Array) -> tuple[tuple[Array, ...], tuple]:
    rows_B = jnp.arange(start[0].shape[0])

    def step(carry: _Carry, now: tuple[Array, ...]) -> tuple[_Carry, tuple[Array, ...]]:
        (tape_BS2F, keys_BSA, before_BF), (query_BA, gates_BG, seen_BS, place_B, valid_B) = carry, now
        entry_B2F, key_BA, summary_BF, weights_BS = _step(seen_BS, recurrent, carry, query_BA, gates_BG)
        tape_BS2F = tape_BS2F.at[rows_B, place_B].set(entry_B2F, unique_indices=True, mode="drop")
        keys_BSA = keys_BSA.at[rows_B, place_B].set(key_BA, unique_indices=True, mode="drop")
        summary_BF = jnp.where(valid_B[:, None], summary_BF, before_BF)
        return (tape_BS2F, keys_BSA, summary_BF), (entry_B2F[:, : before_BF.shape[1]], weights_BS, before_BF)

    (tape_BS2F, keys_BSA, summary_BF), (hidden_TBF, weights_TBS, before_TBF) = jax.lax.scan(step, start, over_time)
    saved = (recurrent, tape_BS2F, keys_BSA, before_TBF, over_time)
    return (hidden_TBF, weights_TBS, tape_BS2F, summary_BF), saved


def _backward(saved: tuple, gradients: tuple[Array, ...]) -> tuple:
    recurrent, tape_BS2F, keys_BSA, before_TBF, over_time = saved
    dhidden_TBF, dweights_TBS, dtape_BS2F, dsummary_BF = gradients
    rows_B = jnp.arange(tape_BS2F.shape[0])

    def step(carry: tuple, now: tuple[Array, ...]) -> tuple[tuple, tuple[Array, Array]]:
        drecurrent, dtape_BS2F, dkeys_BSA, dafter_BF = carry
        dhidden_BF, dweights_BS, before_BF, query_BA, gates_BG, seen_BS, place_B, valid_B = now
        dentry_B2F = dtape_BS2F.at[rows_B, place_B].get(mode="fill", fill_value=0)
        dentry_B2F += jnp.pad(dhidden_BF, ((0, 0), (0, dhidden_BF.shape[1])))
        dkey_BA = dkeys_BSA.at[rows_B, place_B].get(mode="fill", fill_value=0)
        # The earlier contents of this place on the tape have no influence after this position.
        dtape_BS2F = dtape_BS2F.at[rows_B, place_B].set(0, unique_indices=True, mode="drop")
        dkeys_BSA = dkeys_BSA.at[rows_B, place_B].set(0, unique_indices=True, mode="drop")
        dsummary_BF = jnp.where(valid_B[:, None], dafter_BF, 0)
        _, pull = jax.vjp(
            functools.partial(_step, seen_BS), recurrent, (tape_BS2F, keys_BSA, before_BF), query_BA, gates_BG
        )
        d, (dtape, dkeys, dbefore_BF), dquery_BA, dgates_BG = pull((dentry_B2F, dkey_BA, dsummary_BF, dweights_BS))
        drecurrent = jax.tree.map(jnp.add, drecurrent, d)
        dbefore_BF += dafter_BF - dsummary_BF
        return (drecurrent, dtape_BS2F + dtape, dkeys_BSA + dkeys, dbefore_BF), (dquery_BA, dgates_BG)

    start = (jax.tree.map(jnp.zeros_like, recurrent), dtape_BS2F, jnp.zeros_like(keys_BSA), dsummary_BF)
    (drecurrent, *dstart), (dqueries, dgates) = jax.lax.scan(
        step, start, (dhidden_TBF, dweights_TBS, before_TBF, *over_time), reverse=True
    )
    return drecurrent, tuple(dstart), dqueries, dgates, None, None, None
