"""Intra-attention of the long short-term memory-network, LSTMN (Cheng et al. 2016): an LSTM that attends to its own past.

B batch, T position (of a query), S an earlier position, D input features, F features of hidden state and memory, A alignment
features.

Hidden states h and memories c of all positions stay on two tapes. At position t (equations 4 to 9):

    a_ts = vᵀ tanh(W_h h_s + W_x x_t + W_h̃ h̃_t-1),   α_t = softmax over s < t of a_ts
    [h̃_t, c̃_t] = Σ_s α_ts [h_s, c_s]
    [i, f, o, ĉ] = [σ, σ, σ, tanh](W [h̃_t, x_t] + b)
    c_t = f ⊙ c̃_t + i ⊙ ĉ,   h_t = o ⊙ tanh(c_t)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.additive import additive_scores
from transformer.attention.common import check_shapes, headless_mask, softmax
from transformer.attention.mask import AttentionMask
from transformer.layers.linear import Linear
from transformer.types import Array, DTypeLike, Float, widen


class LSTMNWeights(NamedTuple):
    """What `lstmn` multiplies by."""

    hidden_FA: Float[Array, "F A"]
    """W_h."""
    input_DA: Float[Array, "D A"]
    """W_x."""
    summary_FA: Float[Array, "F A"]
    """W_h̃."""
    vector_A: Float[Array, " A"]
    """v."""
    summary_gates_FG: Float[Array, "F G"]
    """The part of W that takes h̃; G = 4 F, the gates in the order i, f, o, ĉ."""
    input_gates_DG: Float[Array, "D G"]
    """The part of W that takes x."""
    bias_G: Float[Array, " G"]


def lstmn(
    x_BTD: Float[Array, "B T D"], weights: LSTMNWeights, mask: AttentionMask | None = None
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"], Float[Array, "B T T"]]:
    """Run the network over a sequence from empty tapes.

    Each position attends to those before it that the mask allows; where there are none, h̃ and c̃ are zeros. Arithmetic in
    float32 (float64 for a float64 x). Differentiating it takes memory for T tapes, B·T²·F numbers.

    Returns:
        The hidden tape and the memory tape in x's type, and the attention of each position to those before it.

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
    past_BTT = jnp.tril(jnp.ones((1, T, T), bool), -1)
    allowed_BTT = headless_mask(mask, x_BTD.shape[0], T, T)
    past_BTT = jnp.broadcast_to(past_BTT if allowed_BTT is None else past_BTT & allowed_BTT, (B, T, T))

    def step(carry: tuple[Array, ...], now: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        tape_BT2F, keys_BTA, summary_BF = carry
        t, query_BA, gates_BG, seen_BT = now
        query_BA = query_BA + summary_BF @ w.summary_FA
        scores_B1T = additive_scores(query_BA[:, None], keys_BTA, w.vector_A)
        weights_BT = softmax(scores_B1T[:, 0], seen_BT)
        summary_B2F = jnp.einsum("BT,BTCF->BCF", weights_BT, tape_BT2F)
        i, f, o, candidate = jnp.split(gates_BG + summary_B2F[:, 0] @ w.summary_gates_FG, 4, axis=-1)
        memory_BF = jax.nn.sigmoid(f) * summary_B2F[:, 1] + jax.nn.sigmoid(i) * jnp.tanh(candidate)
        hidden_BF = jax.nn.sigmoid(o) * jnp.tanh(memory_BF)
        tape_BT2F = tape_BT2F.at[:, t].set(jnp.stack([hidden_BF, memory_BF], axis=1))
        keys_BTA = keys_BTA.at[:, t].set(hidden_BF @ w.hidden_FA)
        return (tape_BT2F, keys_BTA, summary_B2F[:, 0]), weights_BT

    with jax.named_scope("lstmn"):
        queries_BTA = x_BTD @ w.input_DA
        gates_BTG = x_BTD @ w.input_gates_DG + w.bias_G[None, None]
        over_time = [jnp.moveaxis(x, 1, 0) for x in (queries_BTA, gates_BTG, past_BTT)]
        start = [jnp.zeros(shape, x_BTD.dtype) for shape in ((B, T, 2, F), (B, T, w.vector_A.shape[0]), (B, F))]
        (tape_BT2F, _, _), weights_TBT = jax.lax.scan(step, tuple(start), (jnp.arange(T), *over_time))
    hidden_BTF, memory_BTF = jnp.moveaxis(tape_BT2F, 2, 0).astype(dtype)
    return hidden_BTF, memory_BTF, jnp.moveaxis(weights_TBT, 0, 1)


class IntraAttention(nnx.Module):
    """`lstmn` with learned weights.

    Args:
        input_dim, hidden_dim, attention_dim: D, F and A.
        dtype: of the tapes; the recurrence itself runs in float32 or wider.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        attention_dim: int,
        *,
        kernel_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        options: dict[str, Any] = {"kernel_init": kernel_init, "param_dtype": param_dtype, "rngs": rngs}

        def project(size: int, *out_shape: int, axes: tuple[str, ...], use_bias: bool = False) -> Linear:
            return Linear((size,), out_shape, axes=axes, use_bias=use_bias, **options)

        self.hidden = project(hidden_dim, attention_dim, axes=("mlp", "head_dim"))
        self.input = project(input_dim, attention_dim, axes=("embed", "head_dim"))
        self.summary = project(hidden_dim, attention_dim, axes=("mlp", "head_dim"))
        self.vector = project(attention_dim, axes=("head_dim",))
        self.summary_gates = project(hidden_dim, 4 * hidden_dim, axes=("embed", "mlp"))
        self.input_gates = project(input_dim, 4 * hidden_dim, axes=("embed", "mlp"), use_bias=True)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], mask: AttentionMask | None = None
    ) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"], Float[Array, "B T T"]]:
        """Hidden tape, memory tape and weights."""
        assert self.input_gates.bias is not None
        weights = LSTMNWeights(
            hidden_FA=self.hidden.kernel[...],
            input_DA=self.input.kernel[...],
            summary_FA=self.summary.kernel[...],
            vector_A=self.vector.kernel[...],
            summary_gates_FG=self.summary_gates.kernel[...],
            input_gates_DG=self.input_gates.kernel[...],
            bias_G=self.input_gates.bias[...],
        )
        return lstmn(x_BTD.astype(self.dtype), weights, mask)
