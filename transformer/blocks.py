"""A layer of a stack: a sequence mixer, attention to a memory, and a feed-forward network, each with a residual connection.

B batch, T query position, S key position, D embed, N query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from transformer.layers.feed_forward import FeedForward
from transformer.layers.mixture_of_experts import MixtureOfExperts, RouterSums
from transformer.layers.norm import LayerNorm, RMSNorm
from transformer.mixers.context import NO_CONTEXT, Context
from transformer.mixers.heads import chosen_heads
from transformer.mixers.registry import Mixer, MixerConfig
from transformer.mixers.softmax import MultiHeadAttention
from transformer.mixers.state import State
from transformer.randomness import dropout, split
from transformer.types import Array, Float, Keys

Norm = LayerNorm | RMSNorm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """Outputs of a block in addition to the residual stream; a stack adds a leading layers axis."""

    state: State | None = None
    weights: Float[Array, "*L B N T S"] | None = None
    """Attention weights of the mixer, or of attention to the memory if there is one."""
    router: RouterSums | None = None


class Block(nnx.Module):
    """A sequence mixer, then attention to a memory if `cross` is given, then a feed-forward network.

    Pre-norm (Xiong et al. 2020): x + f(norm(x)) for each. Post-norm (Vaswani et al. 2017, section 3.1): norm(x + f(x)).
    With norms of the outputs (Ding et al. 2021, section 2.4): x + norm'(f(norm(x))).
    Parallel (Wang & Komatsuzaki 2021): x + f(norm(x)) + g(norm(x)), with f the mixer and g the feed-forward network.

    Args:
        norms: one for each sublayer, in their order.
        output_norms: the same for what each sublayer adds; with pre-norm.
        norm_first: pre-norm.
        parallel: the mixer and the feed-forward network run in parallel, each after its norm; not with `cross`.
    """

    def __init__(
        self,
        attention: Mixer,
        feed_forward: FeedForward | MixtureOfExperts,
        norms: tuple[Norm, ...],
        *,
        output_norms: tuple[Norm, ...] | None = None,
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
        self.attention_output_norm = None if output_norms is None else output_norms[0]
        self.cross_output_norm = None if output_norms is None or cross is None else output_norms[1]
        self.feed_forward_output_norm = None if output_norms is None else output_norms[-1]
        self.norm_first, self.parallel = norm_first, parallel
        self.dropout_rate = dropout_rate

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context = NO_CONTEXT, *, normed: bool = False
    ) -> tuple[Float[Array, "B T D"], BlockOutput]:
        """The residual stream after this block.

        Args:
            context: of this layer; its key enables dropout.
            normed: x is already normalised, and pre-norm attention skips its norm.
        """
        keys = (None,) * 5 if context.key is None else split(context.key, 5)
        context = dataclasses.replace(context, adapter_key=context.key)
        output: dict[str, object] = {}
        # A block with cross-attention returns the weights of that.
        own_weights = context.return_weights if self.cross is None else False

        def attended(x: Array) -> Array:
            own = dataclasses.replace(context.inside("attention"), key=keys[0], return_weights=own_weights)
            out, output["state"], output["weights"] = _weighed(self.attention, x, own)
            return context.at("attention.out", _normed(self.attention_output_norm, out))

        def remembered(x: Array) -> Array:
            assert self.cross is not None
            own = dataclasses.replace(context.inside("cross"), key=keys[2])
            out, _, output["weights"] = _weighed(self.cross, x, own)
            return context.at("cross.out", _normed(self.cross_output_norm, out))

        def fed(x: Array) -> Array:
            if isinstance(self.feed_forward, FeedForward):
                out = self.feed_forward(x, context.adapter_key)
            else:
                out, output["router"] = self.feed_forward(x, context.valid_BT)
            return context.at("mlp.out", _normed(self.feed_forward_output_norm, out))

        def attention_norm(x: Array) -> Array:
            return x if normed else self.attention_norm(x)

        if self.parallel:
            sides = (attended(attention_norm(x_BTD)), fed(self.feed_forward_norm(x_BTD)))
            dropped = (
                dropout(side, self.dropout_rate, key) for side, key in zip(sides, (keys[1], keys[4]), strict=True)
            )
            return context.at("out", sum(dropped, x_BTD)), BlockOutput(**output)  # type: ignore[arg-type]
        x_BTD = self._around(x_BTD, attended, attention_norm, keys[1])
        if self.cross_norm is not None:
            x_BTD = self._around(x_BTD, remembered, self.cross_norm, keys[3])
        x_BTD = self._around(x_BTD, fed, self.feed_forward_norm, keys[4])
        return context.at("out", x_BTD), BlockOutput(**output)  # type: ignore[arg-type]

    def as_layer(self, config: MixerConfig) -> Block:
        """The block with the mixer settings of one layer of a pattern; its parameters have the same shapes."""
        if self.attention.config == config:
            return self
        block = jax.tree.map(lambda leaf: leaf, self)
        block.attention.config = config
        return block

    def _around(
        self, x: Array, sublayer: Callable[[Array], Array], norm: Callable[[Array], Array], key: Keys | None
    ) -> Array:
        if self.norm_first:
            return x + dropout(sublayer(norm(x)), self.dropout_rate, key)
        return norm(x + dropout(sublayer(x), self.dropout_rate, key))


def _weighed(mixer: Mixer, x: Array, context: Context) -> tuple[Array, State | None, Array | None]:
    """A mixer's results; hooks may want weights that the call was not asked for."""
    if context.hooks is None or not context.hooks.wants("weights"):
        return mixer(x, context)
    out, state, weights = mixer(x, dataclasses.replace(context, return_weights=True))
    if weights is None:
        return out, state, None
    context.hooks("weights", weights)
    chosen = context.return_weights
    return out, state, weights[:, chosen_heads(chosen)] if chosen else None


def _normed(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)
