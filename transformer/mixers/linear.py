"""Linear attention as a sequence mixer: a kernel in place of the softmax, and a state of fixed size.

B batch, T query position, D embed, N query heads, K key/value heads, H head_dim, M features. Katharopoulos et al. 2020.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.linear.feature_maps import feature_dim, feature_map_of
from transformer.attention.linear.linear_attention import linear_attention
from transformer.errors import Config
from transformer.layers.linear import DEFAULT_INIT, Linear
from transformer.mixers.context import NO_CONTEXT, Context
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
from transformer.sharding import constrain
from transformer.types import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(Config):
    """Linear attention (Katharopoulos et al. 2020): φ(q)·φ(k) in place of exp(q·k), in time linear in the length."""

    causal_only: ClassVar[bool] = False

    kind: Literal["linear"] = "linear"
    """A weighted mean of values; the weights are products of positive features of queries and keys."""
    num_heads: int = 12
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads, which divides num_heads. null: num_heads."""
    head_dim: int | None = None
    """Features of a head. null: embed_dim / num_heads."""
    feature_map: FeatureMap = "elu"
    """The features φ of queries and keys."""
    chunk: int | None = 64
    """Number of tokens computed at once; 1: token by token; null: all of them. The result is the same."""
    bias: bool = True
    """Biases in the linear layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)
        check_chunk(self)

    @property
    def has_distributions(self) -> bool:
        """Whether weights are positive and sum to 1."""
        return self.feature_map != "identity"

    @property
    def structure(self) -> LinearAttentionConfig:
        """The settings that determine the parameters: layers in which these are equal can be stacked."""
        return dataclasses.replace(self, feature_map="elu", chunk=64)

    def check(self, embed_dim: int) -> tuple[str, str] | None:
        """The field that does not suit `embed_dim` and what is allowed, or None."""
        return check_width(self, embed_dim)

    def flops(self, embed_dim: int, length: int, *, causal: bool) -> float:
        """FLOPs of one token, projections included, in the recurrent form; a multiply-add counts as two."""
        N, K, H = head_sizes(self, embed_dim)
        M = feature_dim(feature_map_of(self.feature_map), H)
        return projection_flops(self, embed_dim) + 2 * (N + K) * M * (H + 1)


class LinearAttention(nnx.Module):
    """`linear_attention` of a sequence to itself, in N heads over K key/value heads.

    Args:
        config: its sizes and features.
        kernel_init, out_init: initialisers of the input projections, and of the output projection to the residual stream.
    """

    def __init__(
        self,
        embed_dim: int,
        config: LinearAttentionConfig,
        *,
        kernel_init: Callable[..., Array] = DEFAULT_INIT,
        out_init: Callable[..., Array] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = c = config
        N, K, H = self.sizes = head_sizes(c, embed_dim)
        options: dict[str, Any] = {"use_bias": c.bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def project(heads: int, axis: str) -> Linear:
            return Linear(
                (embed_dim,), (heads, H), axes=("embed", axis, "head_dim"), kernel_init=kernel_init, **options
            )

        self.query = project(N, "heads")
        self.key = project(K, "kv_heads")
        self.value = project(K, "kv_heads")
        axes = ("heads", "head_dim", "embed")
        init = kernel_init if out_init is None else out_init
        self.out = Linear((N, H), (embed_dim,), axes=axes, kernel_init=init, **options)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context = NO_CONTEXT
    ) -> tuple[Float[Array, "B T D"], MatrixState | None, Float[Array, "B n T S"] | None]:
        """The output, the state after x (None without one), and the weights (None unless asked for), which are normalised.

        Raises:
            ValueError: a mask or a prefix; or a state where attention is not causal.
        """
        c, key = self.config, context.adapter_key
        refuse_masks("linear attention", context)
        with jax.named_scope("linear_attention_mixer"):
            q = constrain(self.query(x_BTD, key), "batch", "seq", "heads", "head_dim")
            k = constrain(self.key(x_BTD, key), "batch", "seq", "kv_heads", "head_dim")
            v = constrain(self.value(x_BTD, key), "batch", "seq", "kv_heads", "head_dim")
            options: dict[str, Any] = {
                "causal": context.is_causal, "feature_map": c.feature_map, "chunk": c.chunk,
                "segments_BT": context.segments_BT,
            }  # fmt: skip
            state = context.state
            assert state is None or isinstance(state, MatrixState)
            weights = None
            if context.return_weights:
                weights = weights_of_reading(
                    lambda one_hot: linear_attention(q, k, one_hot, **options)[0], self.sizes[1], x_BTD,
                    context.return_weights,
                )  # fmt: skip
            before = None if state is None else state.matrix
            out_BTNH, matrix = linear_attention(q, k, v, state_BKMV=before, **options)
            if state is not None and matrix is not None:
                state = state.advanced(matrix, x_BTD.shape[1], context.valid_BT)
            return constrain(self.out(context.at("heads", out_BTNH), key), "batch", "stream", None), state, weights

    def make_state(self, batch_size: int, max_length: int) -> MatrixState:
        """The state before the first token, whatever `max_length` is."""
        _, K, H = self.sizes
        return MatrixState.empty(batch_size, K, feature_dim(feature_map_of(self.config.feature_map), H), H + 1)
