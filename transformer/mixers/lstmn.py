"""The long short-term memory-network as a sequence mixer: an LSTM whose memory is all of its past (Cheng et al. 2016).

B batch, T query position, S key position, D embed, F hidden_dim, A attention_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from transformer.alignment.intra import LSTMNWeights, Tape, lstmn
from transformer.errors import Config, require
from transformer.layers.linear import DEFAULT_INIT, Linear
from transformer.mixers.context import CAUSAL, Context
from transformer.mixers.heads import chosen_heads, refuse_masks, seen_keys
from transformer.mixers.state import TapeState, nan_on_overflow
from transformer.sharding import constrain
from transformer.types import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMNConfig(Config):
    """The long short-term memory-network: a recurrent cell that attends to its own earlier states (Cheng et al. 2016)."""

    causal_only: ClassVar[bool] = True
    has_distributions: ClassVar[bool] = True
    num_heads: ClassVar[int] = 1

    kind: Literal["lstmn"] = "lstmn"
    """A recurrent cell that attends to its own past; it runs one token after another, in training too."""
    hidden_dim: int | None = None
    """Width of the hidden state and the memory. null: embed_dim."""
    attention_dim: int | None = None
    """Width of the layer that scores the past. null: hidden_dim."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("hidden_dim", "attention_dim"):
            given = getattr(self, field)
            require(self, field, given is None or given >= 1, "allowed: 1 or more, or null")

    @property
    def head_dim(self) -> int | None:
        """Features of its one head."""
        return self.hidden_dim

    @property
    def structure(self) -> LSTMNConfig:
        """The settings that determine the parameters: layers in which these are equal can be stacked."""
        return self

    def check(self, embed_dim: int) -> tuple[str, str] | None:
        """The field that does not suit `embed_dim` and what is allowed, or None."""
        return None

    def sizes(self, embed_dim: int) -> tuple[int, int]:
        """F and A with their defaults filled in."""
        F = self.hidden_dim or embed_dim
        return F, self.attention_dim or F

    def flops(self, embed_dim: int, length: int, *, causal: bool) -> float:
        """FLOPs of one token in a context of `length`; a multiply-add counts as two."""
        D, (F, A) = embed_dim, self.sizes(embed_dim)
        layers = (D + 2 * F) * A + (D + F) * 4 * F + F * D
        return 2.0 * (layers + seen_keys(self, length, causal=True) * (A + 2 * F))


class LSTMN(nnx.Module):
    """`lstmn` with learned weights, and a projection back to the residual stream.

    Args:
        config: its sizes.
        kernel_init, out_init: initialisers of the input projections, and of the output projection to the residual stream.
        dtype: of the input and the output; the recurrence itself runs in float32 or wider.
    """

    def __init__(
        self,
        embed_dim: int,
        config: LSTMNConfig,
        *,
        kernel_init: Callable[..., Array] = DEFAULT_INIT,
        out_init: Callable[..., Array] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dtype = dtype
        D, (F, A) = embed_dim, config.sizes(embed_dim)
        self.hidden_dim = F
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def linear(size: int, *out_shape: int, axes: tuple[str, ...], use_bias: bool = False) -> Linear:
            # `lstmn` reads its weights as they are kept.
            types = options | {"dtype": param_dtype}
            return Linear((size,), out_shape, axes=axes, use_bias=use_bias, kernel_init=kernel_init, **types)

        self.hidden = linear(F, A, axes=("mlp", "head_dim"))
        self.input = linear(D, A, axes=("embed", "head_dim"))
        self.summary = linear(F, A, axes=("mlp", "head_dim"))
        self.vector = linear(A, axes=("head_dim",))
        self.summary_gates = linear(F, 4 * F, axes=("embed", "mlp"))
        self.input_gates = linear(D, 4 * F, axes=("embed", "mlp"), use_bias=True)
        init = kernel_init if out_init is None else out_init
        self.out = Linear((F,), (D,), axes=("mlp", "embed"), use_bias=False, kernel_init=init, **options)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context = CAUSAL
    ) -> tuple[Float[Array, "B T D"], TapeState | None, Float[Array, "B n T S"] | None]:
        """The output, the state after x (None without one), and the weights (None unless asked for). A document's first token
        has no past, and weights of zero.

        Raises:
            ValueError: a mask or a prefix, or a context that is not causal.
        """
        refuse_masks("lstmn attention", context, causal_only=True)
        state, mask = context.state, context.self_mask(x_BTD)
        assert state is None or isinstance(state, TapeState)
        options: dict[str, Any] = {}
        if state is not None:
            options = {
                "tape": Tape(state.hidden, state.memory, state.summary), "lengths_B": state.length,
                "valid_BT": context.valid_BT,
            }  # fmt: skip
            mask = context.cached_mask(mask, state)
        hidden_BTF, tape, weights_BTS = lstmn(x_BTD.astype(self.dtype), self._weights(), mask, **options)
        hidden_BTF = constrain(hidden_BTF, "batch", "seq", "mlp")
        if state is not None:
            state = state.advanced(tape, x_BTD.shape[1], context.valid_BT)
            hidden_BTF = nan_on_overflow(hidden_BTF, state)
        # The tape is one head.
        hidden_BTF = context.at("heads", hidden_BTF[:, :, None])[:, :, 0]
        out_BTD = constrain(self.out(hidden_BTF, context.adapter_key), "batch", "stream", None)
        heads = context.return_weights
        weights = weights_BTS[:, None][:, chosen_heads(heads)] if heads else None
        return out_BTD, state, weights

    def make_state(self, batch_size: int, max_length: int) -> TapeState:
        """An empty tape for `batch_size` rows of up to `max_length` tokens: 2 F numbers per token, in float32."""
        return TapeState.empty(batch_size, max_length, self.hidden_dim)

    def _weights(self) -> LSTMNWeights:
        assert self.input_gates.bias is not None
        return LSTMNWeights(
            hidden_FA=self.hidden.kernel[...],
            input_DA=self.input.kernel[...],
            summary_FA=self.summary.kernel[...],
            vector_A=self.vector.kernel[...],
            summary_gates_FG=self.summary_gates.kernel[...],
            input_gates_DG=self.input_gates.kernel[...],
            bias_G=self.input_gates.bias[...],
        )
