"""GPT: a decoder-only language model, in GPT-2's shape or in a modern one, from one config.

B batch, T position, D embed, V vocab, L layers, N query heads, K key/value heads, H head_dim, F mlp.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.mask import AttentionMask
from transformer.attention.multi_head import MultiHeadAttention
from transformer.blocks import BlockOutput, DecoderBlock
from transformer.decode.cache import KVCache
from transformer.errors import require
from transformer.layers.embedding import Embedding
from transformer.layers.feed_forward import ACTIVATIONS, FeedForward
from transformer.layers.linear import Linear, dropout
from transformer.layers.norm import LayerNorm, RMSNorm
from transformer.layers.position import Alibi, RelativePosition, RotaryScaling, sinusoidal, token_positions
from transformer.sharding import constrain
from transformer.stack import apply_stack, restack, stack, unstack
from transformer.types import DTYPES, Array, Float, Int, ModelOutput, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The defaults are GPT-2's small model (Radford et al. 2019); `configs/` has the modern shape."""

    family: Literal["gpt"] = "gpt"
    """Kind of model."""
    vocab_size: int = 50257
    """Number of token ids; at least the tokenizer's. A multiple of 128 runs faster on accelerators."""
    max_length: int = 1024
    """Longest context, in tokens."""
    num_layers: int = 12
    """Number of blocks."""
    embed_dim: int = 768
    """Width of the residual stream."""
    num_heads: int = 12
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads; num_heads must be a multiple of it. null: as many as query heads; 1: multi-query."""
    head_dim: int | None = None
    """Width of a head; null: embed_dim / num_heads."""
    mlp_dim: int | None = None
    """Width of the feed-forward layer; null: 4 embed_dim, or 8/3 embed_dim (rounded up to a multiple of 64) when gated."""
    activation: Literal["relu", "gelu", "gelu_exact", "silu", "geglu", "swiglu"] = "gelu"
    """Feed-forward activation; geglu and swiglu are gated. gelu is the tanh approximation, as in GPT-2."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalisation before each sublayer and at the end."""
    norm_epsilon: float = 1e-5
    """Added to the variance in a norm."""
    position: Literal["learned", "sinusoidal", "rotary", "alibi", "relative", "none"] = "learned"
    """How the model knows where a token stands: added to its embedding, rotary, or a bias of attention by distance that is
    fixed (alibi) or learned and shared by the layers (relative, T5's)."""
    rotary_period: float = 10_000.0
    """Longest period of rotary positions, over 2π (often called theta)."""
    rotary_scaling: RotaryScaling = RotaryScaling()
    """How rotary positions are stretched to a longer context than the model was trained at."""
    relative_buckets: int = 32
    """Distances that relative positions tell apart; half of them one by one, half in ranges that widen."""
    relative_distance: int = 128
    """From this distance on, in tokens, relative positions are all alike."""
    use_bias: bool = True
    """Biases in linear maps and layer norms."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection too."""
    qk_norm: bool = False
    """RMS-normalise queries and keys in each head."""
    attention_soft_cap: float | None = None
    """Bound c of the attention logits: c tanh(logits / c); null: none."""
    logit_soft_cap: float | None = None
    """Bound c of the output logits: c tanh(logits / c); null: none."""
    window: int | None = None
    """Each token sees this many tokens before itself; null: all of them."""
    sinks: int = 0
    """With a window, each token also sees this many tokens at the start of its document (attention sinks)."""
    dropout: float = 0.0
    """Drop rate after the embedding, in attention and after each sublayer."""
    init_std: float = 0.02
    """Standard deviation of initial weights; those that write to the residual stream get it divided by sqrt(2 num_layers)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in. Parameters are always float32."""
    attention: Literal["auto", "reference", "xla", "cudnn", "pallas", "blockwise", "ring", "ulysses"] = "auto"
    """Attention backend; a named one that cannot run stops the program."""
    scan_layers: bool = True
    """One compiled block, scanned over the layers; false: an unrolled loop (slower to compile)."""
    remat: Literal["none", "light", "dots", "full"] = "none"
    """What the backward pass computes again to save memory: nothing; norms and activations; all but matrix products; all."""

    def __post_init__(self) -> None:
        for field in ("vocab_size", "max_length", "num_layers", "embed_dim", "num_heads"):
            require(self, field, getattr(self, field) >= 1, "allowed: 1 or more")
        for field in ("num_kv_heads", "head_dim", "mlp_dim", "window"):
            require(
                self, field, getattr(self, field) is None or getattr(self, field) >= 1, "allowed: 1 or more, or null"
            )
        for field in ("attention_soft_cap", "logit_soft_cap"):
            require(self, field, getattr(self, field) is None or getattr(self, field) > 0, "allowed: above 0, or null")
        for field in ("norm_epsilon", "init_std", "rotary_period"):
            require(self, field, getattr(self, field) > 0, "allowed: above 0")
        require(self, "sinks", self.sinks >= 0, "allowed: 0 or more")
        require(
            self, "sinks", self.sinks == 0 or self.window is not None, "it needs a window, which sinks are seen past"
        )
        require(self, "dropout", 0 <= self.dropout < 1, "allowed: 0 or more, below 1")
        require(
            self, "num_heads", self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            f"it must divide embed_dim ({self.embed_dim}), or set head_dim",
        )  # fmt: skip
        require(
            self, "num_kv_heads", self.num_heads % self.kv_heads == 0, f"it must divide num_heads ({self.num_heads})"
        )
        if self.position == "rotary":
            require(self, "head_dim", self.dim_of_head % 2 == 0, f"rotary needs an even one (it is {self.dim_of_head})")
        require(
            self, "rotary_scaling", self.rotary_scaling.kind == "none" or self.position == "rotary",
            f"it needs position: rotary (it is {self.position})",
        )  # fmt: skip
        if self.position == "relative":
            require(
                self, "relative_buckets", self.relative_buckets >= 2 and self.relative_buckets % 2 == 0,
                "allowed: an even number",
            )  # fmt: skip
            least = self.relative_buckets // 2
            require(self, "relative_distance", self.relative_distance > least, f"allowed: above {least}")
        if self.position == "sinusoidal":
            require(self, "embed_dim", self.embed_dim % 2 == 0, "sinusoidal positions need an even one")

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads` with its default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def dim_of_head(self) -> int:
        """`head_dim` with its default filled in."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def dim_of_mlp(self) -> int:
        """`mlp_dim` with its default filled in."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        gated = ACTIVATIONS[self.activation][1]
        return -(-8 * self.embed_dim // (3 * 64)) * 64 if gated else 4 * self.embed_dim


Cache = KVCache | list[KVCache]
"""A model's cache with a leading L, or, for a model with its blocks apart, one cache a layer."""

Chosen = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers, and query heads of each of them: whose attention weights are wanted."""


class GPT(nnx.Module):
    """A decoder-only Transformer.

    Radford et al. 2019; for the modern shape Touvron et al. 2023 (rotary, RMSNorm, SwiGLU), Ainslie et al. 2023 (grouped
    queries), Dehghani et al. 2023 (QK-norm), Gemma Team 2024 (soft-cap), Xiao et al. 2023 (sinks).
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        c = config
        init = nnx.initializers.normal(c.init_std)
        self.embed = Embedding(c.vocab_size, c.embed_dim, init=init, dtype=DTYPES[c.dtype], rngs=rngs)
        self.positions = (
            Embedding(c.max_length, c.embed_dim, axes=(None, "embed"), init=init, dtype=DTYPES[c.dtype], rngs=rngs)
            if c.position == "learned"
            else None
        )
        self.relative: Alibi | RelativePosition | None = None
        if c.position == "alibi":
            self.relative = Alibi(c.num_heads)
        elif c.position == "relative":
            self.relative = nnx.data(
                RelativePosition(
                    c.num_heads, num_buckets=c.relative_buckets, max_distance=c.relative_distance, bidirectional=False,
                    init=init, rngs=rngs,
                )
            )  # fmt: skip
        self.blocks: DecoderBlock | nnx.List = stack(self._make_block, c.num_layers, rngs)
        self.final_norm = self._make_norm(rngs)
        self.head = (
            None
            if c.tie_embeddings
            else Linear(
                (c.embed_dim,), (c.vocab_size,), axes=("embed", "vocab"), use_bias=False, kernel_init=init,
                dtype=DTYPES[c.dtype], rngs=rngs,
            )
        )  # fmt: skip

    def _make_norm(self, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
        c = self.config
        if c.norm == "layer_norm":
            return LayerNorm(c.embed_dim, use_bias=c.use_bias, epsilon=c.norm_epsilon, rngs=rngs)
        return RMSNorm(c.embed_dim, epsilon=c.norm_epsilon, rngs=rngs)

    def _make_block(self, rngs: nnx.Rngs) -> DecoderBlock:
        c = self.config
        init = nnx.initializers.normal(c.init_std)
        out_init = nnx.initializers.normal(c.init_std / (2 * c.num_layers) ** 0.5)
        return DecoderBlock(
            MultiHeadAttention(
                c.embed_dim,
                c.num_heads,
                num_kv_heads=c.num_kv_heads,
                head_dim=c.head_dim,
                use_bias=c.use_bias,
                rotary_period=c.rotary_period if c.position == "rotary" else None,
                rotary_scaling=c.rotary_scaling,
                qk_norm=c.qk_norm,
                logit_soft_cap=c.attention_soft_cap,
                dropout_rate=c.dropout,
                backend=c.attention,
                kernel_init=init,
                out_init=out_init,
                dtype=DTYPES[c.dtype],
                rngs=rngs,
            ),
            FeedForward(
                c.embed_dim,
                c.dim_of_mlp,
                activation=c.activation,
                use_bias=c.use_bias,
                kernel_init=init,
                out_init=out_init,
                dtype=DTYPES[c.dtype],
                rngs=rngs,
            ),
            self._make_norm(rngs),
            self._make_norm(rngs),
            dropout_rate=c.dropout,
        )

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | Chosen = False,
    ) -> tuple[Float[Array, "B T D"], BlockOutput | list[BlockOutput]]:
        """The last block's output after the final norm, and what the blocks gave beside it; arguments as in `__call__`."""
        c = self.config
        if self.positions is not None and tokens_BT.shape[1] > c.max_length:
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens, but there are {c.max_length} learned positions (max_length)"
            )
        if isinstance(return_weights, tuple) and not all(0 <= layer < c.num_layers for layer in return_weights[0]):
            raise ValueError(f"return_weights: got layers {return_weights[0]}; allowed: 0 to {c.num_layers - 1}")
        embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
        start = 0 if cache is None else _filled(cache)
        if positions_BT is None:
            B, T = tokens_BT.shape
            positions_BT = token_positions(B, T, start)
        mask = self._mask(positions_BT, segments_BT)
        # Made once, since all layers share it.
        score_mod = None if self.relative is None else self.relative.score_mod(start)
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens_BT)
            if self.positions is not None:
                x_BTD += self.positions(positions_BT)
            elif c.position == "sinusoidal":
                x_BTD += sinusoidal(positions_BT, c.embed_dim).astype(x_BTD.dtype)
            x_BTD = dropout(constrain(x_BTD, "batch", "seq", None), c.dropout, embed_key)

        def call(weights: bool | tuple[int, ...], block: DecoderBlock, x: Array, key: Array | None, cache: Any) -> Any:
            return block(
                x, mask, positions_BT=positions_BT, cache=cache, score_mod=score_mod, key=key, return_weights=weights
            )

        calls: Any = functools.partial(call, return_weights is True)
        if not isinstance(return_weights, bool):
            layers, heads = return_weights
            calls = [functools.partial(call, heads if layer in layers else False) for layer in range(c.num_layers)]
        x_BTD, outputs = apply_stack(
            calls, self.blocks, x_BTD, num_layers=c.num_layers, key=stack_key, per_layer=cache, scan=c.scan_layers,
            remat=c.remat,
        )  # fmt: skip
        return self.final_norm(x_BTD), outputs

    def _mask(self, positions_BT: Array, segments_BT: Array | None) -> AttentionMask:
        """In positions of a call; a cache moves it."""
        c = self.config
        mask = AttentionMask.causal()
        if c.window is not None:
            near = AttentionMask.window(left=c.window)
            if c.sinks and segments_BT is None:
                near |= AttentionMask.sinks(c.sinks)
            elif c.sinks:
                # Each packed document has its own.
                near |= AttentionMask.padding(positions_BT < c.sinks)
            mask &= near
        return mask if segments_BT is None else mask & AttentionMask.segments(segments_BT)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the next token, float32."""
        with jax.named_scope("logits"):
            logits = self.embed.attend(hidden_BTD) if self.head is None else self.head(hidden_BTD)
            logits = constrain(logits.astype(jnp.float32), "batch", "seq", "vocab")
            if self.config.logit_soft_cap is not None:
                logits = self.config.logit_soft_cap * jnp.tanh(logits / self.config.logit_soft_cap)
            return logits

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | Chosen = False,
    ) -> ModelOutput:
        """Scores of each next token.

        Args:
            tokens_BT: token ids below vocab_size.
            positions_BT: where each token stands in its document; 0 to T-1 (behind the cache) by default.
            segments_BT: which packed document a token belongs to; 0 is padding. Nothing is seen across documents.
            cache: keys and values of the tokens before these; `make_cache` makes an empty one.
            key: turns dropout on.
            return_weights: also give every layer's attention weights, recomputed beside the fast kernels; or those of some
                layers and heads alone, (layers, heads), in that order. For a choice the layers are run one by one.

        Raises:
            ValueError: more tokens than learned positions, or a layer or head that does not exist.
        """
        hidden_BTD, outputs = self.hidden(
            tokens_BT,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            cache=cache,
            key=key,
            return_weights=return_weights,
        )
        logits = self.logits(hidden_BTD)
        if not isinstance(outputs, list):
            return ModelOutput(logits=logits, cache=outputs.cache, weights=outputs.weights)
        layers = return_weights[0] if isinstance(return_weights, tuple) else range(len(outputs))
        weights = [weights for layer in layers if (weights := outputs[layer].weights) is not None]
        caches = None if cache is None else [output.cache for output in outputs]
        return ModelOutput(
            logits=logits,
            cache=caches if caches is None or isinstance(self.blocks, nnx.List) else restack(caches),
            weights=jnp.stack(weights) if weights else None,
        )

    def unstacked(self) -> GPT:
        """The same model with its blocks apart, for decoding, which reads each weight once a token.

        A scan, and a loop over slices too, copies every layer out of the stack before it reads it. Here each layer stands by
        itself, its three projections of attention as one. The cache of such a model is a list of layers' caches
        (`stack.unstack`).
        """
        graphdef, params = nnx.split(self)
        model = nnx.merge(graphdef, params)
        blocks = unstack(self.blocks, self.config.num_layers)
        for block in blocks:
            block.attention = block.attention.joined()
        model.blocks = nnx.List(blocks)
        return model

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens."""
        c = self.config
        return KVCache.empty(c.num_layers, batch_size, max_length, c.kv_heads, c.dim_of_head, DTYPES[c.dtype])


def _filled(cache: Cache) -> Int[Array, " B"]:
    """How many positions each row holds, which is the same in every layer."""
    return cache[0].length if isinstance(cache, list) else cache.length[0]


def count_parameters(config: GPTConfig) -> int:
    """Number of parameters, from the shapes of the model itself."""
    abstract = jax.eval_shape(lambda: nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def flops_per_token(config: GPTConfig, length: int) -> float:
    """Floating-point operations of one token's forward pass at context `length`; a training step takes three times that.

    A multiply-add counts as two. Counted: every matrix product, the output projection, and attention's two products
    over the keys that are really seen: the causal half once, a window at its width and its sinks. Not counted: lookups,
    norms, activations, softmax, biases by distance, and whatever rematerialisation repeats.
    """
    c = config
    width = c.num_heads * c.dim_of_head
    projections = 2 * c.embed_dim * (2 * width + 2 * c.kv_heads * c.dim_of_head)
    matrices = 3 if ACTIVATIONS[c.activation][1] else 2
    feed_forward = 2 * matrices * c.embed_dim * c.dim_of_mlp
    seen = (length + 1) / 2
    if c.window is not None and (w := c.window + 1 + c.sinks) < length:
        seen = w - w * (w - 1) / (2 * length)
    attention = 2 * 2 * seen * width
    return c.num_layers * (projections + feed_forward + attention) + 2 * c.embed_dim * c.vocab_size
