"""Additive attention (Bahdanau et al. 2014), the first attention mechanism.

B batch, T query position, S key position, V value features, A alignment features.

    e_ts = vᵀ tanh(W q_t + U k_s)                     Bahdanau et al. 2014, appendix A.1.2
    α_ts = exp(e_ts) / Σ_s' exp(e_ts')                equation 6
    c_t  = Σ_s α_ts h_s                               equation 5
"""

from __future__ import annotations

import jax.numpy as jnp

from transformer.attention.common import Normalizer, check_shapes, context, headless_mask, softmax
from transformer.attention.spec.mask import AttentionMask
from transformer.precision import matmul
from transformer.types import Array, Float, widen


def additive_scores(
    q_BTA: Float[Array, "B T A"], k_BSA: Float[Array, "B S A"], vector_A: Float[Array, " A"]
) -> Float[Array, "B T S"]:
    """e_ts = vᵀ tanh(q_t + k_s) for projected queries and keys, in float32 or wider.

    Needs memory for B·T·S·A numbers, so a recurrent decoder computes one query at a time.
    """
    check_shapes("additive_scores", q=(q_BTA, "B T A"), k=(k_BSA, "B S A"), vector=(vector_A, "A"))
    hidden_BTSA = jnp.tanh(widen(q_BTA)[:, :, None] + widen(k_BSA)[:, None])
    return matmul(hidden_BTSA, widen(vector_A))


def additive_attention(
    q_BTA: Float[Array, "B T A"],
    k_BSA: Float[Array, "B S A"],
    values_BSV: Float[Array, "B S V"],
    vector_A: Float[Array, " A"],
    mask: AttentionMask | None = None,
    *,
    normalize: Normalizer | None = None,
) -> tuple[Float[Array, "B T V"], Float[Array, "B T S"]]:
    """Context and weights (Bahdanau et al. 2014, equations 5 and 6) for projected queries W q and keys U k.

    Args:
        normalize: turns scores into weights; softmax by default.

    Returns:
        The context in the values' type, and the weights in float32 or wider. A query that sees no key gives zeros.

    Raises:
        ValueError: shapes that do not fit, arrays that are not floating-point, or a mask with heads.
    """
    shapes = {"q": (q_BTA, "B T A"), "k": (k_BSA, "B S A"), "values": (values_BSV, "B S V"), "vector": (vector_A, "A")}
    check_shapes("additive_attention", **shapes)
    allowed_BTS = headless_mask(mask, q_BTA.shape[0], q_BTA.shape[1], k_BSA.shape[1])
    weights_BTS = (normalize or softmax)(additive_scores(q_BTA, k_BSA, vector_A), allowed_BTS)
    return context(weights_BTS, values_BSV), weights_BTS
