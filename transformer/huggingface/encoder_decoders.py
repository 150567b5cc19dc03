"""T5 in its two versions, and Marian's translators."""

from __future__ import annotations

from typing import Any

from transformer.errors import UserError
from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.fields import ACTIVATIONS, GATED, UNTIED, HFConfigReader, dense_mlp, name_of, only_mixer
from transformer.huggingface.mapping import Row, Tables, TensorRule, linear, norm, table
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.position import RelativeConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.encoder_decoder import T5Config, VaswaniConfig

_T5_ACTIVATIONS = {
    "relu": "relu",
    "gated-gelu": "geglu",
    "gated-silu": "swiglu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
}


def _read_t5(theirs: HFConfigReader, head: Any) -> T5Config:
    # Version 5 of transformers writes that embeddings are tied even where they are not, and has a separate field for whether
    # the decoder's output is scaled; in earlier versions, both were one setting.
    said = theirs.flag("tie_word_embeddings", True)
    tied = said if UNTIED not in theirs else not theirs.get(UNTIED)
    scaled = theirs.get("model_type") != "mt5" and theirs.flag("scale_decoder_outputs", said)
    layers = theirs.layers("num_layers", 6)
    return T5Config(
        vocab_size=theirs.size("vocab_size", 32_128), max_length=theirs.size("n_positions", 512), num_layers=layers,
        num_decoder_layers=theirs.layers("num_decoder_layers", layers), embed_dim=theirs.size("d_model", 512),
        attention=SoftmaxConfig(
            num_heads=theirs.size("num_heads", 8), head_dim=theirs.size("d_kv", 64), bias=False, scale=1.0,
            position=RelativeConfig(
                num_buckets=theirs.size("relative_attention_num_buckets", 32),
                max_distance=theirs.size("relative_attention_max_distance", 128),
            ),
        ),
        mlp=DenseConfig(
            dim=theirs.size("d_ff", 2048), activation=theirs.one_of("feed_forward_proj", _T5_ACTIVATIONS, "relu"),
            bias=False,
        ),
        norm_eps=theirs.number("layer_norm_epsilon", 1e-6),
        **theirs.dropouts("dropout_rate", "dropout_rate"), tie_embeddings=tied,
        scale_logits=scaled, start_token=theirs.token("decoder_start_token_id", theirs.token("pad_token_id", 0)),
    )  # fmt: skip


def _t5_fields(c: T5Config) -> dict[str, Any]:
    mixer, mlp = only_mixer(c), dense_mlp(c)
    if not isinstance(position := mixer.position, RelativeConfig):
        raise UserError(f"attention.position of kind {position.kind!r}")
    return {
        "vocab_size": c.vocab_size, "n_positions": c.max_length, "num_layers": c.num_layers,
        "num_decoder_layers": c.decoder_layers, "d_model": c.embed_dim, "num_heads": mixer.num_heads,
        "d_kv": mixer.head_dim or c.embed_dim // mixer.num_heads, "d_ff": mlp.width(c.embed_dim),
        "feed_forward_proj": name_of(_T5_ACTIVATIONS, mlp.activation), "layer_norm_epsilon": c.norm_eps,
        "relative_attention_num_buckets": position.num_buckets, "relative_attention_max_distance": position.max_distance,
        "dropout_rate": c.dropout,
        "tie_word_embeddings": c.tie_embeddings, "scale_decoder_outputs": c.scale_logits,
        "is_encoder_decoder": True, "decoder_start_token_id": c.start_token, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def _t5_tables(c: T5Config) -> Tables:
    gated = name_of(GATED, dense_mlp(c).activation) is not None
    parts: list[Any] = [table("shared", "embed")]
    for side in ("encoder", "decoder"):
        blocks, layer = f"{side}.blocks", f"{side}.block.{{}}.layer"
        last = 2 if side == "decoder" else 1
        attentions = [("attention", f"{layer}.0.SelfAttention"), ("cross", f"{layer}.1.EncDecAttention")]
        for ours, theirs in attentions[:last]:
            for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
                num_in = 2 if short == "o" else 1
                parts.append(linear(f"{theirs}.{short}", f"{blocks}.{ours}.{name}", use_bias=False, num_in=num_in))
            number = theirs[len(layer) + 1]
            parts.append(norm(f"{layer}.{number}.layer_norm", f"{blocks}.{ours}_norm", use_bias=False))
        dense = f"{layer}.{last}.DenseReluDense"
        maps = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
        parts += [
            linear(f"{dense}.{one}", f"{blocks}.feed_forward.{name}", use_bias=False) for one, name in maps.items()
        ]
        parts.append(norm(f"{layer}.{last}.layer_norm", f"{blocks}.feed_forward_norm", use_bias=False))
        # All layers share the first layer's bias.
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
        parts.append(table(first, f"{side}.relative"))
        parts.append(norm(f"{side}.final_layer_norm", f"{side}.final_norm", use_bias=False))
    copies = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}
    if c.tie_embeddings:
        copies["lm_head.weight"] = "shared.weight"
    else:
        parts.append(linear("lm_head", "head", use_bias=False))
    # Written by early versions, never used.
    unused = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
    return Tables(rules_of(*parts), copies, unused)


T5 = Architecture(
    model_type="t5", family=T5Config,
    classes={"T5ForConditionalGeneration": "", "T5WithLMHeadModel": ""}, read=_read_t5, write=_t5_fields,
    tables=_t5_tables, output="lm_head.weight", tied_to="shared.weight",
)  # fmt: skip
MT5 = Architecture(
    model_type="mt5",
    family=T5Config,
    classes={"MT5ForConditionalGeneration": ""},
    read=_read_t5,
    write=_t5_fields,
    tables=_t5_tables,
    output="lm_head.weight",
    tied_to="shared.weight",
)


def _read_marian(theirs: HFConfigReader, head: Any) -> VaswaniConfig:
    theirs.must("share_encoder_decoder_embeddings", [True], True)
    theirs.must("tie_word_embeddings", [True], True)
    for field in ("normalize_before", "normalize_embedding", "add_final_layer_norm", "static_position_embeddings"):
        theirs.must(field, [field == "static_position_embeddings"], field == "static_position_embeddings")
    vocab = theirs.size("vocab_size", 58_101)
    theirs.must("decoder_vocab_size", [vocab], vocab)
    heads, width = theirs.size("encoder_attention_heads", 16), theirs.size("encoder_ffn_dim", 4096)
    theirs.must("decoder_attention_heads", [heads], 16)
    theirs.must("decoder_ffn_dim", [width], 4096)
    return VaswaniConfig(
        vocab_size=vocab, max_length=theirs.size("max_position_embeddings", 1024),
        num_layers=theirs.layers("encoder_layers", 12), num_decoder_layers=theirs.layers("decoder_layers", 12),
        embed_dim=theirs.size("d_model", 1024), attention=SoftmaxConfig(num_heads=heads),
        mlp=DenseConfig(dim=width, activation=theirs.one_of("activation_function", ACTIVATIONS, "gelu")),
        position_embedding="sinusoidal_halves", norm_eps=1e-5,
        **theirs.dropouts("dropout", "attention_dropout", "activation_dropout"),
        scale_embeddings=theirs.flag("scale_embedding", False), init_std=theirs.number("init_std", 0.02),
        init="normal", output_bias=True, start_token=theirs.token("decoder_start_token_id", vocab - 1),
    )  # fmt: skip


def _marian_fields(c: VaswaniConfig) -> dict[str, Any]:
    mixer, mlp = only_mixer(c), dense_mlp(c)
    width = mlp.width(c.embed_dim)
    return {
        "vocab_size": c.vocab_size, "decoder_vocab_size": c.vocab_size, "max_position_embeddings": c.max_length,
        "encoder_layers": c.num_layers, "decoder_layers": c.decoder_layers, "d_model": c.embed_dim,
        "encoder_attention_heads": mixer.num_heads, "decoder_attention_heads": mixer.num_heads,
        "encoder_ffn_dim": width, "decoder_ffn_dim": width,
        "activation_function": name_of(ACTIVATIONS, mlp.activation), "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "scale_embedding": c.scale_embeddings, "init_std": c.init_std, "share_encoder_decoder_embeddings": True,
        "is_encoder_decoder": True, "decoder_start_token_id": c.start_token, "pad_token_id": c.start_token,
    }  # fmt: skip


def _marian_tables(c: VaswaniConfig) -> Tables:
    parts: list[Any] = [table("model.shared", "embed")]
    for side in ("encoder", "decoder"):
        blocks, layer = f"{side}.blocks", f"model.{side}.layers.{{}}"
        attentions = [("attention", "self_attn"), ("cross", "encoder_attn")][: 2 if side == "decoder" else 1]
        for ours, theirs in attentions:
            for short, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
                num_in = 2 if name == "out" else 1
                parts.append(linear(f"{layer}.{theirs}.{short}", f"{blocks}.{ours}.{name}", num_in=num_in))
            parts.append(norm(f"{layer}.{theirs}_layer_norm", f"{blocks}.{ours}_norm"))
        parts += [
            linear(f"{layer}.{one}", f"{blocks}.feed_forward.{name}") for one, name in (("fc1", "up"), ("fc2", "down"))
        ]
        parts.append(norm(f"{layer}.final_layer_norm", f"{blocks}.feed_forward_norm"))
    parts.append(TensorRule("final_logits_bias", ("output_bias",), Row()))
    names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    buffers = ("model.*.embed_positions.weight",)
    return Tables(rules_of(*parts), dict.fromkeys(names, "model.shared.weight"), buffers)


MARIAN = Architecture(
    model_type="marian",
    family=VaswaniConfig,
    classes={"MarianMTModel": ""},
    read=_read_marian,
    write=_marian_fields,
    tables=_marian_tables,
)
