"""Multiplicative attention (Luong et al. 2015): three scores, over all keys or over a window of them.

B batch, T query position, S key position, D query features (the decoder's state h), E key features (the encoder's states h̄),
A alignment features.

    score(h_t, h̄_s) = h_tᵀ h̄_s  (dot),  h_tᵀ W_a h̄_s  (general),  v_aᵀ tanh(W_a [h_t; h̄_s])  (concat)
    α_ts = softmax over s of the score                                            Luong et al. 2015, equation 7
    c_t  = Σ_s α_ts h̄_s
    h̃_t  = tanh(W_c [c_t; h_t])                                                   equation 5

Local attention sees the keys from p_t - D to p_t + D alone. `local-m` sets p_t = t; `local-p` predicts it (equation 9), and
lets the weights fade with the distance from it (equation 10).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.additive import additive_scores
from transformer.attention.common import check_name, check_shapes, context, headless_mask, softmax
from transformer.attention.mask import AttentionMask
from transformer.layers.linear import Linear
from transformer.precision import einsum, matmul
from transformer.types import Array, DTypeLike, Float, Int, wide, widen

SCORES = ("dot", "general", "concat")
SCOPES = ("global", "local-m", "local-p")


def dot_scores(q_BTE: Float[Array, "B T E"], k_BSE: Float[Array, "B S E"]) -> Float[Array, "B T S"]:
    """q_tᵀ k_s in float32 or wider. `general` is the same for the query W_aᵀ h_t."""
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
            not normalised again: each row then sums to less than 1.

    Raises:
        ValueError: a window below 1, shapes that do not fit, or a mask with heads.
    """
    check_shapes("local_weights", scores=(scores_BTS, "B T S"), positions=(positions_BT, "B T", jnp.number))
    _check_window("local_weights", window)
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
    """h̃_t = tanh(W_c [c_t; h_t]) (Luong et al. 2015, equation 5), where `project` multiplies by W_c."""
    return jnp.tanh(project(jnp.concatenate([context_BTE, query_BTD.astype(context_BTE.dtype)], axis=-1)))


class LuongAttention(nnx.Module):
    """From a decoder's state and an encoder's states to the attentional state h̃_t, from which the next word is predicted.

    Input feeding (Luong et al. 2015, section 3.3) is the decoder's part: it concatenates h̃_t to its input at t + 1,

        state, weights = attention(hidden, encoded, mask)
        next_input = jnp.concatenate([embed(token), state[:, -1]], axis=-1)

    so that the next alignment knows of those before it. At the first step the state is zeros [B, query_dim].

    Args:
        query_dim, key_dim: D and E; `dot` needs them equal.
        score: one of `SCORES`.
        scope: one of `SCOPES`: all keys, a window about position t, or one about a predicted position.
        window: D of local attention; 10 in the paper.
        attention_dim: A of `concat` and of the predicted position; query_dim by default.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        *,
        score: str = "general",
        scope: str = "global",
        window: int = 10,
        attention_dim: int | None = None,
        kernel_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_name("LuongAttention", "score", score, SCORES)
        check_name("LuongAttention", "scope", scope, SCOPES)
        _check_window("LuongAttention", window)
        if score == "dot" and query_dim != key_dim:
            raise ValueError(
                f"LuongAttention: query_dim={query_dim} and key_dim={key_dim}; score='dot' needs them equal"
            )
        self.score, self.scope, self.window = score, scope, window
        attention_dim = query_dim if attention_dim is None else attention_dim

        def project(size: int, *out_shape: int, axes: tuple[str, ...], dtype: DTypeLike = dtype) -> Linear:
            return Linear(
                (size,), out_shape, axes=axes, use_bias=False, kernel_init=kernel_init, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        into = ("embed", "mlp")
        concat, predicts = score == "concat", scope == "local-p"
        self.general = project(query_dim, key_dim, axes=into) if score == "general" else None
        # W_a [h; h̄] as a sum of two products, so that no pair is concatenated.
        self.query = project(query_dim, attention_dim, axes=into) if concat else None
        self.key = project(key_dim, attention_dim, axes=into) if concat else None
        self.vector = project(attention_dim, axes=("mlp",)) if concat else None
        exact = wide(dtype)
        self.position = project(query_dim, attention_dim, axes=into, dtype=exact) if predicts else None
        self.position_vector = project(attention_dim, axes=("mlp",)) if predicts else None
        self.combine = project(key_dim + query_dim, query_dim, axes=("mlp", "embed"))

    def __call__(
        self,
        query_BTD: Float[Array, "B T D"],
        keys_BSE: Float[Array, "B S E"],
        mask: AttentionMask | None = None,
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        lengths_B: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T S"]]:
        """The attentional state h̃_t and the weights.

        Args:
            positions_BT: where each query stands, for `local-m`; 0 to T-1 by default. A decoder that steps gives them.
            lengths_B: how many keys each row has, for `local-p`; all S of them by default.
        """
        shapes: dict[str, Any] = {
            "query": (query_BTD, "B T D"),
            "keys": (keys_BSE, "B S E"),
            "positions": (positions_BT, "B T", jnp.integer),
            "lengths": (lengths_B, "B", jnp.integer),
        }
        check_shapes("LuongAttention", **shapes)
        (T, S), scores_BTS = (query_BTD.shape[1], keys_BSE.shape[1]), self.scores(query_BTD, keys_BSE)
        with jax.named_scope("luong_attention"):
            if self.scope == "global":
                weights_BTS = softmax(scores_BTS, headless_mask(mask, *scores_BTS.shape))
            elif self.position is None or self.position_vector is None:
                if positions_BT is None:
                    positions_BT = jnp.broadcast_to(jnp.arange(T), query_BTD.shape[:2])
                weights_BTS = local_weights(scores_BTS, positions_BT, self.window, mask)
            else:
                lengths = S if lengths_B is None else lengths_B
                # Among hundreds of keys a position in a narrow type would be off by a good part of the window.
                hidden_BTA = self.position(widen(query_BTD))
                centres_BT = predicted_positions(hidden_BTA, self.position_vector.kernel[...], lengths)
                weights_BTS = local_weights(scores_BTS, centres_BT, self.window, mask, gaussian=True)
            return attentional_state(context(weights_BTS, keys_BSE), query_BTD, self.combine), weights_BTS

    def scores(self, query_BTD: Float[Array, "B T D"], keys_BSE: Float[Array, "B S E"]) -> Float[Array, "B T S"]:
        """score(h_t, h̄_s) alone."""
        if self.query is not None and self.key is not None and self.vector is not None:
            return additive_scores(self.query(query_BTD), self.key(keys_BSE), self.vector.kernel[...])
        return dot_scores(query_BTD if self.general is None else self.general(query_BTD), keys_BSE)


def _check_window(caller: str, window: int) -> None:
    if window < 1:
        raise ValueError(f"{caller}: window={window}; expected 1 or more positions to each side")
