"""GPT-2 and GPT-NeoX, models of the family gpt here."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.fields import (
    ACTIVATIONS,
    HFConfigReader,
    dense_mlp,
    name_of,
    only_mixer,
    rotary_fields,
    rotary_of,
)
from transformer.huggingface.mapping import (
    ATTENTION,
    BLOCKS,
    FEED_FORWARD,
    QKV,
    ByHead,
    Tables,
    TensorRule,
    fused,
    linear,
    norm,
    output_head,
    table,
)
from transformer.layers.feed_forward import DenseConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig


def _read_gpt2(theirs: HFConfigReader, head: Any) -> GPTConfig:
    theirs.must("scale_attn_weights", [True], True)
    theirs.must("scale_attn_by_inverse_layer_idx", [False], False)
    theirs.must("add_cross_attention", [False], False)
    dim = theirs.size("n_embd", 768)
    return GPTConfig(
        vocab_size=theirs.size("vocab_size", 50257), max_length=theirs.size("n_positions", 1024),
        num_layers=theirs.layers("n_layer", 12), embed_dim=dim,
        attention=SoftmaxConfig(num_heads=theirs.size("n_head", 12)),
        mlp=DenseConfig(
            dim=theirs.size("n_inner", 4 * dim), activation=theirs.one_of("activation_function", ACTIVATIONS, "gelu_new")
        ),
        norm_eps=theirs.number("layer_norm_epsilon", 1e-5),
        **theirs.dropouts("resid_pdrop", "attn_pdrop", "embd_pdrop"),
        init_std=theirs.number("initializer_range", 0.02),
        tie_embeddings=theirs.flag("tie_word_embeddings", True),
    )  # fmt: skip


def _gpt2_fields(c: GPTConfig) -> dict[str, Any]:
    mixer, mlp = only_mixer(c), dense_mlp(c)
    return {
        "vocab_size": c.vocab_size, "n_positions": c.max_length, "n_layer": c.num_layers, "n_embd": c.embed_dim,
        "n_head": mixer.num_heads, "n_inner": mlp.width(c.embed_dim),
        "activation_function": name_of(ACTIVATIONS, mlp.activation), "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.attention_dropout,
        "initializer_range": c.init_std, "tie_word_embeddings": c.tie_embeddings,
    }  # fmt: skip


def _gpt2_tables(c: GPTConfig) -> Tables:
    layer = "transformer.h.{}"
    head, copies = output_head(c.tie_embeddings, "lm_head", "transformer.wte.weight")
    rules = rules_of(
        table("transformer.wte", "embed"),
        table("transformer.wpe", "positions"),
        norm(f"{layer}.ln_1", f"{BLOCKS}.attention_norm"),
        fused(f"{layer}.attn.c_attn", QKV, use_bias=True, transposed=False),
        linear(f"{layer}.attn.c_proj", f"{ATTENTION}.out", num_in=2, transposed=False),
        norm(f"{layer}.ln_2", f"{BLOCKS}.feed_forward_norm"),
        linear(f"{layer}.mlp.c_fc", f"{FEED_FORWARD}.up", transposed=False),
        linear(f"{layer}.mlp.c_proj", f"{FEED_FORWARD}.down", transposed=False),
        norm("transformer.ln_f", "layers.final_norm"),
        head,
    )
    return Tables(rules, copies, ("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"))


GPT2 = Architecture(
    model_type="gpt2", family=GPTConfig, classes={"GPT2LMHeadModel": "", "GPT2Model": ""},
    bare=("GPT2Model",), prefix="transformer", heads=("lm_head.",),
    read=_read_gpt2, write=_gpt2_fields, tables=_gpt2_tables,
)  # fmt: skip


def _read_neox(theirs: HFConfigReader, head: Any) -> GPTConfig:
    rotary = theirs.rotary(theta=theirs.number("rotary_emb_base", 10_000.0))
    written = "partial_rotary_factor" in theirs.section("rope_parameters")
    fraction = rotary.fraction if written else theirs.number("rotary_pct", 0.25)
    return GPTConfig(
        vocab_size=theirs.size("vocab_size", 50432), max_length=theirs.size("max_position_embeddings", 2048),
        num_layers=theirs.layers("num_hidden_layers", 44), embed_dim=theirs.size("hidden_size", 6144),
        attention=SoftmaxConfig(
            num_heads=theirs.size("num_attention_heads", 64), bias=theirs.flag("attention_bias", True),
            position=dataclasses.replace(rotary, fraction=fraction),
        ),
        mlp=DenseConfig(
            dim=theirs.size("intermediate_size", 24576), activation=theirs.one_of("hidden_act", ACTIVATIONS, "gelu")
        ),
        norm_eps=theirs.number("layer_norm_eps", 1e-5),
        **theirs.dropouts("hidden_dropout", "attention_dropout", default=0.0),
        init_std=theirs.number("initializer_range", 0.02),
        parallel_residual=theirs.flag("use_parallel_residual", True),
        tie_embeddings=theirs.flag("tie_word_embeddings", False),
    )  # fmt: skip


def _neox_fields(c: GPTConfig) -> dict[str, Any]:
    mixer, mlp = only_mixer(c), dense_mlp(c)
    rotary = rotary_of(mixer)
    return {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim, "num_attention_heads": mixer.num_heads, "intermediate_size": mlp.width(c.embed_dim),
        "hidden_act": name_of(ACTIVATIONS, mlp.activation), "layer_norm_eps": c.norm_eps, "hidden_dropout": c.dropout,
        "attention_dropout": c.attention_dropout, "initializer_range": c.init_std, "attention_bias": mixer.bias,
        "use_parallel_residual": c.parallel_residual, "tie_word_embeddings": c.tie_embeddings,
        "rotary_pct": rotary.fraction, "rotary_emb_base": rotary.theta,
        "rope_parameters": rotary_fields(rotary) | {"partial_rotary_factor": rotary.fraction},
    }  # fmt: skip


def _neox_tables(c: GPTConfig) -> Tables:
    layer, has_bias = "gpt_neox.layers.{}", only_mixer(c).bias
    head, copies = output_head(c.tie_embeddings, "embed_out", "gpt_neox.embed_in.weight")
    qkv = [TensorRule(f"{layer}.attention.query_key_value.weight", tuple(f"{one}.kernel" for one in QKV), ByHead())]
    if has_bias:
        qkv.append(TensorRule(f"{layer}.attention.query_key_value.bias", tuple(f"{one}.bias" for one in QKV), ByHead()))
    rules = rules_of(
        table("gpt_neox.embed_in", "embed"),
        norm(f"{layer}.input_layernorm", f"{BLOCKS}.attention_norm"),
        qkv,
        linear(f"{layer}.attention.dense", f"{ATTENTION}.out", use_bias=has_bias, num_in=2),
        norm(f"{layer}.post_attention_layernorm", f"{BLOCKS}.feed_forward_norm"),
        linear(f"{layer}.mlp.dense_h_to_4h", f"{FEED_FORWARD}.up"),
        linear(f"{layer}.mlp.dense_4h_to_h", f"{FEED_FORWARD}.down"),
        norm("gpt_neox.final_layer_norm", "layers.final_norm"),
        head,
    )
    buffers = ("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq")
    return Tables(rules, copies, buffers)


GPT_NEOX = Architecture(
    model_type="gpt_neox", family=GPTConfig, classes={"GPTNeoXForCausalLM": "", "GPTNeoXModel": ""}, bare=("GPTNeoXModel",),
    prefix="gpt_neox", heads=("embed_out.",), renamed={"lm_head.weight": "embed_out.weight"},
    read=_read_neox, write=_neox_fields, tables=_neox_tables,
)  # fmt: skip
