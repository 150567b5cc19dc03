"""Gemma, Gemma 2, and the text model of Gemma 3: models of the family gpt here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.fields import (
    FULL,
    GATED,
    SLIDING,
    HFConfigReader,
    dense_mlp,
    layer_types,
    name_of,
    repeated,
    rotary_fields,
    rotary_of,
    softmax_of,
)
from transformer.huggingface.llama import attention_tables, common_fields, gated_tables
from transformer.huggingface.mapping import BLOCKS, ShiftedGain, Tables, TensorRule, output_head, table
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.position import RotaryConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig

_ACTIVATIONS = {"gelu_pytorch_tanh": "geglu", **GATED}
_LEGACY = _ACTIVATIONS | {"gelu": "geglu"}
"""In a config of the first Gemma, gelu means the tanh approximation, as in transformers."""


def _reader(kind: str) -> Callable[[HFConfigReader, Any], GPTConfig]:
    is_first, is_third = kind == "gemma", kind == "gemma3_text"

    def read(theirs: HFConfigReader, head: Any) -> GPTConfig:
        theirs.must("use_bidirectional_attention", [False], False)
        num_layers = theirs.layers("num_hidden_layers", 28 if is_first else 26)
        num_heads, head_dim = theirs.size("num_attention_heads", 16 if is_first else 8), theirs.size("head_dim", 256)
        scalar = float(head_dim) if is_first else theirs.number("query_pre_attn_scalar", 256.0)
        if scalar <= 0:
            theirs.wrong(f"query_pre_attn_scalar: got {scalar}; allowed: above 0")
            scalar = float(head_dim)
        full = SoftmaxConfig(
            num_heads=num_heads, head_dim=head_dim,
            num_kv_heads=theirs.size("num_key_value_heads", 16 if is_first else 4),
            bias=theirs.flag("attention_bias", False), qk_norm=is_third,
            scale=None if scalar == head_dim else scalar**-0.5,
            soft_cap=None if is_first else theirs.optional_number("attn_logit_softcapping", None if is_third else 50.0),
            position=_positions(theirs, FULL, is_third),
        )  # fmt: skip
        kinds = [FULL] * num_layers if is_first else _kinds(theirs, num_layers, 6 if is_third else 2)
        layers = {FULL: full}
        if SLIDING in kinds:
            near, width = _positions(theirs, SLIDING, is_third), theirs.size("sliding_window", 4096, least=2)
            layers[SLIDING] = dataclasses.replace(full, window=width - 1, position=near)
        mixers = [layers[one] for one in kinds]
        name, activations = ("hidden_act", _LEGACY) if is_first else ("hidden_activation", _ACTIVATIONS)
        return GPTConfig(
            vocab_size=theirs.size("vocab_size", 262_208 if is_third else 256_000),
            max_length=theirs.size("max_position_embeddings", 131_072 if is_third else 8192),
            num_layers=num_layers, embed_dim=theirs.size("hidden_size", 3072 if is_first else 2304),
            attention=mixers[0], pattern=repeated(mixers),
            mlp=DenseConfig(
                dim=theirs.size("intermediate_size", 24_576 if is_first else 9216),
                activation=theirs.one_of(name, activations, "gelu_pytorch_tanh"), bias=False,
            ),
            norm="rms_norm", norm_eps=theirs.number("rms_norm_eps", 1e-6), norm_outputs=not is_first,
            attention_dropout=theirs.number("attention_dropout", 0.0),
            init_std=theirs.number("initializer_range", 0.02), scale_embeddings=True,
            logit_soft_cap=None if is_first else theirs.optional_number(
                "final_logit_softcapping", None if is_third else 30.0
            ),
            tie_embeddings=theirs.flag("tie_word_embeddings", True),
        )  # fmt: skip

    return read


def _positions(theirs: HFConfigReader, section: str, is_third: bool) -> RotaryConfig:
    """Rotary positions; Gemma 3 has its own for layers with a window, which rope_scaling does not change."""
    if not is_third:
        return theirs.rotary(theta=10_000.0)
    if section == FULL:
        return theirs.rotary(theta=1e6, section=section)
    return theirs.rotary(theta=10_000.0, section=section, name="rope_local_base_freq", scaled=False)


def _kinds(theirs: HFConfigReader, num_layers: int, every: int) -> list[str]:
    """The kind of each layer; without a list, every n-th layer has no window."""
    kinds = theirs.texts("layer_types")
    if not kinds:
        every = theirs.size("sliding_window_pattern", every)
        return [SLIDING if (layer + 1) % every else FULL for layer in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {FULL, SLIDING}:
        theirs.wrong(
            f"layer_types: got {len(kinds)} of {', '.join(sorted(set(kinds)))}; supported: {FULL} or {SLIDING} for each layer"
        )
        return [FULL] * num_layers
    return kinds


def _writer(kind: str) -> Callable[[GPTConfig], dict[str, Any]]:
    def write(c: GPTConfig) -> dict[str, Any]:
        mixers, mlp = [softmax_of(mixer) for mixer in c.mixers()], dense_mlp(c)
        full = next((mixer for mixer in mixers if mixer.window is None), mixers[0])
        near = next((mixer for mixer in mixers if mixer.window is not None), None)
        fields = common_fields(c, full) | {
            "intermediate_size": mlp.width(c.embed_dim), "attention_bias": full.bias,
            "hidden_act" if kind == "gemma" else "hidden_activation": name_of(_ACTIVATIONS, mlp.activation),
        }  # fmt: skip
        rotary = rotary_of(full)
        if kind == "gemma3_text":
            local = rotary if near is None else rotary_of(near)
            fields["rope_parameters"] = {FULL: rotary_fields(rotary), SLIDING: rotary_fields(local)}
        else:
            fields |= {"rope_parameters": rotary_fields(rotary), "rope_theta": rotary.theta}
        if kind != "gemma":
            scale = fields["head_dim"] ** -0.5 if full.scale is None else full.scale
            fields |= {
                "layer_types": layer_types(mixers),
                "sliding_window": 4096 if near is None or near.window is None else near.window + 1,
                "query_pre_attn_scalar": _whole(scale**-2), "attn_logit_softcapping": full.soft_cap,
                "final_logit_softcapping": c.logit_soft_cap,
            }  # fmt: skip
        return fields

    return write


def _whole(number: float) -> float | int:
    """A whole number where rounding has made it another one; transformers takes no other."""
    return round(number) if abs(number - round(number)) < 1e-6 * number else number


def _tables(kind: str) -> Callable[[GPTConfig], Tables]:
    def tables(c: GPTConfig) -> Tables:
        layer, first = "model.layers.{}", softmax_of(c.mixers()[0])
        head, copies = output_head(c.tie_embeddings, "lm_head", "model.embed_tokens.weight")
        gains = {"input_layernorm": "attention_norm"}
        if kind == "gemma":
            gains["post_attention_layernorm"] = "feed_forward_norm"
        else:
            gains |= {
                "post_attention_layernorm": "attention_output_norm", "pre_feedforward_layernorm": "feed_forward_norm",
                "post_feedforward_layernorm": "feed_forward_output_norm",
            }  # fmt: skip
        if first.qk_norm:
            gains |= {
                f"self_attn.{short}_norm": f"attention.{name}_norm" for short, name in (("q", "query"), ("k", "key"))
            }
        rules = rules_of(
            table("model.embed_tokens", "embed"),
            (_gain(f"{layer}.{theirs}", f"{BLOCKS}.{ours}") for theirs, ours in gains.items()),
            attention_tables(layer, first),
            gated_tables(layer, use_bias=False),
            _gain("model.norm", "layers.final_norm"),
            head,
        )
        return Tables(rules, copies, ("*.rotary_emb.inv_freq",))

    return tables


def _gain(theirs: str, ours: str) -> TensorRule:
    return TensorRule(f"{theirs}.weight", (f"{ours}.scale",), ShiftedGain())


def _gemma(kind: str, name: str, body: str) -> Architecture:
    return Architecture(
        model_type=kind, family=GPTConfig, classes={f"{name}ForCausalLM": "", body: ""}, bare=(body,), prefix="model",
        heads=("lm_head.",), read=_reader(kind), write=_writer(kind), tables=_tables(kind),
    )  # fmt: skip


GEMMA, GEMMA2 = _gemma("gemma", "Gemma", "GemmaModel"), _gemma("gemma2", "Gemma2", "Gemma2Model")
GEMMA3 = _gemma("gemma3_text", "Gemma3", "Gemma3TextModel")
