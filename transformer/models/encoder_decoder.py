"""Encoder-decoder Transformers: the original one (Vaswani et al. 2017) and T5 (Raffel et al. 2020), from one module.

B batch, S source position, T target position, D embed, V vocab, L layers, N query heads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.mask import AttentionMask
from transformer.decode.cache import KVCache
from transformer.errors import require
from transformer.layers.position import token_positions
from transformer.models.config import Activation, Position, StackConfig, attention_flops, feed_forward_flops
from transformer.models.embed import embed, logits_of, make_output, make_positions, make_table
from transformer.models.layer_stack import LayerStack, router_loss, weights_of
from transformer.sharding import with_axes
from transformer.stack import unstack
from transformer.types import Array, Float, Int, ModelOutput, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(StackConfig):
    """What both families have beyond a stack. `num_layers` is the encoder's depth, `vocab_size` the target's vocabulary."""

    num_decoder_layers: int | None = None
    """Number of decoder blocks; null: as many as the encoder has."""
    source_vocab_size: int | None = None
    """Number of source token ids, with a table of their own; null: both sides share one vocabulary and one table."""
    tie_embeddings: bool = True
    """Use the target's token embedding as the output projection too."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(embed_dim)."""
    scale_logits: bool = False
    """Multiply the decoder's output by 1 / sqrt(embed_dim) before the output projection."""
    scale_attention: bool = True
    """Divide attention's logits by sqrt(head_dim); T5 leaves that to the queries' initialisation."""
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
        start = self.start_token
        require(self, "start_token", start is None or 0 <= start < self.vocab_size, "allowed: a token id, or null")

    @property
    def decoder_layers(self) -> int:
        """`num_decoder_layers` with its default filled in."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def written_tokens(self) -> int:
        """How many ids a target may have: all, or those before a start token that is the last of them (Marian's padding)."""
        return self.vocab_size - (self.start_token == self.vocab_size - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaswaniConfig(EncoderDecoderConfig):
    """The original Transformer; the defaults are its base model (Vaswani et al. 2017, table 3)."""

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
    num_heads: int = 8
    """Number of query heads."""
    activation: Activation = "relu"
    """Feed-forward activation; geglu and swiglu are gated."""
    norm_first: bool = False
    """Normalise before each sublayer, and once at the end (pre-norm); false: after each sum, as in the paper."""
    position: Position = "sinusoidal"
    """How the model knows where a token stands."""
    dropout: float = 0.1
    """Drop rate after the embedding, in attention and after each sublayer."""
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
    num_heads: int = 6
    """Number of query heads."""
    head_dim: int | None = 64
    """Width of a head, of its own whatever embed_dim is."""
    mlp_dim: int | None = 1024
    """Width of the feed-forward layer."""
    activation: Activation = "geglu"
    """Feed-forward activation; version 1.0 has relu."""
    norm: Literal["layer_norm", "rms_norm"] = "rms_norm"
    """Kind of normalisation."""
    norm_epsilon: float = 1e-6
    """Added to the variance in a norm."""
    position: Position = "relative"
    """How the model knows where a token stands."""
    use_bias: bool = False
    """Biases in linear maps and layer norms."""
    tie_embeddings: bool = False
    """Use the token embedding as the output projection too; version 1.0 does, with scale_logits."""
    scale_attention: bool = False
    """Divide attention's logits by sqrt(head_dim); T5 leaves that to the queries' initialisation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What the decoder looks at: the encoder's output, or each decoder layer's keys and values of it."""

    hidden: Float[Array, "B S D"] | list[KVCache]
    segments_BS: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
    """What has been written, row by row: each layer's keys and values."""

    cache: list[KVCache]


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
        scale = None if c.scale_attention else 1.0
        kernel_init = nnx.initializers.xavier_uniform() if c.init == "xavier" else None
        options: dict[str, Any] = {"attention_scale": scale, "kernel_init": kernel_init, "rngs": rngs}
        self.encoder = LayerStack(c, causal=False, **options)
        self.decoder = LayerStack(c, causal=True, cross=True, num_layers=c.decoder_layers, **options)
        self.head = None if c.tie_embeddings else make_output(c, rngs)
        bias = with_axes(nnx.initializers.zeros, "vocab")
        self.output_bias = nnx.Param(bias(rngs.params(), (c.vocab_size,), jnp.float32)) if c.output_bias else None

    def encode(
        self,
        source_tokens_BS: Int[Array, "B S"],
        *,
        source_segments_BS: Int[Array, "B S"] | None = None,
        source_positions_BS: Int[Array, "B S"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Memory:
        """Read the source.

        Args:
            source_segments_BS: which packed sentence a token belongs to; 0 is padding.
            source_positions_BS: where each token stands in its sentence; 0 to S-1 by default.
            key: turns dropout on.
        """
        hidden_BSD, segments_BS, _ = self._encode(source_tokens_BS, source_segments_BS, source_positions_BS, key)
        apart = isinstance(self.decoder.blocks, nnx.List)
        return Memory(self.decoder.remember(hidden_BSD) if apart else hidden_BSD, segments_BS)

    def __call__(
        self,
        source_tokens_BS: Int[Array, "B S"],
        tokens_BT: Int[Array, "B T"],
        *,
        source_segments_BS: Int[Array, "B S"] | None = None,
        source_positions_BS: Int[Array, "B S"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool = False,
    ) -> ModelOutput:
        """Scores of each next target token, given those before it (teacher forcing).

        Args:
            tokens_BT: the target, behind the token that it starts with.
            source_segments_BS, segments_BT: which packed pair a token belongs to; 0 is padding. Nothing is seen across.
            return_weights: also give the weights of the decoder's attention to the source, [L, B, N, T, S].

        Raises:
            ValueError: more tokens than learned positions.
        """
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        hidden_BSD, source_segments_BS, encoder_loss = self._encode(
            source_tokens_BS, source_segments_BS, source_positions_BS, encoder_key
        )
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        mask = AttentionMask.causal() & AttentionMask.segments(segments_BT)
        x_BTD, positions_BT, stack_key = self._embed(tokens_BT, positions_BT, 0, False, decoder_key)
        x_BTD, outputs = self.decoder(
            x_BTD, mask, memory=hidden_BSD, memory_mask=AttentionMask.segments(segments_BT, source_segments_BS),
            positions_BT=positions_BT, valid_BT=segments_BT != 0, key=stack_key, return_weights=return_weights,
        )  # fmt: skip
        losses = [loss for loss in (encoder_loss, router_loss(self.config, outputs)) if loss is not None]
        return ModelOutput(
            logits=self.logits(x_BTD),
            weights=weights_of(outputs) if return_weights else None,
            router_loss=sum(losses[1:], losses[0]) if losses else None,
        )

    def begin(self, memory: Memory, max_length: int) -> DecoderState:
        """The state before the first target token, with room for `max_length` of them."""
        B = memory.segments_BS.shape[0]
        return DecoderState(unstack(self.decoder.make_cache(B, max_length), self.config.decoder_layers))

    def step(
        self, token_B: Int[Array, " B"], state: DecoderState, memory: Memory, *, return_weights: bool = False
    ) -> tuple[Any, ...]:
        """Scores of the token after `token_B` [B, V], and the next state; with weights, also the mean of the last layer's heads
        over the source [B, S].

        The model's blocks must stand apart (`unstacked`), and the memory come from such a model.
        """
        B = token_B.shape[0]
        start = state.cache[0].length
        x_B1D, positions_B1, _ = self._embed(token_B[:, None], None, start, False, None)
        segments_B1 = jnp.ones((B, 1), jnp.int32)
        chosen = ((self.config.decoder_layers - 1,), tuple(range(self.config.num_heads)))
        x_B1D, outputs = self.decoder(
            x_B1D, AttentionMask.causal(), memory=memory.hidden,
            memory_mask=AttentionMask.segments(segments_B1, jnp.minimum(memory.segments_BS, 1)),
            positions_BT=positions_B1, cache=state.cache, return_weights=chosen if return_weights else False,
        )  # fmt: skip
        assert isinstance(outputs, list)
        caches = [output.cache for output in outputs if output.cache is not None]
        result = self.logits(x_B1D)[:, 0], DecoderState(caches)
        if not return_weights:
            return result
        weights = outputs[-1].weights
        assert weights is not None
        return *result, weights[:, :, 0].mean(1)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the next token, float32."""
        with jax.named_scope("logits"):
            if self.config.scale_logits:
                hidden_BTD = hidden_BTD * self.config.embed_dim**-0.5
            logits = logits_of(self.embed, self.head, hidden_BTD)
            return logits if self.output_bias is None else logits + self.output_bias[...]

    def unstacked(self) -> EncoderDecoder:
        """The same model with its decoder's blocks apart, for decoding (`LayerStack.take_apart`)."""
        model = nnx.merge(*nnx.split(self))
        model.decoder.take_apart()
        return model

    def _encode(
        self, tokens_BS: Array, segments_BS: Array | None, positions_BS: Array | None, key: PRNGKeyArray | None
    ) -> tuple[Array, Array, Array | None]:
        segments_BS = jnp.ones_like(tokens_BS) if segments_BS is None else segments_BS
        x_BSD, positions_BS, stack_key = self._embed(tokens_BS, positions_BS, 0, True, key)
        hidden_BSD, outputs = self.encoder(
            x_BSD,
            AttentionMask.segments(segments_BS),
            positions_BT=positions_BS,
            valid_BT=segments_BS != 0,
            key=stack_key,
        )
        return hidden_BSD, segments_BS, router_loss(self.config, outputs)

    def _embed(
        self, tokens: Array, positions: Array | None, start: int | Array, is_source: bool, key: PRNGKeyArray | None
    ) -> tuple[Array, Array, PRNGKeyArray | None]:
        """Tokens with their positions, where those stand, and the key for the layers."""
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
    """Of one target token's forward pass where source and target are `length` long, the encoder's work for it included.

    Counted as in `gpt.flops_per_token`.
    """
    c = config
    seen = float(length)
    encoder = c.num_layers * (attention_flops(c, seen) + feed_forward_flops(c))
    # Attention to the source projects as much as self-attention does.
    decoder = attention_flops(c, (seen + 1) / 2) + attention_flops(c, seen) + feed_forward_flops(c)
    return encoder + c.decoder_layers * decoder + 2 * c.embed_dim * c.vocab_size
