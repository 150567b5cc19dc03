"""Encoder-decoder Transformers: the original one (Vaswani et al. 2017) and T5 (Raffel et al. 2020), from one module.

B batch, S source position, T target position, D embed, V vocab, L layers, N query heads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.errors import check_size, require
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.mixture_of_experts import RouterSums
from transformer.layers.position import RelativeConfig, token_positions
from transformer.loss import Projection
from transformer.mixers.context import Context
from transformer.mixers.registry import MixerConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.mixers.state import KVCache, State
from transformer.models.config import MlpConfig, PositionEmbedding, StackConfig, stack_flops
from transformer.models.embed import embed, logits_of, make_output, make_positions, make_table, projection_of
from transformer.models.layer_stack import LayerStack, cache_lengths
from transformer.randomness import split
from transformer.resume import Ask
from transformer.sharding import with_axes
from transformer.types import Array, Float, Int, Keys, ModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(StackConfig):
    """What both families add to a stack. `num_layers` is the encoder's depth, `vocab_size` the target's vocabulary."""

    num_decoder_layers: int | None = None
    """Number of decoder blocks; null: same as the encoder."""
    source_vocab_size: int | None = None
    """Number of source token ids, with a table of their own; null: both sides share one vocabulary and one table."""
    tie_embeddings: bool = True
    """Use the target's token embedding as the output projection too."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(embed_dim)."""
    scale_logits: bool = False
    """Multiply the decoder's output by 1 / sqrt(embed_dim) before the output projection."""
    init: Literal["normal", "xavier"] = "normal"
    """Initial kernels: normal, of init_std; or uniform by fan-in and fan-out (Glorot & Bengio 2010)."""
    output_bias: bool = False
    """A bias over the vocabulary, added to the output projection (Marian)."""
    start_token: int | None = None
    """Token id that a target begins with; null: the end of text. (T5 and Marian begin with padding.)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("num_decoder_layers", "source_vocab_size"):
            given = getattr(self, field)
            require(self, field, given is None or given >= 1, "allowed: 1 or more, or null")
            if given is not None:
                check_size(self, field)
        start = self.start_token
        require(self, "start_token", start is None or 0 <= start < self.vocab_size, "allowed: a token id, or null")

    @property
    def has_encoder(self) -> bool:
        """Whether some of the layers see what comes after a token."""
        return True

    @property
    def decoder_layers(self) -> int:
        """`num_decoder_layers` with its default filled in."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def has_cross(self) -> bool:
        """Whether blocks attend to a memory: the decoder's do."""
        return True

    def initialisers(self, num_layers: int) -> tuple[Any, Any]:
        """As for any stack, or by fan-in and fan-out if `init` is xavier."""
        if self.init == "normal":
            return super().initialisers(num_layers)
        scale = 1 / (2 * num_layers) if self.norm_first else 1.0
        return nnx.initializers.xavier_uniform(), nnx.initializers.variance_scaling(scale, "fan_avg", "uniform")

    @property
    def written_tokens(self) -> int:
        """Number of ids that a target may contain: all, or those before a start token that is the last id (Marian's padding)."""
        return self.vocab_size - (self.start_token == self.vocab_size - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaswaniConfig(EncoderDecoderConfig):
    """The original Transformer; the defaults are its base model (Vaswani et al. 2017, table 3)."""

    usual_positions: ClassVar[PositionEmbedding] = "sinusoidal"

    family: Literal["vaswani"] = "vaswani"
    """Kind of model."""
    vocab_size: int = 37_000
    """Number of (target) token ids; at least the tokenizer's. A multiple of 128 runs faster on accelerators."""
    max_length: int = 512
    """Longest sequence on either side, in tokens."""
    num_layers: int = 6
    """Number of encoder blocks."""
    embed_dim: int = 512
    """Width of the residual stream."""
    attention: MixerConfig = SoftmaxConfig(num_heads=8)
    """The sequence mixer of each block, by its kind."""
    mlp: MlpConfig = DenseConfig(activation="relu")
    """The feed-forward part of each block: dense, or a mixture of experts."""
    norm_first: bool = False
    """Normalise before each sublayer, and once at the end (pre-norm); false: after each sum, as in the paper."""
    dropout: Ask[float] = 0.1
    """Drop rate after the embedding and after each sublayer."""
    attention_dropout: Ask[float] = 0.1
    """Drop rate of attention weights, in mixers that compute a softmax."""
    scale_embeddings: bool = True
    """Multiply token embeddings by sqrt(embed_dim)."""
    init: Literal["normal", "xavier"] = "xavier"
    """Initial kernels: normal, of init_std; or uniform by fan-in and fan-out (Glorot & Bengio 2010)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(EncoderDecoderConfig):
    """T5; the defaults are the small model of version 1.1 (Raffel et al. 2020; gated, untied). `configs/` has 1.0's shape."""

    family: Literal["t5"] = "t5"
    """Kind of model."""
    vocab_size: int = 32_128
    """Number of token ids, sentinels included; at least the tokenizer's."""
    max_length: int = 512
    """Longest sequence on either side, in tokens."""
    num_layers: int = 8
    """Number of encoder blocks."""
    embed_dim: int = 512
    """Width of the residual stream."""
    attention: MixerConfig = SoftmaxConfig(num_heads=6, head_dim=64, bias=False, scale=1.0, position=RelativeConfig())
    """The sequence mixer of each block, by its kind. T5 has no scale of the logits; the queries' initialisation includes it."""
    mlp: MlpConfig = DenseConfig(dim=1024, activation="geglu", bias=False)
    """The feed-forward part of each block; version 1.0 has relu, and 2048."""
    norm: Literal["layer_norm", "rms_norm"] = "rms_norm"
    """Kind of normalisation."""
    norm_eps: float = 1e-6
    """Added to the variance in a norm."""
    tie_embeddings: bool = False
    """Use the token embedding as the output projection too; version 1.0 does, with scale_logits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What the decoder attends to: the encoder's output, or each decoder layer's keys and values computed from it."""

    hidden: Float[Array, "B S D"] | list[KVCache]
    segments_BS: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
    """The target so far, row by row, in the state of each layer."""

    states: list[State]


class EncoderDecoder(nnx.Module):
    """An encoder that sees all of the source, and a causal decoder that also attends to it.

    Vaswani et al. 2017, section 3.1; Raffel et al. 2020, section 2.1.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = c = config
        # A table that is multiplied by sqrt(D) on the way in, and ties the output, starts at 1 / sqrt(D).
        std = c.embed_dim**-0.5 if c.scale_embeddings else c.init_std
        source_size = c.source_vocab_size
        self.embed = make_table(c, c.vocab_size, std=std, rngs=rngs)
        self.source_embed = None if source_size is None else make_table(c, source_size, std=std, rngs=rngs)
        self.positions = make_positions(c, rngs)
        self.source_positions = make_positions(c, rngs)
        self.encoder = LayerStack(c, causal=False, rngs=rngs)
        self.decoder = LayerStack(c, causal=True, cross=True, num_layers=c.decoder_layers, rngs=rngs)
        self.head = None if c.tie_embeddings else make_output(c, rngs)
        bias = with_axes(nnx.initializers.zeros, "vocab")
        self.output_bias = nnx.Param(bias(rngs.params(), (c.vocab_size,), jnp.float32)) if c.output_bias else None

    def encode(
        self,
        source_tokens_BS: Int[Array, "B S"],
        *,
        source_segments_BS: Int[Array, "B S"] | None = None,
        source_lengths_BM: Int[Array, "B M"] | None = None,
        source_positions_BS: Int[Array, "B S"] | None = None,
        key: Keys | None = None,
    ) -> Memory:
        """Encode the source.

        Args:
            source_segments_BS: which packed sentence a token belongs to; 0 is padding.
            source_lengths_BM: size of each sentence of a row, as for `Context.lengths_BM`.
            source_positions_BS: the position of each token in its sentence; 0 to S-1 by default.
            key: enables dropout.
        """
        hidden_BSD, segments_BS, _ = self._encode(
            source_tokens_BS, source_segments_BS, source_lengths_BM, source_positions_BS, key
        )
        return Memory(self.decoder.remember(hidden_BSD) if self.decoder.is_unstacked else hidden_BSD, segments_BS)

    def __call__(
        self,
        source_tokens_BS: Int[Array, "B S"],
        tokens_BT: Int[Array, "B T"],
        *,
        source_segments_BS: Int[Array, "B S"] | None = None,
        source_lengths_BM: Int[Array, "B M"] | None = None,
        source_positions_BS: Int[Array, "B S"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        lengths_BM: Int[Array, "B M"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        key: Keys | None = None,
        return_weights: bool = False,
    ) -> ModelOutput:
        """Scores of each next target token, given those before it (teacher forcing).

        Args:
            tokens_BT: the target, preceded by its start token.
            source_segments_BS, segments_BT: which packed pair a token belongs to; 0 is padding. Nothing is seen across.
            source_lengths_BM, lengths_BM: size of each part of a row, as for `Context.lengths_BM`.
            return_weights: also return the weights of the decoder's attention to the source, [L, B, N, T, S].

        Raises:
            ValueError: more tokens than learned positions.
        """
        encoder_key, decoder_key = (None, None) if key is None else split(key, 2)
        hidden_BSD, source_segments_BS, routers = self._encode(
            source_tokens_BS, source_segments_BS, source_lengths_BM, source_positions_BS, encoder_key
        )
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        x_BTD, positions_BT, stack_key = self._embed(tokens_BT, positions_BT, 0, False, decoder_key)
        context = Context(
            positions_BT=positions_BT, segments_BT=segments_BT, lengths_BM=lengths_BM, memory=hidden_BSD,
            memory_segments_BM=source_segments_BS, memory_lengths_BM=source_lengths_BM,
        )  # fmt: skip
        x_BTD, output = self.decoder(x_BTD, context, key=stack_key, return_weights=return_weights)
        return ModelOutput(
            logits=self.logits(x_BTD),
            hidden=self._scaled(x_BTD),
            weights=output.weights,
            routers=routers + output.routers,
        )

    def begin(self, memory: Memory, max_length: int) -> DecoderState:
        """The state before the first target token, with room for `max_length` of them."""
        B = memory.segments_BS.shape[0]
        return DecoderState(self.decoder.make_states(B, max_length))

    def step(
        self, token_B: Int[Array, " B"], state: DecoderState, memory: Memory, *, return_weights: bool = False
    ) -> tuple[Any, ...]:
        """Scores of the token after `token_B` [B, V], and the next state; with weights, also the last layer's attention to the
        source, averaged over its heads [B, S].

        The model's blocks must be separate (`unstacked`), and the memory must come from such a model.
        """
        start_B = cache_lengths(state.states)
        x_B1D, positions_B1, _ = self._embed(token_B[:, None], None, start_B, False, None)
        last = self.config.decoder_layers - 1
        chosen = ((last,), tuple(range(self.config.cross_attention.num_heads)))
        hidden, remembered = (None, memory.hidden) if isinstance(memory.hidden, list) else (memory.hidden, None)
        context = Context(positions_BT=positions_B1, memory=hidden, memory_segments_BM=memory.segments_BS)
        x_B1D, output = self.decoder(
            x_B1D, context, memory=remembered, states=state.states,
            return_weights=chosen if return_weights else False,
        )  # fmt: skip
        assert output.states is not None
        result = self.logits(x_B1D)[:, 0], DecoderState(output.states)
        if not return_weights:
            return result
        assert output.weights is not None
        return *result, output.weights[0, :, :, 0].mean(1)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the next token, float32."""
        with jax.named_scope("logits"):
            logits = logits_of(self.embed, self.head, self._scaled(hidden_BTD))
            return logits if self.output_bias is None else logits + self.output_bias[...]

    def projection(self) -> Projection:
        """What turns the output's `hidden` into its `logits`."""
        bias = None if self.output_bias is None else self.output_bias[...]
        return projection_of(self.embed, self.head, bias_V=bias)

    def _scaled(self, hidden_BTD: Array) -> Array:
        """What the output projection reads."""
        return hidden_BTD * self.config.embed_dim**-0.5 if self.config.scale_logits else hidden_BTD

    def unstacked(self) -> EncoderDecoder:
        """The same model with separate decoder blocks, for decoding (`LayerStack.unstack_layers`)."""
        model = nnx.merge(*nnx.split(self))
        model.decoder.unstack_layers()
        return model

    def _encode(
        self,
        tokens_BS: Array,
        segments_BS: Array | None,
        lengths_BM: Array | None,
        positions_BS: Array | None,
        key: Keys | None,
    ) -> tuple[Array, Array, tuple[RouterSums, ...]]:
        segments_BS = jnp.ones_like(tokens_BS) if segments_BS is None else segments_BS
        x_BSD, positions_BS, stack_key = self._embed(tokens_BS, positions_BS, 0, True, key)
        context = Context(positions_BT=positions_BS, segments_BT=segments_BS, lengths_BM=lengths_BM)
        hidden_BSD, output = self.encoder(x_BSD, context, key=stack_key)
        return hidden_BSD, segments_BS, output.routers

    def _embed(
        self, tokens: Array, positions: Array | None, start: int | Array, is_source: bool, key: Keys | None
    ) -> tuple[Array, Array, Keys | None]:
        """Tokens with their positions added, the positions themselves, and the key for the layers."""
        c = self.config
        if c.start_token is not None and not is_source:
            B, T = tokens.shape
            places = token_positions(B, T, start) if positions is None else positions
            tokens = jnp.where(places == 0, c.start_token, tokens)
        table = self.source_embed if is_source and self.source_embed is not None else self.embed
        learned = self.source_positions if is_source else self.positions
        scale = math.sqrt(c.embed_dim) if c.scale_embeddings else None
        return embed(c, table, learned, tokens, positions_BT=positions, start=start, scale=scale, key=key)


def flops_per_token(config: EncoderDecoderConfig, length: int) -> float:
    """FLOPs of one target token's forward pass if source and target are `length` long, the encoder's work for it included.

    Counted as in `gpt.flops_per_token`.
    """
    c = config
    encoder = stack_flops(c, length, causal=False)
    decoder = stack_flops(c, length, causal=True, num_layers=c.decoder_layers)
    # Attention to the source projects as much as self-attention does, and sees all of it.
    cross = c.decoder_layers * c.cross_attention.flops(c.embed_dim, length, causal=False)
    return encoder + decoder + cross + 2 * c.embed_dim * c.vocab_size
