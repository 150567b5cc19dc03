"""BERT: an encoder that sees both sides of every token, and a head; RoBERTa, DistilBERT and modern encoders from one config.

B batch, T position, K predicted position, E table, D embed, V vocab, L layers, N query heads, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.mask import AttentionMask
from transformer.blocks import BlockOutput
from transformer.errors import require
from transformer.layers.linear import Linear
from transformer.models.config import Activation, StackConfig, attention_flops, feed_forward_flops
from transformer.models.embed import embed, make_positions, make_table
from transformer.models.heads import (
    MaskedHead,
    PooledHead,
    PoolerActivation,
    Pooling,
    ReplacedHead,
    TokenHead,
    embedding_of,
    linear_options,
)
from transformer.models.layer_stack import Chosen, LayerStack, make_norm, router_loss, weights_of
from transformer.types import DTYPES, Array, Float, Int, ModelOutput, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(StackConfig):
    """The defaults are BERT's base model (Devlin et al. 2018); `configs/` has RoBERTa's shape and a modern encoder's."""

    family: Literal["bert"] = "bert"
    """Kind of model."""
    vocab_size: int = 30_522
    """Number of token ids; at least the tokenizer's. A multiple of 128 runs faster on accelerators."""
    max_length: int = 512
    """Longest context, in tokens."""
    activation: Activation = "gelu_exact"
    """Feed-forward activation, and that of the heads over tokens; geglu, geglu_exact and swiglu are gated. gelu and geglu have
    the tanh approximation."""
    norm_first: bool = False
    """Normalise before each sublayer, and once at the end (pre-norm); false: after each sum, as in the paper."""
    norm_epsilon: float = 1e-12
    """Added to the variance in a norm."""
    dropout: float = 0.1
    """Drop rate after the embedding, in attention and after each sublayer."""
    table_dim: int | None = None
    """Width of the embeddings, which a linear map brings to embed_dim (as in ELECTRA's small model); null: embed_dim."""
    token_types: int = 2
    """Kinds of sentence that a token may belong to, each with an embedding of its own; 0: none, as in RoBERTa."""
    embed_norm: bool = True
    """Normalise the sum of the embeddings."""
    local_window: int | None = None
    """Layers that are not global see this many tokens before and behind each token; null: all layers see everything."""
    global_every: int = 3
    """With a local window, every so-manyth layer is global, from the first on."""
    local_rotary_period: float | None = None
    """`rotary_period` of the layers that are not global; null: the same."""
    first_norm: bool = True
    """With norm_first, whether the first block normalises what its attention reads; false: it is normalised already, with
    embed_norm (ModernBERT)."""
    head: Literal["masked", "pretraining", "replaced", "classification", "tokens", "answer", "choice", "embedding"] = (
        "masked"
    )
    """What stands on the encoder: scores of masked tokens; those and of the next sentence (pretraining); of tokens that are
    not what stood there (replaced, ELECTRA's); of classes, or with num_labels 1 of a number; of each token's class; of where
    an answer starts and ends; of a choice; or the mean vector."""
    num_labels: int = 2
    """Classes of the heads classification and tokens."""
    pooling: Pooling = "cls"
    """What stands for a row in the heads pretraining, classification, choice and embedding: its first token, or the mean of its
    tokens."""
    pooler: bool = False
    """Head embedding: keep a layer on the pooled vector beside it, from which classifiers are fine-tuned (BERT's pooler)."""
    pooler_activation: PoolerActivation = "tanh"
    """Behind that layer, that of the heads pretraining, classification and choice, and token_layer."""
    pooler_norm: bool = False
    """Normalise behind that activation (ModernBERT)."""
    token_layer: bool = False
    """Heads tokens and answer: begin with a layer of their own, normalised behind its activation (ModernBERT)."""
    head_bias: bool = True
    """Biases in the transforms of the heads, and in their norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "token_types", self.token_types >= 0, "allowed: 0 or more")
        require(self, "num_labels", self.num_labels >= 1, "allowed: 1 or more")
        require(self, "table_dim", self.table_dim is None or self.table_dim >= 1, "allowed: 1 or more, or null")
        require(self, "global_every", self.global_every >= 1, "allowed: 1 or more")
        require(
            self,
            "first_norm",
            self.first_norm or (self.norm_first and self.embed_norm),
            "it needs norm_first and embed_norm",
        )
        period = self.local_rotary_period
        require(self, "local_rotary_period", period is None or period > 0, "allowed: above 0, or null")
        window = self.local_window
        require(self, "local_window", window is None or window >= 1, "allowed: 1 or more, or null")

    @property
    def dim_of_table(self) -> int:
        """`table_dim` with its default filled in."""
        return self.embed_dim if self.table_dim is None else self.table_dim


class Bert(nnx.Module):
    """An encoder-only Transformer with a head.

    Devlin et al. 2018; Liu et al. 2019 (RoBERTa); for the modern shape Warner et al. 2024 (rotary, GEGLU, alternating local
    and global attention, packed sequences).
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = c = config
        E = c.dim_of_table
        self.embed = make_table(c, c.vocab_size, dim=E, rngs=rngs)
        self.positions = make_positions(c, rngs, dim=E)
        self.types = make_table(c, c.token_types, dim=E, axis=None, rngs=rngs) if c.token_types else None
        self.embed_norm = make_norm(c, rngs, dim=E) if c.embed_norm else None
        options = linear_options(c.init_std, DTYPES[c.dtype], rngs)
        self.widen = make_widen(c, options)
        self.layers = LayerStack(c, causal=False, first_norm=c.first_norm, rngs=rngs)
        self.masked_head: MaskedHead | None = None
        self.pooled_head: PooledHead | None = None
        self.token_head: TokenHead | None = None
        self.replaced_head: ReplacedHead | None = None
        if c.head == "replaced":
            self.replaced_head = nnx.data(ReplacedHead(c.embed_dim, activation=c.activation, **options))
        if c.head in ("masked", "pretraining"):
            self.masked_head = nnx.data(make_masked_head(c, options))
        classes = {"pretraining": 2, "classification": c.num_labels, "choice": 1}.get(c.head)
        if classes is not None or (c.head == "embedding" and c.pooler):
            pooled = PooledHead(
                c.embed_dim, classes, pooling="cls" if c.head == "embedding" else c.pooling, dropout_rate=c.dropout,
                activation=c.pooler_activation, norm_epsilon=c.norm_epsilon if c.pooler_norm else None,
                use_bias=c.head_bias, **options,
            )  # fmt: skip
            self.pooled_head = nnx.data(pooled)
        classes = {"tokens": c.num_labels, "answer": 2}.get(c.head)
        if classes is not None:
            scores = TokenHead(
                c.embed_dim, classes, dropout_rate=c.dropout, activation=c.pooler_activation if c.token_layer else None,
                norm_epsilon=c.norm_epsilon, use_bias=c.head_bias, **options,
            )  # fmt: skip
            self.token_head = nnx.data(scores)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | Chosen = False,
    ) -> tuple[Float[Array, "B T D"], BlockOutput | list[BlockOutput]]:
        """The last block's output, and what the blocks gave beside it; arguments as in `__call__`."""
        x_BTE, positions_BT, key = self.embedded(
            tokens_BT, positions_BT=positions_BT, token_types_BT=token_types_BT, key=key
        )
        x_BTD = x_BTE if self.widen is None else self.widen(x_BTE)
        valid_BT = None if segments_BT is None else segments_BT != 0
        return self.layers(
            x_BTD, self.masks(segments_BT), positions_BT=positions_BT, valid_BT=valid_BT,
            rotary_periods=(None, *[self.config.local_rotary_period] * (self.config.global_every - 1)), key=key,
            return_weights=return_weights,
        )  # fmt: skip

    def embedded(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T E"], Int[Array, "B T"], PRNGKeyArray | None]:
        """The sum of a token's embeddings, where tokens stand, and a key for the layers; arguments as in `__call__`."""

        def with_types(x_BTD: Array) -> Array:
            if self.types is not None:
                # A model of one type (RoBERTa) tells the sentences of a pair apart by what stands between them.
                known_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
                x_BTD += self.types(jnp.minimum(known_BT, self.config.token_types - 1))
            return x_BTD if self.embed_norm is None else self.embed_norm(x_BTD)

        return embed(
            self.config, self.embed, self.positions, tokens_BT, positions_BT=positions_BT, finish=with_types, key=key
        )

    def masks(self, segments_BT: Int[Array, "B T"] | None) -> AttentionMask | list[AttentionMask]:
        """What tokens see: one mask for all layers, or a list that is gone through again and again."""
        c = self.config
        mask = AttentionMask.none() if segments_BT is None else AttentionMask.segments(segments_BT)
        if c.local_window is None:
            return mask
        near = mask & AttentionMask.window(left=c.local_window, right=c.local_window)
        return [mask, *[near] * (c.global_every - 1)][: c.num_layers]

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        predicted_BK: Int[Array, "B K"] | None = None,
        key: PRNGKeyArray | None = None,
        return_weights: bool | Chosen = False,
    ) -> ModelOutput:
        """The head's scores.

        Args:
            positions_BT: where each token stands in its document; 0 to T-1 by default.
            segments_BT: which packed document a token belongs to; 0 is padding. Nothing is seen across documents. The heads
                of whole rows take a row for one document.
            token_types_BT: which sentence of a pair a token belongs to; 0 by default.
            predicted_BK: the places that the masked head scores, which saves the others' products; all by default.
            key: turns dropout on.
            return_weights: also give the attention weights, as in `GPT`.

        Returns:
            Float32 logits: [B, K, V] (masked, pretraining; K is T without `predicted_BK`), [B, C] (classification, choice),
            [B, T, C] (tokens, answer), [B, T] (replaced), or the vectors of length 1 [B, D] (embedding). `pooled_logits`
            [B, 2] are the next sentence's (pretraining), or the pooler's vectors [B, D] (embedding with pooler).

        Raises:
            ValueError: more tokens than learned positions, or a layer or head that does not exist.
        """
        c = self.config
        key, head_key = (None, None) if key is None else jax.random.split(key)
        hidden_BTD, outputs = self.hidden(
            tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, token_types_BT=token_types_BT, key=key,
            return_weights=return_weights,
        )  # fmt: skip
        valid_BT = None if segments_BT is None else segments_BT != 0
        pooled = None if self.pooled_head is None else self.pooled_head(hidden_BTD, valid_BT, key=head_key)
        if self.masked_head is not None:
            logits = self.masked_head(hidden_BTD, self.embed, predicted_BK)
        elif self.replaced_head is not None:
            logits = self.replaced_head(hidden_BTD)
        elif self.token_head is not None:
            logits = self.token_head(hidden_BTD, key=head_key)
        elif c.head == "embedding":
            logits = embedding_of(hidden_BTD, valid_BT, pooling=c.pooling)
        else:
            assert pooled is not None
            logits = pooled
        return ModelOutput(
            logits=logits,
            pooled_logits=pooled if c.head in ("pretraining", "embedding") else None,
            weights=weights_of(outputs, return_weights),
            router_loss=router_loss(c, outputs),
        )


def make_widen(config: BertConfig, options: dict[str, Any]) -> Linear | None:
    """From the width of the embeddings to that of the layers; None where they are as wide."""
    E, D = config.dim_of_table, config.embed_dim
    return None if E == D else Linear((E,), (D,), axes=(None, "embed"), **options)


def make_masked_head(config: BertConfig, options: dict[str, Any]) -> MaskedHead:
    """The head over the tokens that were hidden."""
    return MaskedHead(
        config.embed_dim, config.vocab_size, table_dim=config.dim_of_table, activation=config.activation,
        norm_epsilon=config.norm_epsilon, use_bias=config.head_bias, **options,
    )  # fmt: skip


def flops_per_token(config: BertConfig, length: int) -> float:
    """Floating-point operations of one token's forward pass at context `length`, counted as in `gpt.flops_per_token`; of a
    masked head as if 15% of the tokens were predicted."""
    c = config
    seen = [float(length)] * c.num_layers
    if c.local_window is not None:
        near = float(min(2 * c.local_window + 1, length))
        seen = [near if layer % c.global_every else float(length) for layer in range(c.num_layers)]
    stack = sum(attention_flops(c, keys) + feed_forward_flops(c) for keys in seen)
    E = c.dim_of_table
    widen = 0 if c.embed_dim == E else 2 * E * c.embed_dim
    head = 0.15 * 2 * E * (c.embed_dim + c.vocab_size) if c.head in ("masked", "pretraining") else 0
    return widen + stack + head
