"""BERT: an encoder that sees both sides of every token, and a head; RoBERTa, DistilBERT and modern encoders from one config.

B batch, T position, K predicted position, E table, D embed, V vocab, L layers, N query heads, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from transformer.attention.spec.mask import AttentionMask
from transformer.errors import require
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.linear import Linear
from transformer.layers.position import ScoreMod
from transformer.loss import Projection
from transformer.mixers.context import Context
from transformer.models.config import MlpConfig, StackConfig, stack_flops
from transformer.models.embed import embed, make_positions, make_table, projection_of
from transformer.models.embedding_head import EmbeddingHead, EmbeddingHeadConfig
from transformer.models.heads import (
    AnswerHeadConfig,
    ChoiceHeadConfig,
    ClassificationHeadConfig,
    HeadConfig,
    MaskedHead,
    MaskedHeadConfig,
    PooledHead,
    PretrainingHeadConfig,
    ReplacedHead,
    ReplacedHeadConfig,
    TokenHead,
    TokensHeadConfig,
    linear_options,
)
from transformer.models.layer_stack import Chosen, LayerStack, StackOutput, make_norm
from transformer.models.sentence_heads import (
    DecomposableHead,
    DecomposableHeadConfig,
    StructuredHead,
    StructuredHeadConfig,
)
from transformer.randomness import split
from transformer.resume import Ask
from transformer.types import DTYPES, Array, Float, Int, Keys, ModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(StackConfig):
    """The defaults are BERT's base model (Devlin et al. 2018); `configs/` has RoBERTa's shape and a modern encoder's."""

    family: Literal["bert"] = "bert"
    """Kind of model."""
    vocab_size: int = 30_522
    """Number of token ids; at least the tokenizer's. A multiple of 128 runs faster on accelerators."""
    max_length: int = 512
    """Longest context, in tokens."""
    mlp: MlpConfig = DenseConfig(activation="gelu_exact")
    """The feed-forward part of each block: dense, or a mixture of experts. Heads over tokens use its activation."""
    norm_first: bool = False
    """Normalise before each sublayer, and once at the end (pre-norm); false: after each sum, as in the paper."""
    norm_eps: float = 1e-12
    """Added to the variance in a norm."""
    dropout: Ask[float] = 0.1
    """Drop rate after the embedding and after each sublayer."""
    attention_dropout: Ask[float] = 0.1
    """Drop rate of attention weights, in mixers that compute a softmax."""
    embedding_size: int | None = None
    """Width of the embeddings; a linear layer projects them to embed_dim (as in ELECTRA's small model). null: embed_dim."""
    token_types: int = 2
    """Number of sentence types that a token may belong to, each with its own embedding; 0: none, as in RoBERTa."""
    embed_norm: bool = True
    """Normalise the sum of the embeddings."""
    first_norm: bool = True
    """With norm_first, whether the first block normalises the input of its attention; false: embed_norm has already normalised it
    (ModernBERT)."""
    distinct_layers: int | None = None
    """How many blocks have parameters of their own; each is applied num_layers / distinct_layers times in a row (ALBERT has one;
    Lan et al. 2020). null: all of them."""
    head: HeadConfig = MaskedHeadConfig()
    """The head on the hidden states, by its kind: masked, pretraining, replaced, classification, tokens, answer, choice,
    embedding, structured or decomposable."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "token_types", self.token_types >= 0, "allowed: 0 or more")
        width = self.embedding_size
        require(self, "embedding_size", width is None or width >= 1, "allowed: 1 or more, or null")
        blocks = self.distinct_layers
        holds = blocks is None or (blocks >= 1 and self.num_layers % blocks == 0)
        require(self, "distinct_layers", holds, f"allowed: a divisor of num_layers ({self.num_layers}), or null")
        alike = not self.pattern and self.first_norm
        require(
            self,
            "distinct_layers",
            blocks is None or alike,
            "it needs first_norm and no pattern; allowed: null",
        )
        holds = self.first_norm or (self.norm_first and self.embed_norm)
        require(self, "first_norm", holds, "it needs norm_first and embed_norm; allowed: true")

    @property
    def has_encoder(self) -> bool:
        """Whether some of the layers see the tokens after a token."""
        return True

    @property
    def dim_of_embedding(self) -> int:
        """`embedding_size` with its default filled in."""
        return self.embed_dim if self.embedding_size is None else self.embedding_size


class Bert(nnx.Module):
    """An encoder-only Transformer with a head.

    Devlin et al. 2018; Liu et al. 2019 (RoBERTa); for the modern shape Warner et al. 2024 (rotary, GEGLU, alternating local
    and global attention, packed sequences).
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = c = config
        E = c.dim_of_embedding
        self.embed = make_table(c, c.vocab_size, dim=E, rngs=rngs)
        self.positions = make_positions(c, rngs, dim=E)
        self.types = make_table(c, c.token_types, dim=E, axis=None, rngs=rngs) if c.token_types else None
        self.embed_norm = make_norm(c, rngs, dim=E) if c.embed_norm else None
        options = linear_options(c.init_std, DTYPES[c.dtype], rngs)
        self.embedding_projection = make_embedding_projection(c, options)
        self.layers = LayerStack(c, causal=False, first_norm=c.first_norm, distinct=c.distinct_layers, rngs=rngs)
        self.masked_head: MaskedHead | None = None
        self.pooled_head: PooledHead | None = None
        self.token_head: TokenHead | None = None
        self.embedding_head: EmbeddingHead | None = None
        self.replaced_head: ReplacedHead | None = None
        self.structured_head: StructuredHead | None = None
        self.decomposable_head: DecomposableHead | None = None
        head = c.head
        if isinstance(head, StructuredHeadConfig):
            self.structured_head = nnx.data(StructuredHead(c.embed_dim, head, dropout_rate=c.dropout, **options))
        if isinstance(head, DecomposableHeadConfig):
            self.decomposable_head = nnx.data(DecomposableHead(c.embed_dim, head, **options))
        if isinstance(head, ReplacedHeadConfig):
            self.replaced_head = nnx.data(ReplacedHead(c.embed_dim, activation=c.mlp.activation, **options))
        if isinstance(head, MaskedHeadConfig | PretrainingHeadConfig):
            self.masked_head = nnx.data(make_masked_head(c, head.bias, options))
        if isinstance(head, PretrainingHeadConfig | ClassificationHeadConfig | ChoiceHeadConfig):
            classes = {"pretraining": 2, "classification": getattr(head, "classes", 1), "choice": 1}[head.kind]
            pooled = PooledHead(
                c.embed_dim, classes, pooling=head.pooling, dropout_rate=c.dropout, activation=head.activation,
                norm_epsilon=c.norm_eps if head.norm else None, use_bias=head.bias, **options,
            )  # fmt: skip
            self.pooled_head = nnx.data(pooled)
        if isinstance(head, EmbeddingHeadConfig):
            self.embedding_head = nnx.data(EmbeddingHead(c.embed_dim, head, **options))
        if isinstance(head, EmbeddingHeadConfig) and head.pooler is not None:
            pooled = PooledHead(c.embed_dim, None, dropout_rate=c.dropout, activation=head.pooler, **options)
            self.pooled_head = nnx.data(pooled)
        if isinstance(head, TokensHeadConfig | AnswerHeadConfig):
            scores = TokenHead(
                c.embed_dim, head.classes if isinstance(head, TokensHeadConfig) else 2, dropout_rate=c.dropout,
                activation=head.dense, norm_epsilon=c.norm_eps, use_bias=head.bias, **options,
            )  # fmt: skip
            self.token_head = nnx.data(scores)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        lengths_BM: Int[Array, "B M"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        mask: AttentionMask | None = None,
        score_mod: ScoreMod | None = None,
        key: Keys | None = None,
        return_weights: bool | Chosen = False,
    ) -> tuple[Float[Array, "B T D"], StackOutput]:
        """The last block's output, and the other outputs of the blocks; arguments as in `__call__`."""
        x_BTE, positions_BT, key = self.embedded(
            tokens_BT, positions_BT=positions_BT, token_types_BT=token_types_BT, key=key
        )
        x_BTD = x_BTE if self.embedding_projection is None else self.embedding_projection(x_BTE)
        context = Context(
            positions_BT=positions_BT, segments_BT=segments_BT, lengths_BM=lengths_BM, mask=mask, score_mod=score_mod
        )
        return self.layers(x_BTD, context, key=key, return_weights=return_weights)

    def embedded(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        key: Keys | None = None,
    ) -> tuple[Float[Array, "B T E"], Int[Array, "B T"], Keys | None]:
        """The sum of each token's embeddings, the tokens' positions, and a key for the layers; arguments as in `__call__`."""

        def with_types(x_BTD: Array) -> Array:
            if self.types is not None:
                # A model with one token type (RoBERTa) distinguishes the sentences of a pair by the tokens between them.
                known_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
                x_BTD += self.types(jnp.minimum(known_BT, self.config.token_types - 1))
            return x_BTD if self.embed_norm is None else self.embed_norm(x_BTD)

        return embed(
            self.config, self.embed, self.positions, tokens_BT, positions_BT=positions_BT, finish=with_types, key=key
        )

    def projection(self) -> Projection:
        """What turns the output's `hidden` into its `logits`, with a masked head."""
        assert self.masked_head is not None
        return projection_of(self.embed, None, bias_V=self.masked_head.bias[...])

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        lengths_BM: Int[Array, "B M"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        predicted_BK: Int[Array, "B K"] | None = None,
        mask: AttentionMask | None = None,
        score_mod: ScoreMod | None = None,
        key: Keys | None = None,
        return_weights: bool | Chosen = False,
    ) -> ModelOutput:
        """The head's scores.

        Args:
            positions_BT: the position of each token in its document; 0 to T-1 by default.
            segments_BT: which packed document a token belongs to; 0 is padding. Nothing is seen across documents. The heads
                of whole rows treat a row as one document.
            lengths_BM: size of each document of a row, if they come one after the other from its first position on, and only
                padding follows. The result is the same; kernels for packed documents need it.
            token_types_BT: which sentence of a pair a token belongs to; 0 by default.
            predicted_BK: the positions that the masked head scores, which saves the products for the others; all by default.
            mask: in addition to windows, documents and padding; for softmax attention.
            score_mod: a function of each score, `(score, row, head, query, key) -> score`, in softmax attention.
            key: enables dropout.
            return_weights: also return the attention weights, as in `GPT`.

        Returns:
            Float32 logits: [B, K, V] (masked, pretraining; K is T without `predicted_BK`), [B, C] (classification, choice,
            structured, decomposable), [B, T, C] (tokens, answer), [B, T] (replaced), or the vectors [B, O] (embedding).
            `pooled_logits` [B, 2] are the next sentence's (pretraining), or the pooler's vectors [B, D]
            (embedding with pooler). `hidden` [B, K, E] is what the output projection reads (masked, pretraining).

        Raises:
            ValueError: more tokens than learned positions, a layer or head that does not exist, or a decomposable head without
                token types.
        """
        head = self.config.head
        key, head_key = (None, None) if key is None else split(key, 2)
        hidden_BTD, output = self.hidden(
            tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, lengths_BM=lengths_BM,
            token_types_BT=token_types_BT, mask=mask, score_mod=score_mod, key=key, return_weights=return_weights,
        )  # fmt: skip
        valid_BT = None if segments_BT is None else segments_BT != 0
        pooled = None if self.pooled_head is None else self.pooled_head(hidden_BTD, valid_BT, key=head_key)
        added = transformed = None
        if self.structured_head is not None:
            logits, added = self.structured_head(hidden_BTD, valid_BT, key=head_key)
        elif self.decomposable_head is not None:
            logits = self.decomposable_head(hidden_BTD, token_types_BT, valid_BT)
        elif self.masked_head is not None:
            logits, transformed = self.masked_head(hidden_BTD, self.embed, predicted_BK)
        elif self.replaced_head is not None:
            logits = self.replaced_head(hidden_BTD)
        elif self.token_head is not None:
            logits = self.token_head(hidden_BTD, key=head_key)
        elif self.embedding_head is not None:
            logits = self.embedding_head(hidden_BTD, valid_BT)
        else:
            assert pooled is not None
            logits = pooled
        return ModelOutput(
            logits=logits,
            hidden=transformed,
            pooled_logits=pooled if head.kind in ("pretraining", "embedding") else None,
            weights=output.weights,
            added_loss=added,
            routers=output.routers,
        )


def make_embedding_projection(config: BertConfig, options: dict[str, Any]) -> Linear | None:
    """From the width of the embeddings to that of the layers; None if they are equal."""
    E, D = config.dim_of_embedding, config.embed_dim
    return None if E == D else Linear((E,), (D,), axes=(None, "embed"), **options)


def make_masked_head(config: BertConfig, use_bias: bool, options: dict[str, Any]) -> MaskedHead:
    """The head that predicts the masked tokens."""
    return MaskedHead(
        config.embed_dim, config.vocab_size, table_dim=config.dim_of_embedding, activation=config.mlp.activation,
        norm_epsilon=config.norm_eps, use_bias=use_bias, **options,
    )  # fmt: skip


def flops_per_token(config: BertConfig, length: int) -> float:
    """Floating-point operations of one token's forward pass at context `length`, counted as in `gpt.flops_per_token`; for a
    masked head as if 15% of the tokens were predicted."""
    c, E = config, config.dim_of_embedding
    projection = 0 if c.embed_dim == E else 2 * E * c.embed_dim
    head = 0.15 * 2 * E * (c.embed_dim + c.vocab_size) if c.head.kind in ("masked", "pretraining") else 0
    return projection + stack_flops(c, length, causal=False) + head
