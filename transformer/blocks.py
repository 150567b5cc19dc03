"""A layer of a stack: attention, attention to a memory, and feed-forward, each around a residual stream.

B batch, T query position, S key position, M memory position, D embed, N query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.mask import AttentionMask
from transformer.attention.multi_head import MultiHeadAttention
from transformer.decode.cache import KVCache
from transformer.layers.adapter import dropping
from transformer.layers.feed_forward import FeedForward
from transformer.layers.linear import dropout
from transformer.layers.mixture_of_experts import MixtureOfExperts, RouterLosses
from transformer.layers.norm import LayerNorm, RMSNorm
from transformer.layers.position import ScoreMod
from transformer.types import Array, Bool, Float, Int, PRNGKeyArray

Norm = LayerNorm | RMSNorm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """What a block gives beside the residual stream; a stack adds a leading layers axis."""

    cache: KVCache | None = None
    weights: Float[Array, "*L B N T S"] | None = None
    """Of self-attention; of attention to the memory where there is one."""
    router: RouterLosses | None = None


class Block(nnx.Module):
    """Self-attention, then attention to a memory where `cross` is given, then feed-forward.

    Pre-norm (Xiong et al. 2020): x + f(norm(x)) for each. Post-norm (Vaswani et al. 2017, section 3.1): norm(x + f(x)).
    Parallel (Wang & Komatsuzaki 2021): x + f(norm(x)) + g(norm(x)), f attention and g feed-forward.

    Args:
        norms: one for each sublayer, in their order.
        norm_first: pre-norm.
        parallel: attention and feed-forward side by side, each behind its norm; without `cross`.
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        feed_forward: FeedForward | MixtureOfExperts,
        norms: tuple[Norm, ...],
        *,
        cross: MultiHeadAttention | None = None,
        norm_first: bool = True,
        parallel: bool = False,
        dropout_rate: float = 0.0,
    ) -> None:
        self.attention = attention
        self.cross = cross
        self.feed_forward = feed_forward
        self.attention_norm = norms[0]
        self.cross_norm = None if cross is None else norms[1]
        self.feed_forward_norm = norms[-1]
        self.norm_first, self.parallel = norm_first, parallel
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: AttentionMask | None = None,
        *,
        memory: Float[Array, "B M D"] | KVCache | None = None,
        memory_mask: AttentionMask | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        valid_BT: Bool[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        score_mod: ScoreMod | None = None,
        rotary_period: float | None = None,
        normed: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | tuple[int, ...] = False,
    ) -> tuple[Float[Array, "B T D"], BlockOutput]:
        """The residual stream after this block.

        Args:
            memory: what `cross` looks at, or its keys and values (`MultiHeadAttention.remember`).
            memory_mask: which of its positions each query may see.
            valid_BT: tokens that are no padding; padding takes no expert's room.
            score_mod: of self-attention, as in `attend`.
            rotary_period: of self-attention, in the place of its own.
            normed: x is normalised already, and attention's norm is left out where it comes first.
            key: turns dropout on.
            return_weights: as in `attend`.
        """
        keys = (None,) * 5 if key is None else jax.random.split(key, 5)
        output: dict[str, object] = {}

        def attended(x: Array) -> Array:
            out, output["cache"], output["weights"] = self.attention(
                x, mask, positions_BT=positions_BT, cache=cache, score_mod=score_mod, rotary_period=rotary_period,
                key=keys[0], return_weights=return_weights if self.cross is None else False,
            )  # fmt: skip
            return out

        def remembered(x: Array) -> Array:
            assert self.cross is not None
            out, _, output["weights"] = self.cross(
                x, memory_mask, memory=memory, key=keys[2], return_weights=return_weights
            )
            return out

        def fed(x: Array) -> Array:
            if isinstance(self.feed_forward, FeedForward):
                return self.feed_forward(x)
            out, output["router"] = self.feed_forward(x, valid_BT)
            return out

        def attention_norm(x: Array) -> Array:
            return self.attention_norm(x) if normed is None else jnp.where(normed, x, self.attention_norm(x))

        with dropping(key, first=len(keys)):
            if self.parallel:
                sides = (attended(attention_norm(x_BTD)), fed(self.feed_forward_norm(x_BTD)))
                dropped = (
                    dropout(side, self.dropout_rate, key) for side, key in zip(sides, (keys[1], keys[4]), strict=True)
                )
                return sum(dropped, x_BTD), BlockOutput(**output)  # type: ignore[arg-type]
            x_BTD = self._around(x_BTD, attended, attention_norm, keys[1])
            if self.cross_norm is not None:
                x_BTD = self._around(x_BTD, remembered, self.cross_norm, keys[3])
            x_BTD = self._around(x_BTD, fed, self.feed_forward_norm, keys[4])
        return x_BTD, BlockOutput(**output)  # type: ignore[arg-type]

    def _around(
        self, x: Array, sublayer: Callable[[Array], Array], norm: Callable[[Array], Array], key: PRNGKeyArray | None
    ) -> Array:
        if self.norm_first:
            return x + dropout(sublayer(norm(x)), self.dropout_rate, key)
        return norm(x + dropout(sublayer(x), self.dropout_rate, key))
