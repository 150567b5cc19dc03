"""The blocks of a model from its config: one builder for encoders, decoders and encoder-decoders.

B batch, T query position, M memory position, D embed, L layers, P mixers of a pattern.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.blocks import Block, BlockOutput, Norm
from transformer.hooks import Hooks
from transformer.layers.feed_forward import FeedForward
from transformer.layers.mixture_of_experts import ExpertsConfig, MixtureOfExperts, RouterSums
from transformer.layers.norm import LayerNorm, RMSNorm
from transformer.layers.position import RelativePosition
from transformer.layers.relative_embedding import RelativeEmbedding
from transformer.mixers.context import Context
from transformer.mixers.registry import MixerConfig, make_mixer
from transformer.mixers.softmax import MultiHeadAttention
from transformer.mixers.state import KVCache, State
from transformer.models.config import StackConfig
from transformer.models.embed import check_segments
from transformer.pipeline import Schedule
from transformer.randomness import row_keys, split
from transformer.stack import apply_stack, restack, stack, unstack
from transformer.types import DTYPES, Array, Float, Int, Keys

M = TypeVar("M", bound=nnx.Module)
Chosen = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers, and query heads in each of them, whose attention weights are requested."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackOutput:
    """Outputs of a stack in addition to the residual stream."""

    states: list[State] | None
    """One per layer, if the call had some."""
    weights: Float[Array, "L B N T S"] | None
    """Weights of all layers that have them, or of the layers selected, in their order."""
    routers: tuple[RouterSums, ...]
    """Of all layers, in their order, with a leading L: one, or none without a mixture of experts."""


class LayerStack(nnx.Module):
    """`num_layers` blocks, the bias or the embeddings by distance that they share, and the norm after the last one.

    Blocks whose parameters have the same shapes are one stack [L, ...], in which each layer has its own settings. Otherwise
    a group of P blocks repeats, each of which is a stack [L / P, ...].

    Args:
        num_layers: of this stack; `config.num_layers` by default.
        causal: whether a token sees only the tokens before it and itself.
        cross: give each block attention to a memory as wide as the residual stream.
        first_norm: false omits attention's norm from the first block, whose input is already normalised.
        distinct: number of blocks with parameters of their own, each of which is applied several times in a row; by default all.
        final_norm: a norm after the last block; by default with pre-norm, where nothing else would normalise the output.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        num_layers: int | None = None,
        causal: bool,
        cross: bool = False,
        first_norm: bool = True,
        final_norm: bool | None = None,
        distinct: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        c = config
        self.config = c
        self.num_layers = self.depth = L = c.num_layers if num_layers is None else num_layers
        self.is_causal, self.first_norm = causal, first_norm
        self.schedule: Schedule | None = Schedule()
        self.hooks: Hooks | None = None
        # For a part of a longer stack, the index of its first layer.
        self.first_layer: Any = 0
        self.mixers = c.mixers(L)
        self.relative = nnx.data(_make_relative(c, causal=causal, init=c.initialisers(L)[0], rngs=rngs))
        # How many blocks form a group whose parameters repeat, and how many layers form one whose settings repeat.
        self.group, self.period = layers_of_group(c), _period(self.mixers)
        makers = [
            functools.partial(_make_block, c, mixer, num_layers=L, cross=cross) for mixer in self.mixers[: self.group]
        ]
        self.distinct = L if distinct is None else distinct
        stacks = [stack(make, self.distinct // self.group, rngs) for make in makers]
        self.blocks: Any = stacks[0] if self.group == 1 else nnx.List(stacks)
        self.is_unstacked = False
        final_norm = c.norm_first if final_norm is None else final_norm
        self.final_norm: Norm | None = nnx.data(make_norm(c, rngs)) if final_norm else None

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: Context,
        *,
        memory: list[KVCache] | None = None,
        states: list[State] | None = None,
        key: Keys | None = None,
        return_weights: bool | Chosen = False,
    ) -> tuple[Float[Array, "B T D"], StackOutput]:
        """The last block's output after the final norm, and the other outputs of the blocks.

        Args:
            context: what all layers get; the stack adds causality, the shared bias, and each layer's own part.
            memory: each layer's keys and values of what cross-attention reads (`remember`), for an unstacked stack.
            states: the states of the layers after the tokens before these, one per layer.
            key: enables dropout.
            return_weights: of all layers and heads, or of those selected; with a selection the layers are run one by one.

        Raises:
            ValueError: a layer that does not exist or has no weights; or segments that make all tokens padding.
        """
        check_segments(context.segments_BT)
        c, L = self.config, self.num_layers
        chosen = return_weights if isinstance(return_weights, tuple) else None
        if chosen is not None and not all(0 <= layer < L for layer in chosen[0]):
            raise ValueError(f"return_weights: got layers {chosen[0]}; allowed: 0 to {L - 1}")
        context = dataclasses.replace(context, is_causal=self.is_causal, relative=self.relative, hooks=self.hooks)
        x_BTD = self._entered(x_BTD, context)
        keys = None if key is None else self._layer_keys(row_keys(key, x_BTD.shape[0]))
        # One by one if each layer has weights or hooks of its own; otherwise in groups.
        single = chosen is not None or self.is_unstacked or self.hooks is not None
        wanted = [_heads_wanted(return_weights, layer) for layer in range(L)]
        blocks: Any
        inputs: Any
        numbers = self.first_layer + jnp.arange(L)
        if single:
            blocks = self.single_blocks()
            none = [None] * L
            inputs = list(
                zip(numbers, none if states is None else states, none if memory is None else memory, strict=True)
            )
            calls = [self._call(layer, wanted[layer]) for layer in range(L)]
        elif self.group == 1:
            blocks = self._repeated()
            inputs = (numbers, None if states is None else restack(states), None)
            calls = [self._call(layer, wanted[0]) for layer in range(self.period)]
        else:
            blocks, count = self.blocks, L // self.group
            by_place = [None if states is None else restack(states[place :: self.group]) for place in range(self.group)]
            inputs = (numbers.reshape(count, -1), by_place, None)
            keys = None if keys is None else keys.reshape(count, self.group, -1)
            calls = [self._group_call(wanted[0])]
        x_BTD, outputs = apply_stack(
            calls, blocks, x_BTD, keys=keys, per_layer=inputs, context=context,
            first=None if self.first_norm else self._call(0, wanted[0], normed=True),
            schedule=self.schedule if states is None and memory is None and return_weights is False else None,
            scan=c.scan_layers, remat="none" if self.hooks is not None else c.remat, group=self.group,
        )  # fmt: skip
        output = self._gathered(outputs, single, chosen)
        return context.at("final", x_BTD if self.final_norm is None else self.final_norm(x_BTD)), output

    def _entered(self, x_BTD: Array, context: Context) -> Array:
        """The residual stream before the first block; hooks may also keep where its tokens belong."""
        if context.hooks is not None:
            B, T, _ = x_BTD.shape
            context.at("positions", context.positions(x_BTD))
            context.at("segments", jnp.ones((B, T), jnp.int32) if context.segments_BT is None else context.segments_BT)
        return context.at("embed", x_BTD)

    def _call(self, layer: int, heads: bool | tuple[int, ...], *, normed: bool = False) -> Any:
        """A function that runs a block as one layer, with that layer's settings."""

        def call(block: Block, x: Array, key: Array | None, inputs: Any, context: Context) -> Any:
            number, state, memory = inputs
            own = dataclasses.replace(
                context.inside(f"layers.{layer}"), layer=number, state=state, key=key, return_weights=heads,
                memory=context.memory if memory is None else memory,
            )  # fmt: skip
            return block.as_layer(self.mixers[layer])(x, own, normed=normed)

        return call

    def _group_call(self, heads: bool | tuple[int, ...]) -> Any:
        """A function that runs a group of blocks, one after the other."""
        calls = [self._call(place, heads) for place in range(self.group)]

        def call(blocks: nnx.List, x: Array, keys: Array | None, inputs: Any, context: Context) -> Any:
            numbers, states, _ = inputs
            outputs = []
            for place, call in enumerate(calls):
                key = None if keys is None else keys[place]
                x, output = call(blocks[place], x, key, (numbers[place], states[place], None), context)
                outputs.append(output)
            return x, outputs

        return call

    def _gathered(self, outputs: Any, single: bool, chosen: Chosen | None) -> StackOutput:
        """Outputs of blocks as those of the stack, whether they are single, stacked, or stacked in groups."""
        L = self.num_layers
        alike = not single and self.group == 1
        layers = outputs if single else _layers_of([outputs] if alike else outputs, L, self.group)
        found = [layer.state for layer in layers if layer.state is not None]
        states = found if len(found) == L else None
        if alike:
            weights = outputs.weights
        else:
            picked = range(L) if chosen is None else chosen[0]
            weights = _stacked_weights([one for layer in picked if (one := layers[layer].weights) is not None])
        return StackOutput(states, weights, _routers_of([outputs] if alike else outputs, single))

    def single_blocks(self) -> list[Block]:
        """One block per layer."""
        if self.is_unstacked:
            return list(self.blocks)
        if self.group == 1:
            return unstack(self._repeated(), self.num_layers)
        groups = unstack(self.blocks, self.num_layers // self.group)
        return [block for group in groups for block in group]

    def _repeated(self) -> Any:
        """The stacked blocks with each distinct one as often as it is applied; their gradients add up."""
        if self.distinct == self.depth:
            return self.blocks
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, self.depth // self.distinct, axis=0), self.blocks)

    def _layer_keys(self, key: Keys) -> Keys:
        """The keys of each layer's rows, [L, B]; in a part of a longer stack those that its layers have there."""
        keys = split(key, self.depth)
        if self.num_layers == self.depth:
            return keys
        return jax.lax.dynamic_slice_in_dim(keys, self.first_layer, self.num_layers)

    def take_part(self, num_layers: int, number: Any) -> None:
        """Become part `number` of the stack, with `num_layers` layers, whose blocks it already has."""
        self.num_layers, self.mixers = num_layers, self.mixers[:num_layers]
        # It may be traced, and is not part of the module's structure.
        object.__setattr__(self, "first_layer", number * num_layers)

    def unstack_layers(self) -> None:
        """Make the blocks a list of single ones, for decoding, which reads each weight once per token.

        A scan, or a loop over slices, copies every layer out of the stack before reading it. Here each layer is
        separate, and the three projections of its softmax attention are joined into one.
        """
        blocks = self.single_blocks()
        for block in blocks:
            if isinstance(block.attention, MultiHeadAttention):
                block.attention = block.attention.joined()
        self.blocks, self.is_unstacked = nnx.List(blocks), True

    def remember(self, memory_BMD: Float[Array, "B M D"]) -> list[KVCache]:
        """Each layer's keys and values of a memory, for an unstacked stack."""
        return [block.cross.remember(memory_BMD) for block in self.single_blocks() if block.cross is not None]

    def make_states(self, batch_size: int, max_length: int) -> list[State]:
        """The states before the first token, one per layer, with room for `max_length` tokens."""
        several = self.is_unstacked or self.group > 1
        blocks = list(self.blocks) if several else [self.blocks]
        return [
            blocks[layer % len(blocks)].attention.make_state(batch_size, max_length) for layer in range(self.num_layers)
        ]


def make_norm(config: StackConfig, rngs: nnx.Rngs, *, dim: int | None = None) -> Norm:
    """The config's kind of norm, over the residual stream or another `dim`."""
    width = config.embed_dim if dim is None else dim
    if config.norm == "layer_norm":
        return LayerNorm(width, use_bias=config.has_norm_bias, epsilon=config.norm_eps, rngs=rngs)
    return RMSNorm(width, epsilon=config.norm_eps, rngs=rngs)


def _make_relative(
    config: StackConfig, *, causal: bool, init: Any, rngs: nnx.Rngs
) -> RelativePosition | RelativeEmbedding | None:
    """What the layers share of their positions: a bias by distance, or embeddings of distances."""
    if (relative := config.relative_position) is not None:
        num_heads, position = relative
        return RelativePosition(
            num_heads, num_buckets=position.num_buckets, max_distance=position.max_distance, bidirectional=not causal,
            init=init, rngs=rngs,
        )  # fmt: skip
    if (mixer := config.relative_embedding) is not None:
        return RelativeEmbedding(
            config.embed_dim, max_distance=mixer.max_distance, num_buckets=mixer.num_buckets,
            norm_epsilon=config.norm_eps if mixer.norm_embeddings else None, init=init, dtype=DTYPES[config.dtype], rngs=rngs,
        )  # fmt: skip
    return None


def layers_of_group(config: StackConfig) -> int:
    """Number of blocks of a pattern that have their own parameters; 1 if all layers have the same shapes."""
    return 1 if len({mixer.structure for mixer in config.mixers()}) == 1 else len(config.pattern)


def cache_lengths(states: Sequence[State]) -> Int[Array, " B"]:
    """How many tokens each row has read, which is the same in every layer."""
    return states[0].length


def with_schedule(model: Any, schedule: Schedule) -> Any:
    """The model with all of its stacks run as a pipeline by `schedule`, if the mesh has one."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LayerStack):
            module.schedule = schedule
    return model


def stacks_of(model: Any) -> dict[str, LayerStack]:
    """The stacks of a model by the prefix of their places: one under "", or `encoder.` and `decoder.`; none of a
    recurrent one."""
    names = {"": "layers", "encoder.": "encoder", "decoder.": "decoder"}
    found = {prefix: getattr(model, name, None) for prefix, name in names.items()}
    return {prefix: one for prefix, one in found.items() if isinstance(one, LayerStack)}


def hooked(model: M, hooks: Hooks) -> M:
    """The same model with hooks in its stacks (`transformer.hooks`), for one call."""
    model = nnx.merge(*nnx.split(model))
    for prefix, one in stacks_of(model).items():
        one.hooks = hooks.inside(prefix.removesuffix(".")) if prefix else hooks
    return model


def _heads_wanted(return_weights: bool | Chosen, layer: int) -> bool | tuple[int, ...]:
    if not isinstance(return_weights, tuple):
        return return_weights
    layers, heads = return_weights
    return heads if layer in layers else False


def _period(mixers: Sequence[MixerConfig]) -> int:
    """The smallest number of mixers that give all of them by repetition; the last repetition may be incomplete."""
    lengths = range(1, len(mixers) + 1)
    return next(p for p in lengths if all(mixer == mixers[layer % p] for layer, mixer in enumerate(mixers)))


def _layers_of(outputs: Sequence[BlockOutput], num_layers: int, group: int) -> list[BlockOutput]:
    """Stacked outputs, one for each place of a group, as one per layer."""
    by_place = [unstack(output, num_layers // group) for output in outputs]
    return [by_place[layer % group][layer // group] for layer in range(num_layers)]


def _routers_of(outputs: Sequence[BlockOutput], single: bool) -> tuple[RouterSums, ...]:
    """The routers' sums of all layers, from single blocks, or from one stack for each place of a group."""
    routers = [output.router for output in outputs if output.router is not None]
    if not routers:
        return ()
    if single:
        return (restack(routers),)
    # [L / P, P, ...]
    return (jax.tree.map(lambda *places: jnp.stack(places, 1).reshape(-1, *places[0].shape[1:]), *routers),)


def _stacked_weights(weights: list[Array]) -> Array | None:
    if not weights:
        return None
    if len({one.shape for one in weights}) > 1:
        shapes = ", ".join(str(one.shape[1]) for one in weights)
        raise ValueError(
            f"return_weights: the layers have different numbers of heads ({shapes}); choose layers of one kind"
        )
    return jnp.stack(weights)


def _make_block(c: StackConfig, mixer: MixerConfig, rngs: nnx.Rngs, *, num_layers: int, cross: bool) -> Block:
    init, out_init = c.initialisers(num_layers)
    types: dict[str, Any] = {"dtype": DTYPES[c.dtype], "rngs": rngs, "kernel_init": init, "out_init": out_init}
    mlp = c.mlp
    feed_forward: FeedForward | MixtureOfExperts
    if isinstance(mlp, ExpertsConfig):
        feed_forward = MixtureOfExperts(
            c.embed_dim, mlp.width(c.embed_dim), num_experts=mlp.num_experts, experts_per_token=mlp.experts_per_token,
            capacity=mlp.capacity_factor, activation=mlp.activation, balance_loss=mlp.balance_loss,
            router_z_loss=mlp.router_z_loss, **types,
        )  # fmt: skip
    else:
        feed_forward = FeedForward(
            c.embed_dim, mlp.width(c.embed_dim), activation=mlp.activation, use_bias=mlp.bias, **types
        )
    options = {"dropout_rate": c.attention_dropout, "norm_eps": c.norm_eps, **types}

    def norms() -> tuple[Norm, ...]:
        return tuple(make_norm(c, rngs) for _ in range(3 if cross else 2))

    return Block(
        make_mixer(mixer, c.embed_dim, **options), feed_forward, norms(), output_norms=norms() if c.norm_outputs else None,
        cross=MultiHeadAttention(c.embed_dim, c.cross_attention, memory_dim=c.embed_dim, **options) if cross else None,
        norm_first=c.norm_first, parallel=c.parallel_residual, dropout_rate=c.dropout,
    )  # fmt: skip
