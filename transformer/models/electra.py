"""ELECTRA: an encoder that learns to detect tokens replaced by a small masked language model, which is trained with it.

B batch, T position, K predicted position, E table, D embed, V vocab.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

from transformer.errors import ConfigError, require
from transformer.mixers.context import Context
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models import bert
from transformer.models.bert import Bert, BertConfig, make_embedding_projection, make_masked_head
from transformer.models.heads import HeadConfig, MaskedHeadConfig, ReplacedHeadConfig, linear_options
from transformer.models.layer_stack import LayerStack
from transformer.types import DTYPES, Array, Float, Int, Keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElectraConfig(BertConfig):
    """The encoder's shape is BERT's; the defaults are ELECTRA's base model (Clark et al. 2020, table 6)."""

    family: Literal["electra"] = "electra"  # type: ignore[assignment]
    """Kind of model."""
    head: HeadConfig = ReplacedHeadConfig()
    """Predicts which tokens were replaced."""
    generator_size: float = 1 / 3
    """Width of the generator, its heads and its feed-forward layer, as a fraction of the encoder's."""
    replaced_weight: float = 50.0
    """Weight of the encoder's loss relative to the generator's (λ)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "generator_size", 0 < self.generator_size <= 1, "allowed: above 0, at most 1")
        require(self, "replaced_weight", self.replaced_weight > 0, "allowed: above 0")
        require(self, "head", isinstance(self.head, ReplacedHeadConfig), "allowed: {kind: replaced}")
        for mixer in (self.attention, *self.pattern):
            if not isinstance(mixer, SoftmaxConfig):
                allowed = "a generator has fewer heads of the same kind; allowed: softmax"
                raise ConfigError(type(self), "attention.kind", mixer.kind, allowed)

    @property
    def generator(self) -> BertConfig:
        """The generator's config: the same number of layers, and heads of the same width, but fewer of them."""

        def narrow(mixer: SoftmaxConfig) -> SoftmaxConfig:
            heads = max(1, round(mixer.num_heads * self.generator_size))
            head_dim = mixer.head_dim or self.embed_dim // mixer.num_heads
            return dataclasses.replace(mixer, num_heads=heads, num_kv_heads=None, head_dim=head_dim)

        attention, *pattern = (narrow(mixer) for mixer in (self.attention, *self.pattern))  # type: ignore[arg-type]
        assert attention.head_dim is not None
        own = {field.name for field in dataclasses.fields(BertConfig)} - {"family", "head"}
        width = max(1, round(self.mlp.width(self.embed_dim) * self.generator_size))
        changed = {
            "attention": attention, "pattern": tuple(pattern), "embed_dim": attention.num_heads * attention.head_dim,
            "mlp": dataclasses.replace(self.mlp, dim=width), "embedding_size": self.dim_of_embedding,
        }  # fmt: skip
        return BertConfig(**{name: getattr(self, name) for name in own} | changed, head=MaskedHeadConfig())


class Electra(Bert):
    """The encoder, and a generator that shares its embeddings (Clark et al. 2020, section 3.1).

    The encoder's parameters have the same paths as in `Bert`; fine-tuning needs only those.
    """

    def __init__(self, config: ElectraConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        c = config.generator
        options = linear_options(c.init_std, DTYPES[c.dtype], rngs)
        self.generator_projection = make_embedding_projection(c, options)
        self.generator = LayerStack(c, causal=False, first_norm=c.first_norm, rngs=rngs)
        self.generator_head = make_masked_head(c, True, options)

    def generator_logits(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        lengths_BM: Int[Array, "B M"] | None = None,
        predicted_BK: Int[Array, "B K"] | None = None,
        key: Keys | None = None,
    ) -> Float[Array, "B K V"]:
        """The generator's scores of the tokens that were masked, float32; arguments as for `Bert`."""
        with jax.named_scope("generator"):
            x_BTE, positions_BT, key = self.embedded(tokens_BT, positions_BT=positions_BT, key=key)
            x_BTD = x_BTE if self.generator_projection is None else self.generator_projection(x_BTE)
            context = Context(positions_BT=positions_BT, segments_BT=segments_BT, lengths_BM=lengths_BM)
            hidden_BTD, _ = self.generator(x_BTD, context, key=key)
            return self.generator_head(hidden_BTD, self.embed, predicted_BK)[0]


def flops_per_token(config: ElectraConfig, length: int) -> float:
    """FLOPs of both networks' forward passes for one token at context `length`, counted as in `gpt.flops_per_token`."""
    head = 2 * config.embed_dim * (config.embed_dim + 1)
    return bert.flops_per_token(config, length) + bert.flops_per_token(config.generator, length) + head
