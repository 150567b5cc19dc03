"""Transformers in JAX and Flax, from attention up: the library.

    from transformer import GPT, GPTConfig, AttentionMask, attend

It uses logical axis names and does not depend on a mesh or on training data. Its exports are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer.attention.dispatch import attend
    from transformer.attention.spec.mask import AttentionMask
    from transformer.generation.beam import BeamSearch
    from transformer.generation.generate import Generator
    from transformer.generation.sampling import Sampling
    from transformer.generation.translator import Translator
    from transformer.interpret.capture import AttentionMaps, attention_maps
    from transformer.mixers.context import Context
    from transformer.mixers.differential import DifferentialAttention, DifferentialConfig
    from transformer.mixers.disentangled import DisentangledAttention, DisentangledConfig
    from transformer.mixers.fast_weights import FastWeightAttention, FastWeightConfig
    from transformer.mixers.latent import LatentAttention, LatentConfig
    from transformer.mixers.linear import LinearAttention, LinearAttentionConfig
    from transformer.mixers.lstmn import LSTMN, LSTMNConfig
    from transformer.mixers.softmax import MultiHeadAttention, SoftmaxConfig
    from transformer.models.bert import Bert, BertConfig
    from transformer.models.electra import Electra, ElectraConfig
    from transformer.models.encoder_decoder import EncoderDecoder, T5Config, VaswaniConfig
    from transformer.models.families import make_model
    from transformer.models.gpt import GPT, GPTConfig
    from transformer.models.recurrent import RecurrentTranslator
    from transformer.models.recurrent_config import RecurrentConfig

_NAMES = {
    "attention.dispatch": ("attend",),
    "attention.spec.mask": ("AttentionMask",),
    "generation.beam": ("BeamSearch",),
    "generation.generate": ("Generator",),
    "generation.sampling": ("Sampling",),
    "generation.translator": ("Translator",),
    "interpret.capture": ("AttentionMaps", "attention_maps"),
    "mixers.context": ("Context",),
    "mixers.differential": ("DifferentialAttention", "DifferentialConfig"),
    "mixers.disentangled": ("DisentangledAttention", "DisentangledConfig"),
    "mixers.fast_weights": ("FastWeightAttention", "FastWeightConfig"),
    "mixers.latent": ("LatentAttention", "LatentConfig"),
    "mixers.linear": ("LinearAttention", "LinearAttentionConfig"),
    "mixers.lstmn": ("LSTMN", "LSTMNConfig"),
    "mixers.softmax": ("MultiHeadAttention", "SoftmaxConfig"),
    "models.bert": ("Bert", "BertConfig"),
    "models.electra": ("Electra", "ElectraConfig"),
    "models.encoder_decoder": ("EncoderDecoder", "T5Config", "VaswaniConfig"),
    "models.families": ("make_model",),
    "models.gpt": ("GPT", "GPTConfig"),
    "models.recurrent": ("RecurrentConfig", "RecurrentTranslator"),
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "GPT", "LSTMN", "AttentionMaps", "AttentionMask", "BeamSearch", "Bert", "BertConfig", "Context",
    "DifferentialAttention", "DifferentialConfig", "DisentangledAttention", "DisentangledConfig", "Electra",
    "ElectraConfig", "EncoderDecoder", "FastWeightAttention", "FastWeightConfig",
    "GPTConfig", "Generator", "LSTMNConfig", "LatentAttention", "LatentConfig", "LinearAttention",
    "LinearAttentionConfig", "MultiHeadAttention", "RecurrentConfig", "RecurrentTranslator", "Sampling", "SoftmaxConfig",
    "T5Config", "Translator", "VaswaniConfig", "attend", "attention_maps", "make_model",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'transformer' has no attribute {name!r}; there are {', '.join(__all__)}")
    return getattr(importlib.import_module(f"transformer.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
