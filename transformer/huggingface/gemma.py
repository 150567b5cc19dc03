"""Gemma, Gemma 2, and the text model of Gemma 3: models of the family gpt here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.encoders import BLOCKS
from transformer.huggingface.fields import (
    GATED,
    HFConfigReader,
    dense_mlp,
    name_of,
    rotary_fields,
    rotary_of,
    softmax_of,
)
from transformer.huggingface.mapping import ShiftedGain, Tables, TensorRule, linear, output_head, table
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.position import RotaryConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig

_ATTENTION, _FEED_FORWARD = f"{BLOCKS}.attention", f"{BLOCKS}.feed_forward"
_FULL, _SLIDING = "full_attention", "sliding_attention"
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
            position=_positions(theirs, _FULL, is_third),
        )  # fmt: skip
        kinds = [_FULL] * num_layers if is_first else _kinds(theirs, num_layers, 6 if is_third else 2)
        layers = {_FULL: full}
        if _SLIDING in kinds:
            near, width = _positions(theirs, _SLIDING, is_third), theirs.size("sliding_window", 4096, least=2)
            layers[_SLIDING] = dataclasses.replace(full, window=width - 1, position=near)
        turn = _turn([layers[one] for one in kinds])
        name, activations = ("hidden_act", _LEGACY) if is_first else ("hidden_activation", _ACTIVATIONS)
        return GPTConfig(
            vocab_size=theirs.size("vocab_size", 262_208 if is_third else 256_000),
            max_length=theirs.size("max_position_embeddings", 131_072 if is_third else 8192),
            num_layers=num_layers, embed_dim=theirs.size("hidden_size", 3072 if is_first else 2304),
            attention=turn[0], pattern=turn if len(turn) > 1 else (),
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
    if section == _FULL:
        return theirs.rotary(theta=1e6, section=section)
    return theirs.rotary(theta=10_000.0, section=section, name="rope_local_base_freq", scaled=False)


def _kinds(theirs: HFConfigReader, num_layers: int, every: int) -> list[str]:
    """The kind of each layer; without a list, every n-th layer has no window."""
    kinds = theirs.texts("layer_types")
    if not kinds:
        every = theirs.size("sliding_window_pattern", every)
        return [_SLIDING if (layer + 1) % every else _FULL for layer in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {_FULL, _SLIDING}:
        theirs.wrong(
            f"layer_types: got {len(kinds)} of {', '.join(sorted(set(kinds)))}; supported: {_FULL} or {_SLIDING} for each layer"
        )
        return [_FULL] * num_layers
    return kinds


def _turn(mixers: Sequence[SoftmaxConfig]) -> tuple[SoftmaxConfig, ...]:
    """The shortest sequence that the layers repeat."""
    lengths = (size for size in range(1, len(mixers) + 1) if len(mixers) % size == 0)
    size = next(size for size in lengths if all(one == mixers[at % size] for at, one in enumerate(mixers)))
    return tuple(mixers[:size])


def _writer(kind: str) -> Callable[[GPTConfig], dict[str, Any]]:
    def write(c: GPTConfig) -> dict[str, Any]:
        mixers, mlp = [softmax_of(mixer) for mixer in c.mixers()], dense_mlp(c)
        full = next((mixer for mixer in mixers if mixer.window is None), mixers[0])
        near = next((mixer for mixer in mixers if mixer.window is not None), None)
        head_dim = full.head_dim or c.embed_dim // full.num_heads
        fields: dict[str, Any] = {
            "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "num_hidden_layers": c.num_layers,
            "hidden_size": c.embed_dim, "num_attention_heads": full.num_heads,
            "num_key_value_heads": full.num_kv_heads or full.num_heads, "head_dim": head_dim,
            "intermediate_size": mlp.width(c.embed_dim), "rms_norm_eps": c.norm_eps,
            "attention_bias": full.bias, "attention_dropout": c.attention_dropout, "initializer_range": c.init_std,
            "tie_word_embeddings": c.tie_embeddings,
            "hidden_act" if kind == "gemma" else "hidden_activation": name_of(_ACTIVATIONS, mlp.activation),
        }  # fmt: skip
        rotary = rotary_of(full)
        if kind == "gemma3_text":
            local = rotary if near is None else rotary_of(near)
            fields["rope_parameters"] = {_FULL: rotary_fields(rotary), _SLIDING: rotary_fields(local)}
        else:
            fields |= {"rope_parameters": rotary_fields(rotary), "rope_theta": rotary.theta}
        if kind != "gemma":
            scale = head_dim**-0.5 if full.scale is None else full.scale
            fields |= {
                "layer_types": [_FULL if mixer.window is None else _SLIDING for mixer in mixers],
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
            *(
                linear(f"{layer}.self_attn.{name[0]}_proj", f"{_ATTENTION}.{name}", use_bias=first.has_qkv_bias)
                for name in ("query", "key", "value")
            ),
            linear(f"{layer}.self_attn.o_proj", f"{_ATTENTION}.out", use_bias=first.bias, num_in=2),
            *(
                linear(f"{layer}.mlp.{name}_proj", f"{_FEED_FORWARD}.{name}", use_bias=False)
                for name in ("gate", "up", "down")
            ),
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
