"""The blocks of a model from its config: one builder for encoders, decoders and encoder-decoders.

B batch, T query position, M memory position, D embed, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from transformer.attention.mask import AttentionMask
from transformer.attention.multi_head import MultiHeadAttention
from transformer.blocks import Block, BlockOutput, Norm
from transformer.decode.cache import KVCache
from transformer.layers.feed_forward import FeedForward
from transformer.layers.mixture_of_experts import MixtureOfExperts, RouterLosses
from transformer.layers.norm import LayerNorm, RMSNorm
from transformer.layers.position import Alibi, RelativePosition
from transformer.models.config import StackConfig
from transformer.stack import apply_stack, stack, unstack
from transformer.types import DTYPES, Array, Bool, Float, Int, PRNGKeyArray

Chosen = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers, and query heads of each of them: whose attention weights are wanted."""


class LayerStack(nnx.Module):
    """`num_layers` equal blocks, the bias by distance that they share, and the norm behind the last one.

    Args:
        num_layers: of this stack; `config.num_layers` by default.
        causal: whether a bias by distance looks back alone.
        cross: give each block attention to a memory as wide as the residual stream.
        attention_scale: of attention's logits; None for 1 / sqrt(head_dim).
        first_norm: false leaves attention's norm out of the first block, which gets what is normalised already.
        final_norm: a norm behind the last block; by default where the norm comes first, and nothing else would.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        num_layers: int | None = None,
        causal: bool,
        cross: bool = False,
        attention_scale: float | None = None,
        kernel_init: Any = None,
        first_norm: bool = True,
        final_norm: bool | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        c = config
        self.config = c
        self.num_layers = c.num_layers if num_layers is None else num_layers
        self.first_norm = first_norm
        init = nnx.initializers.normal(c.init_std) if kernel_init is None else kernel_init
        self.relative: Alibi | RelativePosition | None = None
        if c.position == "alibi":
            self.relative = Alibi(c.num_heads)
        elif c.position == "relative":
            relative = RelativePosition(
                c.num_heads, num_buckets=c.relative_buckets, max_distance=c.relative_distance, bidirectional=not causal,
                init=init, rngs=rngs,
            )  # fmt: skip
            self.relative = nnx.data(relative)
        make = functools.partial(
            _make_block, c, num_layers=self.num_layers, cross=cross, attention_scale=attention_scale, init=init
        )
        self.blocks: Block | nnx.List = stack(make, self.num_layers, rngs)
        final_norm = c.norm_first if final_norm is None else final_norm
        self.final_norm: Norm | None = nnx.data(make_norm(c, rngs)) if final_norm else None

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: AttentionMask | Sequence[AttentionMask],
        *,
        memory: Float[Array, "B M D"] | list[KVCache] | None = None,
        memory_mask: AttentionMask | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        valid_BT: Bool[Array, "B T"] | None = None,
        rotary_periods: Sequence[float | None] = (None,),
        cache: KVCache | list[KVCache] | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | Chosen = False,
    ) -> tuple[Float[Array, "B T D"], BlockOutput | list[BlockOutput]]:
        """The last block's output behind the final norm, and what the blocks gave beside it.

        Args:
            mask: of self-attention; a list is gone through again and again, layer by layer.
            rotary_periods: beside each mask of a list, in the place of the config's period.
            memory: what the blocks look at, or each layer's keys and values of it (`remember`), for single blocks.
            cache: with a leading L, or a list for single blocks.
            return_weights: of all layers and heads, or of those chosen; for a choice the layers are run one by one.

        Raises:
            ValueError: a layer that does not exist.
        """
        c = self.config
        if isinstance(return_weights, tuple) and not all(0 <= layer < self.num_layers for layer in return_weights[0]):
            raise ValueError(f"return_weights: got layers {return_weights[0]}; allowed: 0 to {self.num_layers - 1}")
        start = 0 if cache is None else filled(cache)
        masks = [mask] if isinstance(mask, AttentionMask) else list(mask)
        periods = [rotary_periods[which % len(rotary_periods)] for which in range(len(masks))]
        shared = None if isinstance(memory, list) else memory
        rows = (masks, shared, memory_mask, positions_BT, valid_BT, self.relative)

        def call(
            which: int,
            weights: bool | tuple[int, ...],
            block: Block,
            x: Array,
            key: Array | None,
            inputs: Any,
            rows: Any,
        ) -> Any:
            cache, remembered, normed = inputs
            masks, shared, memory_mask, positions_BT, valid_BT, relative = rows
            return block(
                x, masks[which], memory=shared if remembered is None else remembered, memory_mask=memory_mask,
                positions_BT=positions_BT, valid_BT=valid_BT, cache=cache,
                score_mod=None if relative is None else relative.score_mod(start), rotary_period=periods[which],
                normed=normed, key=key, return_weights=weights,
            )  # fmt: skip

        calls: Any
        if isinstance(return_weights, tuple):
            layers, heads = return_weights
            calls = [
                functools.partial(call, layer % len(masks), heads if layer in layers else False)
                for layer in range(self.num_layers)
            ]
        else:
            calls = [functools.partial(call, which, return_weights) for which in range(len(masks))]
            calls = calls if len(calls) > 1 else calls[0]
        normed = None if self.first_norm else jnp.arange(self.num_layers) == 0
        per_layer: Any = (cache, None, normed)
        if isinstance(self.blocks, nnx.List):
            none = [None] * self.num_layers
            given = (part if isinstance(part, list) else none for part in (cache, memory))
            per_layer = list(zip(*given, none if normed is None else list(normed), strict=True))
        x_BTD, outputs = apply_stack(
            calls, self.blocks, x_BTD, num_layers=self.num_layers, key=key, per_layer=per_layer, rows=rows,
            pipelined=cache is None and memory is None and return_weights is False, scan=c.scan_layers, remat=c.remat,
        )  # fmt: skip
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD), outputs

    def take_apart(self) -> None:
        """Make the blocks a list of single ones, for decoding, which reads each weight once a token.

        A scan, and a loop over slices too, copies every layer out of the stack before it reads it. Here each layer stands
        by itself, its three projections of self-attention as one. The cache of such a stack is a list of layers' caches.
        """
        blocks = unstack(self.blocks, self.num_layers)
        for block in blocks:
            block.attention = block.attention.joined()
        self.blocks = nnx.List(blocks)

    def remember(self, memory_BMD: Float[Array, "B M D"]) -> list[KVCache]:
        """Each layer's keys and values of a memory, for single blocks (`take_apart`)."""
        assert isinstance(self.blocks, nnx.List)
        return [block.cross.remember(memory_BMD) for block in self.blocks]

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens."""
        c = self.config
        return KVCache.empty(self.num_layers, batch_size, max_length, c.kv_heads, c.dim_of_head, DTYPES[c.dtype])


def make_norm(config: StackConfig, rngs: nnx.Rngs, *, dim: int | None = None) -> Norm:
    """The config's kind of norm, over the residual stream or another `dim`."""
    width = config.embed_dim if dim is None else dim
    if config.norm == "layer_norm":
        return LayerNorm(width, use_bias=config.has_bias("norm"), epsilon=config.norm_epsilon, rngs=rngs)
    return RMSNorm(width, epsilon=config.norm_epsilon, rngs=rngs)


def filled(cache: KVCache | list[KVCache]) -> Int[Array, " B"]:
    """How many positions each row holds, which is the same in every layer."""
    return cache[0].length if isinstance(cache, list) else cache.length[0]


def weights_of(
    outputs: BlockOutput | list[BlockOutput], chosen: bool | Chosen = True
) -> Float[Array, "L B N T S"] | None:
    """The attention weights among what blocks gave, of the layers that were chosen, in their order; None without any."""
    if not isinstance(outputs, list):
        return outputs.weights
    layers = chosen[0] if isinstance(chosen, tuple) else range(len(outputs))
    weights = [weights for layer in layers if (weights := outputs[layer].weights) is not None]
    return jnp.stack(weights) if weights else None


def router_loss(config: StackConfig, outputs: BlockOutput | list[BlockOutput]) -> Float[Array, ""] | None:
    """The routers' losses by the config's weights, summed over the layers; None without a mixture of experts."""
    routers = [output.router for output in outputs] if isinstance(outputs, list) else [outputs.router]
    found: list[RouterLosses] = [router for router in routers if router is not None]
    if not found:
        return None
    return sum(jnp.sum(config.balance_loss * r.balance + config.router_z_loss * r.z) for r in found)  # type: ignore[return-value]


def _make_block(
    c: StackConfig, rngs: nnx.Rngs, *, num_layers: int, cross: bool, attention_scale: float | None, init: Any
) -> Block:
    # What is written to the residual stream is summed over the layers (Radford et al. 2019).
    out_init = nnx.initializers.normal(c.init_std / (2 * num_layers) ** 0.5) if c.norm_first else init
    types: dict[str, Any] = {"dtype": DTYPES[c.dtype], "rngs": rngs, "kernel_init": init, "out_init": out_init}

    def attention(memory_dim: int | None) -> MultiHeadAttention:
        rotates = c.position == "rotary" and memory_dim is None
        return MultiHeadAttention(
            c.embed_dim, c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, memory_dim=memory_dim,
            use_bias=c.has_bias("qkv"), out_bias=c.has_bias("attention"),
            rotary_period=c.rotary_period if rotates else None, rotary_dim=c.dim_of_rotary,
            rotary_scaling=c.rotary_scaling, qk_norm=c.qk_norm, norm_epsilon=c.norm_epsilon, scale=attention_scale,
            logit_soft_cap=c.attention_soft_cap, dropout_rate=c.dropout,
            backend=c.attention, **types,
        )  # fmt: skip

    feed_forward: FeedForward | MixtureOfExperts
    if c.num_experts:
        feed_forward = MixtureOfExperts(
            c.embed_dim, c.dim_of_mlp, num_experts=c.num_experts, experts_per_token=c.experts_per_token,
            capacity=c.expert_capacity, activation=c.activation, **types,
        )  # fmt: skip
    else:
        feed_forward = FeedForward(
            c.embed_dim, c.dim_of_mlp, activation=c.activation, use_bias=c.has_bias("mlp"), **types
        )
    return Block(
        attention(None), feed_forward, tuple(make_norm(c, rngs) for _ in range(3 if cross else 2)),
        cross=attention(c.embed_dim) if cross else None, norm_first=c.norm_first,
        parallel=c.parallel_residual, dropout_rate=c.dropout,
    )  # fmt: skip
