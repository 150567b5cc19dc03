"""Heads that attend: a classifier of one text by several weighted means of it, and one that compares the words of a pair.

B batch, T position, D embed, A alignment features, R hops, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.alignment.decomposable import DecomposableAttention
from transformer.alignment.structured import StructuredAttention, redundancy_penalty
from transformer.attention.spec.mask import AttentionMask
from transformer.errors import require
from transformer.layers.linear import Linear
from transformer.models.labelled import LabelledHeadConfig
from transformer.randomness import dropout
from transformer.types import Array, Bool, Float, Int, Keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredHeadConfig(LabelledHeadConfig):
    """Structured self-attention (Lin et al. 2017) followed by a classifier."""

    kind: Literal["structured"] = "structured"
    """The class of a row, from several weighted means of its tokens."""
    hops: int = 4
    """Number of weighted means."""
    dim: int | None = None
    """Width of the layer that scores the tokens. null: embed_dim."""
    penalty: float = 0.1
    """Weight of the penalty |A Aᵀ - 1|², which keeps the hops apart, in the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "hops", self.hops >= 1, "allowed: 1 or more")
        require(self, "dim", self.dim is None or self.dim >= 1, "allowed: 1 or more, or null")
        require(self, "penalty", self.penalty >= 0, "allowed: 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecomposableHeadConfig(LabelledHeadConfig):
    """Decomposable attention (Parikh et al. 2016) between the two texts of a row."""

    kind: Literal["decomposable"] = "decomposable"
    """The class of a pair, from its words compared with what they attend to in the other text."""
    dim: int | None = None
    """Width of the layers that attend, compare and aggregate. null: embed_dim."""
    intra: bool = False
    """Each text attends to itself first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "dim", self.dim is None or self.dim >= 1, "allowed: 1 or more, or null")


class StructuredHead(nnx.Module):
    """R weighted means of a row's tokens, a ReLU layer, dropout, and a linear layer to C classes.

    Args:
        options: kernel_init, dtype and rngs of the linear layers.
    """

    def __init__(self, embed_dim: int, config: StructuredHeadConfig, *, dropout_rate: float, **options: Any) -> None:
        self.config, self.dropout_rate = config, dropout_rate
        self.attend = StructuredAttention(embed_dim, config.dim or embed_dim, config.hops, **options)
        self.hidden = Linear((config.hops, embed_dim), (embed_dim,), axes=(None, "embed", None), **options)
        self.out = Linear((embed_dim,), (config.classes,), axes=("embed", None), **options)

    def __call__(
        self,
        hidden_BTD: Float[Array, "B T D"],
        valid_BT: Bool[Array, "B T"] | None = None,
        *,
        key: Keys | None = None,
    ) -> tuple[Float[Array, "B C"], Float[Array, ""]]:
        """Float32 logits, and the penalty to add to the loss; `key` enables dropout."""
        with jax.named_scope("structured_head"):
            mask = None if valid_BT is None else AttentionMask.padding(valid_BT)
            views_BRD, weights_BRT = self.attend(hidden_BTD, mask)
            x_BD = dropout(jax.nn.relu(self.hidden(views_BRD)), self.dropout_rate, key)
            added = self.config.penalty * redundancy_penalty(weights_BRT).mean()
            return self.out.logits(x_BD).astype(jnp.float32), added


class DecomposableHead(nnx.Module):
    """`DecomposableAttention` between the tokens of type 0 and those of type 1 of each row.

    Args:
        options: kernel_init, dtype and rngs of the linear layers.
    """

    def __init__(self, embed_dim: int, config: DecomposableHeadConfig, **options: Any) -> None:
        self.compare = DecomposableAttention(
            embed_dim, config.dim or embed_dim, config.classes, use_intra=config.intra, **options
        )

    def __call__(
        self,
        hidden_BTD: Float[Array, "B T D"],
        token_types_BT: Int[Array, "B T"] | None,
        valid_BT: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B C"]:
        """Float32 logits.

        Raises:
            ValueError: no token types.
        """
        if token_types_BT is None:
            raise ValueError(
                "token_types_BT: got None; a decomposable head compares tokens of type 0 with those of type 1"
            )
        real_BT = jnp.ones(token_types_BT.shape, bool) if valid_BT is None else valid_BT
        logits_BC, _, _ = self.compare(
            hidden_BTD,
            hidden_BTD,
            valid_a_BT=real_BT & (token_types_BT == 0),
            valid_b_BS=real_BT & (token_types_BT == 1),
        )
        return logits_BC.astype(jnp.float32)
