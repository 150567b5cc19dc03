"""Phi-3: Llama with fused projections, and rotary positions with two sets of factors for a longer context (Abdin et al. 2024)."""

from __future__ import annotations

from typing import Any

from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.fields import (
    GATED,
    HFConfigReader,
    dense_mlp,
    name_of,
    only_mixer,
    rotary_fields,
    rotary_of,
)
from transformer.huggingface.llama import common_fields
from transformer.huggingface.mapping import (
    ATTENTION,
    BLOCKS,
    FEED_FORWARD,
    QKV,
    Tables,
    fused,
    linear,
    norm,
    output_head,
    table,
)
from transformer.layers.feed_forward import DenseConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig

_OLD_NAMES = {"su": "longrope", "yarn": "longrope"}
"""What LongRoPE is called in Phi-3's first config files."""


def _read(theirs: HFConfigReader, head: Any) -> GPTConfig:
    num_heads, dim = theirs.size("num_attention_heads", 32), theirs.size("hidden_size", 3072)
    window = None
    if "sliding_window" in theirs:
        # Their number includes the token itself.
        window = theirs.size("sliding_window", least=2) - 1
    return GPTConfig(
        vocab_size=theirs.size("vocab_size", 32_064), max_length=theirs.size("max_position_embeddings", 4096),
        num_layers=theirs.layers("num_hidden_layers", 32), embed_dim=dim,
        attention=SoftmaxConfig(
            num_heads=num_heads, head_dim=theirs.size("head_dim", max(dim // num_heads, 1)),
            num_kv_heads=theirs.size("num_key_value_heads", num_heads), bias=False, window=window,
            position=theirs.rotary(theta=10_000.0, kinds=_OLD_NAMES, original=4096),
        ),
        mlp=DenseConfig(
            dim=theirs.size("intermediate_size", 8192), activation=theirs.one_of("hidden_act", GATED, "silu"), bias=False
        ),
        norm="rms_norm", norm_eps=theirs.number("rms_norm_eps", 1e-5),
        **theirs.dropouts("resid_pdrop", "attention_dropout", "embd_pdrop", default=0.0),
        init_std=theirs.number("initializer_range", 0.02), tie_embeddings=theirs.flag("tie_word_embeddings", False),
    )  # fmt: skip


def _write(c: GPTConfig) -> dict[str, Any]:
    mixer, mlp = only_mixer(c), dense_mlp(c)
    rotary = rotary_of(mixer)
    return common_fields(c, mixer) | {
        "intermediate_size": mlp.width(c.embed_dim), "hidden_act": name_of(GATED, mlp.activation),
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout,
        "sliding_window": None if mixer.window is None else mixer.window + 1,
        "rope_parameters": rotary_fields(rotary), "rope_theta": rotary.theta,
        "original_max_position_embeddings": rotary.scaling.original_length or c.max_length,
    }  # fmt: skip


def _tables(c: GPTConfig) -> Tables:
    layer = "model.layers.{}"
    head, copies = output_head(c.tie_embeddings, "lm_head", "model.embed_tokens.weight")
    rules = rules_of(
        table("model.embed_tokens", "embed"),
        norm(f"{layer}.input_layernorm", f"{BLOCKS}.attention_norm", use_bias=False),
        fused(f"{layer}.self_attn.qkv_proj", QKV, use_bias=False),
        linear(f"{layer}.self_attn.o_proj", f"{ATTENTION}.out", use_bias=False, num_in=2),
        norm(f"{layer}.post_attention_layernorm", f"{BLOCKS}.feed_forward_norm", use_bias=False),
        fused(f"{layer}.mlp.gate_up_proj", [f"{FEED_FORWARD}.{name}" for name in ("gate", "up")], use_bias=False),
        linear(f"{layer}.mlp.down_proj", f"{FEED_FORWARD}.down", use_bias=False),
        norm("model.norm", "layers.final_norm", use_bias=False),
        head,
    )
    return Tables(rules, copies, ("*.rotary_emb.inv_freq",))


PHI3 = Architecture(
    model_type="phi3", family=GPTConfig, classes={"Phi3ForCausalLM": "", "Phi3Model": ""}, bare=("Phi3Model",),
    prefix="model", heads=("lm_head.",), read=_read, write=_write, tables=_tables,
)  # fmt: skip
