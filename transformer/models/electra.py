"""ELECTRA: an encoder that learns to tell which tokens a small masked language model, trained beside it, put in.

B batch, T position, K predicted position, E table, D embed, V vocab.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

from transformer.errors import require
from transformer.models import bert
from transformer.models.bert import Bert, BertConfig, make_masked_head, make_widen
from transformer.models.heads import linear_options
from transformer.models.layer_stack import LayerStack
from transformer.types import DTYPES, Array, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElectraConfig(BertConfig):
    """The encoder's shape is BERT's; the defaults are ELECTRA's base model (Clark et al. 2020, table 6)."""

    family: Literal["electra"] = "electra"  # type: ignore[assignment]
    """Kind of model."""
    head: Literal["replaced"] = "replaced"
    """What stands on the encoder: which tokens were replaced."""
    generator_size: float = 1 / 3
    """Width of the generator, its heads and its feed-forward layer, as parts of the encoder's."""
    replaced_weight: float = 50.0
    """Weight of the encoder's loss beside the generator's (λ)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "generator_size", 0 < self.generator_size <= 1, "allowed: above 0, at most 1")
        require(self, "replaced_weight", self.replaced_weight > 0, "allowed: above 0")

    @property
    def generator(self) -> BertConfig:
        """The generator's shape: as many layers, and heads as wide, but fewer of them."""
        heads = max(1, round(self.num_heads * self.generator_size))
        own = {field.name for field in dataclasses.fields(BertConfig)} - {"family", "head"}
        shared = {name: getattr(self, name) for name in own}
        return BertConfig(
            **shared
            | {
                "num_heads": heads,
                "num_kv_heads": None,
                "head_dim": self.dim_of_head,
                "embed_dim": heads * self.dim_of_head,
                "mlp_dim": max(1, round(self.dim_of_mlp * self.generator_size)),
                "table_dim": self.dim_of_table,
            }
        )


class Electra(Bert):
    """The encoder, and a generator that shares its embeddings (Clark et al. 2020, section 3.1).

    The encoder's parameters have the places that they have in `Bert`; what comes after pretraining needs those alone.
    """

    def __init__(self, config: ElectraConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        c = config.generator
        options = linear_options(c.init_std, DTYPES[c.dtype], rngs)
        self.generator_widen = make_widen(c, options)
        self.generator = LayerStack(c, causal=False, rngs=rngs)
        self.generator_head = make_masked_head(c, options)

    def generator_logits(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        predicted_BK: Int[Array, "B K"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B K V"]:
        """The generator's scores of the tokens that were masked, float32; arguments as of `Bert`."""
        with jax.named_scope("generator"):
            x_BTE, positions_BT, key = self.embedded(tokens_BT, positions_BT=positions_BT, key=key)
            x_BTD = x_BTE if self.generator_widen is None else self.generator_widen(x_BTE)
            valid_BT = None if segments_BT is None else segments_BT != 0
            hidden_BTD, _ = self.generator(
                x_BTD, self.masks(segments_BT), positions_BT=positions_BT, valid_BT=valid_BT, key=key
            )
            return self.generator_head(hidden_BTD, self.embed, predicted_BK)


def flops_per_token(config: ElectraConfig, length: int) -> float:
    """Of both networks' forward passes for one token at context `length`, counted as in `gpt.flops_per_token`."""
    head = 2 * config.embed_dim * (config.embed_dim + 1)
    return bert.flops_per_token(config, length) + bert.flops_per_token(config.generator, length) + head
