"""Heads on an encoder: from its hidden states to the scores of a task.

B batch, T position, D embed, V vocab, C classes, Q choices of a question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.errors import Config, require
from transformer.layers.embedding import Embedding
from transformer.layers.feed_forward import ACTIVATIONS
from transformer.layers.linear import Linear
from transformer.layers.norm import LayerNorm
from transformer.models.embedding_head import EmbeddingHeadConfig, PoolerActivation, Pooling, pool, unit
from transformer.models.labelled import LabelledHeadConfig
from transformer.models.sentence_heads import DecomposableHeadConfig, StructuredHeadConfig
from transformer.precision import einsum
from transformer.randomness import dropout
from transformer.sharding import constrain, with_axes
from transformer.types import Array, Bool, DTypeLike, Float, Int, Keys

POOLERS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": ACTIVATIONS["relu"][0],
    "gelu_exact": ACTIVATIONS["gelu_exact"][0],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedHeadConfig(Config):
    """Scores of masked tokens."""

    kind: Literal["masked"] = "masked"
    """Predicts which token was masked."""
    bias: bool = True
    """Biases in the transform and its norm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplacedHeadConfig(Config):
    """ELECTRA's head."""

    kind: Literal["replaced"] = "replaced"
    """Predicts which tokens were replaced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledHeadConfig(Config):
    """What the heads of whole rows share: a layer on a pooled vector."""

    pooling: Pooling = "cls"
    """The vector of a row: that of its first token (cls), the mean of its tokens, or another one, as for the embedding head."""
    activation: PoolerActivation = "tanh"
    """Activation after the layer on that vector (the pooler)."""
    norm: bool = False
    """Normalise after the activation (ModernBERT)."""
    bias: bool = True
    """Biases in the layer and the norm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingHeadConfig(PooledHeadConfig):
    """BERT's two heads of pretraining."""

    kind: Literal["pretraining"] = "pretraining"
    """Predicts which token was masked, and whether the second sentence follows the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationHeadConfig(PooledHeadConfig, LabelledHeadConfig):
    """Scores of a row's classes, or, with num_labels 1, a number."""

    kind: Literal["classification"] = "classification"
    """The class of a row, or a number."""
    multi_label: bool = False
    """A row may have none, one or several of the classes (objective multi_label_classification): a sigmoid of each score, in the
    place of a softmax over them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceHeadConfig(PooledHeadConfig):
    """A score for each choice of a question."""

    kind: Literal["choice"] = "choice"
    """Predicts which of several texts follows another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenHeadConfig(Config):
    """What the heads of single tokens share."""

    dense: PoolerActivation | None = None
    """Activation of a normalised layer before the scores (ModernBERT). null: no such layer."""
    bias: bool = True
    """Biases in that layer and its norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "bias", self.bias or self.dense is not None, "it has no effect without dense; allowed: true")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensHeadConfig(TokenHeadConfig, LabelledHeadConfig):
    """Scores of the classes of each token."""

    kind: Literal["tokens"] = "tokens"
    """The class of each token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerHeadConfig(TokenHeadConfig):
    """Scores of the start and the end of an answer."""

    kind: Literal["answer"] = "answer"
    """Predicts where an answer starts and where it ends."""


HeadConfig = (
    MaskedHeadConfig
    | PretrainingHeadConfig
    | ReplacedHeadConfig
    | ClassificationHeadConfig
    | TokensHeadConfig
    | AnswerHeadConfig
    | ChoiceHeadConfig
    | EmbeddingHeadConfig
    | StructuredHeadConfig
    | DecomposableHeadConfig
)
"""The heads that an encoder may have."""
CLASSES = (ClassificationHeadConfig, StructuredHeadConfig, DecomposableHeadConfig)
"""The heads that score classes for a whole row."""


class MaskedHead(nnx.Module):
    """Scores of the token at each position: a transform, then the token embedding as the output projection, and a bias.

    Devlin et al. 2018, with the transform of their released code: norm(f(x W + b)).

    Args:
        table_dim: width of the token embedding.
        activation: a name of `ACTIVATIONS`; only its function is used.
        use_bias: in the transform; the bias over the vocabulary always exists.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        *,
        table_dim: int,
        activation: str,
        norm_epsilon: float,
        use_bias: bool = True,
        **options: Any,
    ) -> None:
        self.function = ACTIVATIONS[activation][0]
        self.dense = Linear((embed_dim,), (table_dim,), axes=("embed", None), use_bias=use_bias, **options)
        self.norm = LayerNorm(table_dim, epsilon=norm_epsilon, use_bias=use_bias, rngs=options["rngs"])
        bias = with_axes(nnx.initializers.zeros, "vocab")
        self.bias = nnx.Param(bias(options["rngs"].params(), (vocab_size,), jnp.float32))

    def __call__(
        self,
        hidden_BTD: Float[Array, "B T D"],
        embed: Embedding,
        predicted_BK: Int[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B K V"], Float[Array, "B K E"]]:
        """Float32 logits over the rows of `embed`, and the transform's output, from which they are computed, at the positions
        `predicted_BK` (by default at all of them: K is T then)."""
        with jax.named_scope("masked_head"):
            if predicted_BK is not None:
                hidden_BTD = jnp.take_along_axis(hidden_BTD, predicted_BK[..., None], axis=1)
            x_BKE = self.norm(self.function(self.dense(hidden_BTD)))
            logits = embed.attend(x_BKE).astype(jnp.float32) + self.bias[...]
            return constrain(logits, "batch", "seq" if predicted_BK is None else None, "vocab"), x_BKE


class ReplacedHead(nnx.Module):
    """Scores of whether each token was replaced by another one (Clark et al. 2020, equation 2).

    A transform as wide as the hidden states, and one number per token.
    """

    def __init__(self, embed_dim: int, *, activation: str, **options: Any) -> None:
        self.function = ACTIVATIONS[activation][0]
        self.dense = Linear((embed_dim,), (embed_dim,), axes=("embed", None), **options)
        self.out = Linear((embed_dim,), (1,), axes=("embed", None), **options)

    def __call__(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Float32 logits; above 0: replaced."""
        with jax.named_scope("replaced_head"):
            return self.out.logits(self.function(self.dense(hidden_BTD)))[..., 0].astype(jnp.float32)


class PooledHead(nnx.Module):
    """Scores of a whole row: classes, a number (one class), or a choice among rows.

    The pooled vector through a layer of its own (Devlin et al. 2018's pooler), dropout, and a linear layer.

    Args:
        num_classes: None omits the last linear layer: the output is then that of the pooler.
        activation: of the pooler, a name of `POOLERS`.
        norm_epsilon: of a norm after the activation (ModernBERT); None: no norm.
        use_bias: in pooler and norm.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int | None,
        *,
        pooling: Pooling = "cls",
        dropout_rate: float = 0.0,
        activation: PoolerActivation = "tanh",
        norm_epsilon: float | None = None,
        use_bias: bool = True,
        **options: Any,
    ) -> None:
        self.pooling: Pooling = pooling
        self.dropout_rate = dropout_rate
        self.function = POOLERS[activation]
        self.pooler = Linear((embed_dim,), (embed_dim,), axes=("embed", None), use_bias=use_bias, **options)
        self.norm: LayerNorm | None = None
        self.out: Linear | None = None
        if norm_epsilon is not None:
            self.norm = nnx.data(LayerNorm(embed_dim, epsilon=norm_epsilon, use_bias=use_bias, rngs=options["rngs"]))
        if num_classes is not None:
            self.out = nnx.data(Linear((embed_dim,), (num_classes,), axes=("embed", None), **options))

    def __call__(
        self,
        hidden_BTD: Float[Array, "B T D"],
        valid_BT: Bool[Array, "B T"] | None = None,
        *,
        key: Keys | None = None,
    ) -> Float[Array, "B C"]:
        """Float32 logits, or the pooled vectors [B, D]; `key` enables dropout."""
        with jax.named_scope("pooled_head"):
            pooled_BD = self.function(self.pooler(pool(hidden_BTD, valid_BT, pooling=self.pooling)))
            pooled_BD = pooled_BD if self.norm is None else self.norm(pooled_BD)
            pooled_BD = dropout(pooled_BD, self.dropout_rate, key)
            return (pooled_BD if self.out is None else self.out.logits(pooled_BD)).astype(jnp.float32)


class TokenHead(nnx.Module):
    """Scores of each token: classes; or, with two, where an answer starts and where it ends (Devlin et al. 2018, section 4.2).

    Args:
        activation: of a layer before the scores, a name of `POOLERS`; a norm follows it (ModernBERT). None: no such
            layer.
        norm_epsilon: of that norm.
        use_bias: in layer and norm.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        dropout_rate: float = 0.0,
        activation: PoolerActivation | None = None,
        norm_epsilon: float = 1e-5,
        use_bias: bool = True,
        **options: Any,
    ) -> None:
        self.dropout_rate = dropout_rate
        self.function = None if activation is None else POOLERS[activation]
        self.dense: Linear | None = None
        self.norm: LayerNorm | None = None
        if activation is not None:
            dense = Linear((embed_dim,), (embed_dim,), axes=("embed", None), use_bias=use_bias, **options)
            self.dense = nnx.data(dense)
            self.norm = nnx.data(LayerNorm(embed_dim, epsilon=norm_epsilon, use_bias=use_bias, rngs=options["rngs"]))
        self.out = Linear((embed_dim,), (num_classes,), axes=("embed", None), **options)

    def __call__(self, hidden_BTD: Float[Array, "B T D"], *, key: Keys | None = None) -> Float[Array, "B T C"]:
        """Float32 logits; `key` enables dropout."""
        with jax.named_scope("token_head"):
            if self.function is not None and self.dense is not None and self.norm is not None:
                hidden_BTD = self.norm(self.function(self.dense(hidden_BTD)))
            return self.out.logits(dropout(hidden_BTD, self.dropout_rate, key)).astype(jnp.float32)


def choices(logits_R1: Float[Array, "R 1"], num_choices: int) -> Float[Array, "Q {num_choices}"]:
    """Scores of single rows as scores of questions, whose choices are consecutive rows (Devlin et al. 2018, section 4.4)."""
    return logits_R1.reshape(-1, num_choices)


def best_span(
    logits_BT2: Float[Array, "B T 2"], allowed_BT: Bool[Array, "B T"], *, max_tokens: int = 30
) -> tuple[Int[Array, " B"], Int[Array, " B"], Float[Array, " B"]]:
    """The answer with the highest start + end score among spans of allowed tokens of at most `max_tokens`: first, last, score."""
    start_BT, end_BT = jnp.moveaxis(jnp.where(allowed_BT[..., None], logits_BT2, -jnp.inf), -1, 0)
    T = start_BT.shape[1]
    place = jnp.arange(T)
    length = place[None, :] - place[:, None]
    fits_TT = (length >= 0) & (length < max_tokens)
    scores_BTT = jnp.where(fits_TT, start_BT[:, :, None] + end_BT[:, None, :], -jnp.inf)
    best_B = scores_BTT.reshape(-1, T * T).argmax(-1)
    return best_B // T, best_B % T, scores_BTT.reshape(-1, T * T).max(-1)


def contrastive_logits(
    a_BD: Float[Array, "B D"],
    b_BD: Float[Array, "B D"],
    valid_B: Bool[Array, " B"] | None = None,
    *,
    temperature: float = 0.05,
) -> Float[Array, "B B"]:
    """Scores of each a for every b of the batch, by their cosines; the matching pairs are on the diagonal.

    In-batch negatives (van den Oord et al. 2018, equation 4; Gao et al. 2021). Over devices the batch is the global one.

    Args:
        valid_B: rows that are not padding; padding rows are not used as negatives. All by default.
        temperature: divides the cosines.
    """
    logits_BB = einsum("AD,BD->AB", unit(a_BD), unit(b_BD)) / temperature
    # A finite number: with -inf, the gradient of a padding row's own likelihood would not be finite.
    return logits_BB if valid_B is None else jnp.where(valid_B, logits_BB, -1e9)


def linear_options(init_std: float, dtype: DTypeLike, rngs: nnx.Rngs) -> dict[str, Any]:
    """The options that the heads' linear layers share."""
    return {"kernel_init": nnx.initializers.normal(init_std), "dtype": dtype, "rngs": rngs}
