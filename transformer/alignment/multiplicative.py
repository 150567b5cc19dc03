"""Multiplicative attention (Luong et al. 2015): three scores, over all keys or over a window of them.

B batch, T query position, S key position, D query features (the decoder's state h), E key features (the encoder's states h̄),
A alignment features.

    score(h_t, h̄_s) = h_tᵀ h̄_s  (dot),  h_tᵀ W_a h̄_s  (general),  v_aᵀ tanh(W_a [h_t; h̄_s])  (concat: `additive_scores`)
    α_ts = softmax over s of the score                                            Luong et al. 2015, equation 7
    c_t  = Σ_s α_ts h̄_s
    h̃_t  = tanh(W_c [c_t; h_t])                                                   equation 5

Local attention sees only the keys from p_t - D to p_t + D. local-m sets p_t = t; local-p predicts it (equation 9), and
its weights decay with the distance from it (equation 10).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from transformer.attention.common import check_shapes, headless_mask, softmax
from transformer.attention.spec.mask import AttentionMask
from transformer.precision import einsum, matmul
from transformer.types import Array, Float, Int, widen


def dot_scores(q_BTE: Float[Array, "B T E"], k_BSE: Float[Array, "B S E"]) -> Float[Array, "B T S"]:
    """q_tᵀ k_s in float32 or wider. For `general`, pass W_aᵀ h_t as the query."""
    check_shapes("dot_scores", q=(q_BTE, "B T E"), k=(k_BSE, "B S E"))
    return einsum("BTE,BSE->BTS", widen(q_BTE), widen(k_BSE))


def predicted_positions(
    hidden_BTA: Float[Array, "B T A"], vector_A: Float[Array, " A"], lengths_B: Int[Array, " B"] | int
) -> Float[Array, "B T"]:
    """p_t = S · sigmoid(v_pᵀ tanh(W_p h_t)) (Luong et al. 2015, equation 9), in float32 or wider.

    Args:
        hidden_BTA: W_p h_t.
        lengths_B: S, the number of keys of each row.
    """
    check_shapes("predicted_positions", hidden=(hidden_BTA, "B T A"), vector=(vector_A, "A"))
    share_BT = jax.nn.sigmoid(matmul(jnp.tanh(widen(hidden_BTA)), widen(vector_A)))
    return jnp.asarray(lengths_B, share_BT.dtype).reshape(-1, 1) * share_BT


def local_weights(
    scores_BTS: Float[Array, "B T S"],
    positions_BT: Float[Array, "B T"] | Int[Array, "B T"],
    window: int,
    mask: AttentionMask | None = None,
    *,
    gaussian: bool = False,
) -> Float[Array, "B T S"]:
    """Softmax over the keys from p_t - D to p_t + D (Luong et al. 2015, section 3.2).

    Args:
        positions_BT: p_t.
        window: D, at least 1.
        gaussian: multiply by exp(-(s - p_t)² / (2 σ²)) with σ = D / 2 (equation 10). As in the paper, the weights are
            not renormalised, so each row sums to less than 1.

    Raises:
        ValueError: a window below 1, shapes that do not fit, or a mask with heads.
    """
    check_shapes("local_weights", scores=(scores_BTS, "B T S"), positions=(positions_BT, "B T", jnp.number))
    if window < 1:
        raise ValueError(f"local_weights: window={window}; expected 1 or more positions to each side")
    S = scores_BTS.shape[2]
    scores_BTS = widen(scores_BTS)
    distance_BTS = jnp.arange(S, dtype=scores_BTS.dtype) - positions_BT.astype(scores_BTS.dtype)[..., None]
    allowed_BTS = jnp.abs(distance_BTS) <= window
    masked_BTS = headless_mask(mask, *scores_BTS.shape)
    weights_BTS = softmax(scores_BTS, allowed_BTS if masked_BTS is None else allowed_BTS & masked_BTS)
    return weights_BTS * jnp.exp(-2 * (distance_BTS / window) ** 2) if gaussian else weights_BTS


def attentional_state(
    context_BTE: Float[Array, "B T E"], query_BTD: Float[Array, "B T D"], project: Callable[[Array], Array]
) -> Float[Array, "B T A"]:
    """h̃_t = tanh(W_c [c_t; h_t]) (Luong et al. 2015, equation 5), where `project` multiplies by W_c.

    Input feeding (section 3.3) is the decoder's part: it concatenates h̃_t to its input at t + 1, so that the next alignment
    depends on those before it.
    """
    return jnp.tanh(project(jnp.concatenate([context_BTE, query_BTD.astype(context_BTE.dtype)], axis=-1)))
