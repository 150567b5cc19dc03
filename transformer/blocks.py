"""A layer of a stack: attention and feed-forward around a residual stream.

B batch, T query position, S key position, D embed, N query heads.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from transformer.attention.mask import AttentionMask
from transformer.attention.multi_head import MultiHeadAttention
from transformer.decode.cache import KVCache
from transformer.layers.feed_forward import FeedForward
from transformer.layers.linear import dropout
from transformer.layers.norm import LayerNorm, RMSNorm
from transformer.layers.position import ScoreMod
from transformer.types import Array, Float, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """What a block gives beside the residual stream; a stack adds a leading layers axis."""

    cache: KVCache | None = None
    weights: Float[Array, "*L B N T S"] | None = None


class DecoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): the pre-norm block (Xiong et al. 2020)."""

    def __init__(
        self,
        attention: MultiHeadAttention,
        feed_forward: FeedForward,
        attention_norm: LayerNorm | RMSNorm,
        feed_forward_norm: LayerNorm | RMSNorm,
        *,
        dropout_rate: float = 0.0,
    ) -> None:
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = attention_norm
        self.feed_forward_norm = feed_forward_norm
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: AttentionMask | None = None,
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        score_mod: ScoreMod | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | tuple[int, ...] = False,
    ) -> tuple[Float[Array, "B T D"], BlockOutput]:
        """The residual stream after this block; `key` turns dropout on, `score_mod` and `return_weights` are as in `attend`."""
        weights_key, attention_key, mlp_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        attended, cache, weights = self.attention(
            self.attention_norm(x_BTD),
            mask,
            positions_BT=positions_BT,
            cache=cache,
            score_mod=score_mod,
            key=weights_key,
            return_weights=return_weights,
        )
        x_BTD = x_BTD + dropout(attended, self.dropout_rate, attention_key)
        x_BTD = x_BTD + dropout(self.feed_forward(self.feed_forward_norm(x_BTD)), self.dropout_rate, mlp_key)
        return x_BTD, BlockOutput(cache, weights)
