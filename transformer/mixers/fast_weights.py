"""Fast-weight attention as a sequence mixer: a matrix that each token writes to and reads from.

B batch, T query position, D embed, N query heads, K memories (key/value heads), H head_dim, M features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.linear.fast_weights import RULES, fast_weights
from transformer.attention.linear.feature_maps import FEATURE_NORMS, feature_dim, feature_map_of
from transformer.errors import Config
from transformer.layers.linear import DEFAULT_INIT, Linear
from transformer.layers.norm import RMSNorm
from transformer.mixers.context import CAUSAL, Context
from transformer.mixers.heads import (
    FeatureMap,
    check_chunk,
    check_heads,
    check_width,
    head_sizes,
    projection_flops,
    refuse_masks,
    weights_of_reading,
)
from transformer.mixers.state import MatrixState
from transformer.sharding import constrain, with_axes
from transformer.types import Array, DTypeLike, Float, widen


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastWeightConfig(Config):
    """Fast weights (Schmidhuber 1992; Schlag et al. 2021; Yang et al. 2024): attention with a state of fixed size."""

    causal_only: ClassVar[bool] = True
    has_distributions: ClassVar[bool] = False

    kind: Literal["sum", "gated_sum", "delta", "gated_delta"] = "delta"
    """How a token changes the matrix. sum: it adds; gated: the past also fades; delta: it first erases what its key recalls."""
    num_heads: int = 12
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of memories, which divides num_heads. null: num_heads."""
    head_dim: int | None = None
    """Features of a head. null: embed_dim / num_heads."""
    feature_map: FeatureMap = "dpfp"
    """The features φ of queries and keys."""
    feature_norm: Literal["none", "sum", "l2"] = "l2"
    """How the features are normalised."""
    output_norm: bool = True
    """RMS-normalise what each head reads; otherwise its size would grow with the position."""
    chunk: int | None = 64
    """Number of tokens computed at once; 1: token by token; null: all of them. The result is the same."""
    bias: bool = False
    """Biases in the linear layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)
        check_chunk(self)

    @property
    def structure(self) -> FastWeightConfig:
        """The settings that determine the parameters: layers in which these are equal can be stacked."""
        return dataclasses.replace(self, feature_map="dpfp", feature_norm="l2", chunk=64)

    def check(self, embed_dim: int) -> tuple[str, str] | None:
        """The field that does not suit `embed_dim` and what is allowed, or None."""
        return check_width(self, embed_dim)

    def features(self, x: Float[Array, "*dims H"]) -> Float[Array, "*dims M"]:
        """φ, normalised."""
        return FEATURE_NORMS[self.feature_norm](feature_map_of(self.feature_map)(x))

    def flops(self, embed_dim: int, length: int, *, causal: bool) -> float:
        """FLOPs of one token, projections included, in the recurrent form; a multiply-add counts as two."""
        N, K, H = head_sizes(self, embed_dim)
        M = feature_dim(self.features, H)
        writes = 2 if RULES[self.kind].erases else 1
        gates = int(RULES[self.kind].erases) + int(RULES[self.kind].decays)
        return projection_flops(self, embed_dim) + 2 * embed_dim * K * gates + 2 * (N + writes * K) * M * H


class FastWeightAttention(nnx.Module):
    """Causal self-attention by fast weights, in N heads over K memories.

    Args:
        config: its rule, sizes and features.
        kernel_init, out_init: initialisers of the input projections, and of the output projection to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        config: FastWeightConfig,
        *,
        kernel_init: Callable[..., Array] = DEFAULT_INIT,
        out_init: Callable[..., Array] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = c = config
        N, K, H = self.sizes = head_sizes(c, embed_dim)
        rule = RULES[c.kind]
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def project(out_shape: tuple[int, ...], *axes: str, use_bias: bool = c.bias) -> Linear:
            axes = ("embed", *axes)
            return Linear((embed_dim,), out_shape, axes=axes, use_bias=use_bias, kernel_init=kernel_init, **types)

        self.query = project((N, H), "heads", "head_dim")
        self.key = project((K, H), "kv_heads", "head_dim")
        self.value = project((K, H), "kv_heads", "head_dim")
        self.beta = project((K,), "kv_heads", use_bias=True) if rule.erases else None
        self.gate = project((K,), "kv_heads", use_bias=True) if rule.decays else None
        half_life = with_axes(_spread_half_lives, "kv_heads")
        self.log_half_life = nnx.Param(half_life(rngs.params(), (K,), param_dtype)) if rule.decays else None
        self.norm = RMSNorm(H, axis="head_dim", param_dtype=param_dtype, rngs=rngs) if c.output_norm else None
        axes = ("heads", "head_dim", "embed")
        init = kernel_init if out_init is None else out_init
        self.out = Linear((N, H), (embed_dim,), axes=axes, use_bias=c.bias, kernel_init=init, **types)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context = CAUSAL
    ) -> tuple[Float[Array, "B T D"], MatrixState | None, Float[Array, "B n T S"] | None]:
        """The output, the state after x (None without one), and the weights (None unless asked for): how much of each value a
        query reads, before the output's norm. With the delta rules they may be negative.

        Raises:
            ValueError: a mask or a prefix, or a context that is not causal.
        """
        c, key, state = self.config, context.adapter_key, context.state
        refuse_masks(f"{c.kind} attention", context, causal_only=True)
        assert state is None or isinstance(state, MatrixState)
        with jax.named_scope("fast_weight_attention"):
            q = constrain(self.query(x_BTD, key), "batch", "seq", "heads", "head_dim")
            k = constrain(self.key(x_BTD, key), "batch", "seq", "kv_heads", "head_dim")
            v = constrain(self.value(x_BTD, key), "batch", "seq", "kv_heads", "head_dim")
            strengths = self._strengths(x_BTD, key)
            options: dict[str, Any] = {
                "rule": c.kind, "feature_map": c.features, "chunk": c.chunk,
                "segments_BT": context.segments_BT,
            }  # fmt: skip
            weights = None
            if context.return_weights:
                weights = weights_of_reading(
                    lambda one_hot: fast_weights(q, k, one_hot, *strengths, **options)[0], self.sizes[1], x_BTD,
                    context.return_weights,
                )  # fmt: skip
            before = None if state is None else state.matrix
            out_BTNH, matrix = fast_weights(q, k, v, *strengths, state_BKMV=before, **options)
            if state is not None:
                state = state.advanced(matrix, x_BTD.shape[1], context.valid_BT)
            out_BTNH = out_BTNH if self.norm is None else self.norm(out_BTNH)
            return constrain(self.out(context.at("heads", out_BTNH), key), "batch", "stream", None), state, weights

    def make_state(self, batch_size: int, max_length: int) -> MatrixState:
        """The state before the first token, whatever `max_length` is."""
        _, K, H = self.sizes
        return MatrixState.empty(batch_size, K, feature_dim(self.config.features, H), H)

    def _strengths(self, x: Array, key: Any) -> tuple[Array | None, Array | None]:
        """β in (0, 1), and log α < 0: with a gate of 0, α halves a memory's past within its half-life."""
        beta = None if self.beta is None else jax.nn.sigmoid(widen(self.beta(x, key)))
        if self.gate is None or self.log_half_life is None:
            return beta, None
        return beta, -jax.nn.softplus(widen(self.gate(x, key))) * jnp.exp(-widen(self.log_half_life[...]))


def _spread_half_lives(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Logarithms of half-lives from 4 to 512 tokens."""
    return jnp.linspace(math.log(4), math.log(512), shape[0], dtype=dtype)
