"""One interface for all model families: the config selects the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from transformer.models import bert, electra, encoder_decoder, gpt, recurrent
from transformer.models.bert import Bert, BertConfig
from transformer.models.electra import Electra, ElectraConfig
from transformer.models.encoder_decoder import EncoderDecoder, T5Config, VaswaniConfig
from transformer.models.gpt import GPT, GPTConfig
from transformer.models.recurrent import RecurrentTranslator
from transformer.models.recurrent_config import RecurrentConfig

ModelConfig = GPTConfig | BertConfig | ElectraConfig | VaswaniConfig | T5Config | RecurrentConfig
Model = GPT | Bert | Electra | EncoderDecoder | RecurrentTranslator


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of one family name share."""

    config: type
    model: Callable[..., Any]
    flops_per_token: Callable[[Any, int], float]


FAMILIES: dict[str, Family] = {
    "gpt": Family(GPTConfig, GPT, gpt.flops_per_token),
    "bert": Family(BertConfig, Bert, bert.flops_per_token),
    "electra": Family(ElectraConfig, Electra, electra.flops_per_token),
    "vaswani": Family(VaswaniConfig, EncoderDecoder, encoder_decoder.flops_per_token),
    "t5": Family(T5Config, EncoderDecoder, encoder_decoder.flops_per_token),
    "recurrent": Family(RecurrentConfig, RecurrentTranslator, recurrent.flops_per_token),
}


def make_model(config: ModelConfig, rngs: nnx.Rngs) -> Model:
    """The model for a config, with fresh parameters."""
    return FAMILIES[config.family].model(config, rngs=rngs)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Floating-point operations of one (target) token's forward pass; a training step takes three times that."""
    return FAMILIES[config.family].flops_per_token(config, length)


def described_parameters(config: ModelConfig) -> nnx.State:
    """Shapes and types of a model's parameters, without creating the model."""
    # A state is mutable, so each caller gets its own copy.
    return jax.tree.map(lambda leaf: leaf, _described(config))


@functools.lru_cache
def _described(config: ModelConfig) -> nnx.State:
    return jax.eval_shape(lambda: nnx.state(make_model(config, nnx.Rngs(0)), nnx.Param))


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, from the shapes of the model itself."""
    return sum(leaf.size for leaf in jax.tree.leaves(described_parameters(config)))


def inherit(model: dict[str, Any]) -> dict[str, Any]:
    """A model's plain data in which the mixers of a pattern inherit the fields that they omit from `attention`, or from its
    default in the family, if they are of the same kind."""
    name = model.get("family", "gpt")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    given, pattern = model.get("attention", {}), model.get("pattern", [])
    usual = getattr(family.config, "attention", None) if family is not None else None
    if not pattern or usual is None or not isinstance(given, dict) or not isinstance(pattern, list):
        return model
    base = {"kind": usual.kind, **given}
    if base["kind"] == usual.kind:
        base = dataclasses.asdict(usual) | base
    filled = [
        {**base, **mixer} if isinstance(mixer, dict) and mixer.get("kind", base["kind"]) == base["kind"] else mixer
        for mixer in pattern
    ]
    return model | {"pattern": filled}
