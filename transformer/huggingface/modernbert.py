"""ModernBERT: rotary positions, gated feed-forward layers, and attention that is local in most layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.encoders import class_fields, classes_of, head_of
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
from transformer.huggingface.mapping import BLOCKS, TableLayout, Tables, TensorRule, Vector, fused, linear, norm
from transformer.layers.feed_forward import DenseConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.heads import EmbeddingHeadConfig, MaskedHeadConfig, ReplacedHeadConfig
from transformer.models.sentence_heads import DecomposableHeadConfig, StructuredHeadConfig

_THETAS = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}

_HEADS = {
    "masked": ("masked_head", "dense"), "classification": ("pooled_head", "pooler"), "choice": ("pooled_head", "pooler"),
    "tokens": ("token_head", "dense"), "answer": ("token_head", "dense"),
}  # fmt: skip
"""Head → our module, and the layer in it that all of their names begin with."""


def _read(theirs: HFConfigReader, head: Any) -> BertConfig:
    theirs.must("tie_word_embeddings", [True], True)
    has_bias = theirs.flag("norm_bias", False)
    if head != "embedding":
        theirs.must("classifier_bias", [has_bias], False)
        theirs.must("classifier_activation", [theirs.get("hidden_activation", "gelu")], "gelu")
    if head == "masked":
        theirs.must("decoder_bias", [True], True)
    elif head != "embedding":
        theirs.must("classifier_activation", ["gelu"], "gelu")
    layers = theirs.layers("num_hidden_layers", 22)
    every = _every(theirs, layers)
    attention = {}
    for section, (name, default) in _THETAS.items():
        rotary = theirs.rotary(theta=theirs.number(name, default), section=section)
        if rotary.scaling.kind != "none":
            theirs.wrong(f"rope_parameters.{section}.rope_type: got {rotary.scaling.kind!r}; supported: default")
        attention[section] = SoftmaxConfig(
            num_heads=theirs.size("num_attention_heads", 12),
            bias=theirs.flag("attention_bias", False),
            position=rotary,
        )
    near = dataclasses.replace(attention[SLIDING], window=max(theirs.size("local_attention", 128) // 2, 1))
    pattern = repeated([near if layer % every else attention[FULL] for layer in range(layers)])
    pooled: dict[str, Any] = {"activation": "gelu_exact", "norm": True, "bias": has_bias}
    pooled["pooling"] = theirs.one_of("classifier_pooling", {"cls": "cls", "mean": "mean"}, "cls")
    made: Any = MaskedHeadConfig(bias=has_bias)
    if head != "masked":
        made = head_of(head, **classes_of(theirs, head), token={"dense": "gelu_exact", "bias": has_bias}, **pooled)
    return BertConfig(
        vocab_size=theirs.size("vocab_size", 50368), max_length=theirs.size("max_position_embeddings", 8192),
        num_layers=layers, embed_dim=theirs.size("hidden_size", 768), attention=attention[FULL],
        pattern=pattern, norm_first=True, first_norm=False, token_types=0,
        mlp=DenseConfig(
            dim=theirs.size("intermediate_size", 1152), activation=theirs.one_of("hidden_activation", GATED, "gelu"),
            bias=theirs.flag("mlp_bias", False),
        ),
        norm_eps=theirs.number("norm_eps", 1e-5), norm_bias=has_bias,
        **theirs.dropouts("mlp_dropout", "attention_dropout", "embedding_dropout", "classifier_dropout", default=0.0),
        init_std=theirs.number("initializer_range", 0.02), head=made,
    )  # fmt: skip


def _every(theirs: HFConfigReader, layers: int) -> int:
    """The n for which every n-th layer is global."""
    types = theirs.texts("layer_types")
    if not types:
        return theirs.size("global_attn_every_n_layers", 3)
    kinds = [kind == FULL for kind in types]
    every = next((index for index in range(1, len(kinds)) if kinds[index]), max(len(kinds), 1))
    if kinds != [index % every == 0 for index in range(layers)]:
        theirs.wrong("layer_types: supported: full_attention in every n-th layer, from the first on")
    return every


def _write(c: BertConfig) -> dict[str, Any]:
    mixers, mlp = [softmax_of(mixer) for mixer in c.mixers()], dense_mlp(c)
    full, near = mixers[0], next((mixer for mixer in mixers if mixer.window is not None), None)
    kinds = layer_types(mixers)
    every = next((index for index, kind in enumerate(kinds) if index and kind == FULL), len(kinds))
    thetas = {FULL: full, SLIDING: full if near is None else near}
    ropes = {name: rotary_of(mixer) for name, mixer in thetas.items()}
    has_bias = getattr(c.head, "bias", c.has_norm_bias)
    return {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim, "num_attention_heads": full.num_heads, "intermediate_size": mlp.width(c.embed_dim),
        "hidden_activation": name_of(GATED, mlp.activation), "norm_eps": c.norm_eps, "norm_bias": c.has_norm_bias,
        "attention_bias": full.bias, "mlp_bias": mlp.bias, "classifier_bias": has_bias,
        "layer_types": kinds, "global_attn_every_n_layers": every,
        "local_attention": 128 if near is None else 2 * (near.window or 1),
        "rope_parameters": {name: rotary_fields(rope) for name, rope in ropes.items()},
        "global_rope_theta": ropes[FULL].theta, "local_rope_theta": ropes[SLIDING].theta,
        "mlp_dropout": c.dropout, "attention_dropout": c.attention_dropout, "embedding_dropout": c.dropout,
        "classifier_dropout": c.dropout, "initializer_range": c.init_std, **class_fields(c),
        "classifier_pooling": getattr(c.head, "pooling", "cls"),
    }  # fmt: skip


def _tables(c: BertConfig) -> Tables:
    of_norms, of_attention, of_mlp = c.has_norm_bias, softmax_of(c.mixers()[0]).bias, dense_mlp(c).bias
    layer = "model.layers.{}"
    attention = f"{BLOCKS}.attention"
    heads: list[TensorRule] = []
    copies = {}
    without = EmbeddingHeadConfig | ReplacedHeadConfig | StructuredHeadConfig | DecomposableHeadConfig
    if not isinstance(c.head, without):
        head, dense = _HEADS[c.head.kind]
        heads += linear("head.dense", f"{head}.{dense}", use_bias=c.head.bias)
        heads += norm("head.norm", f"{head}.norm", use_bias=c.head.bias)
        if c.head.kind == "masked":
            heads += [TensorRule("decoder.bias", ("masked_head.bias",), Vector())]
            copies = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
        else:
            heads += linear("classifier", f"{head}.out")
    rules = rules_of(
        TensorRule("model.embeddings.tok_embeddings.weight", ("embed.table",), TableLayout()),
        norm("model.embeddings.norm", "embed_norm", use_bias=of_norms),
        norm(f"{layer}.attn_norm", f"{BLOCKS}.attention_norm", use_bias=of_norms, first=1),
        fused(
            f"{layer}.attn.Wqkv",
            [f"{attention}.{name}" for name in ("query", "key", "value")],
            use_bias=of_attention,
        ),
        linear(f"{layer}.attn.Wo", f"{attention}.out", use_bias=of_attention, num_in=2),
        norm(f"{layer}.mlp_norm", f"{BLOCKS}.feed_forward_norm", use_bias=of_norms),
        # Their implementation applies the activation to the first part.
        fused(
            f"{layer}.mlp.Wi",
            [f"{BLOCKS}.feed_forward.{name}" for name in ("gate", "up")],
            use_bias=of_mlp,
        ),
        linear(f"{layer}.mlp.Wo", f"{BLOCKS}.feed_forward.down", use_bias=of_mlp),
        norm("model.final_norm", "layers.final_norm", use_bias=of_norms),
        heads,
    )
    return Tables(rules, copies, ("head.*", "decoder.*"))


MODERNBERT = Architecture(
    model_type="modernbert", family=BertConfig,
    classes={
        "ModernBertForMaskedLM": "masked", "ModernBertForSequenceClassification": "classification",
        "ModernBertForTokenClassification": "tokens", "ModernBertForQuestionAnswering": "answer",
        "ModernBertForMultipleChoice": "choice", "ModernBertModel": "embedding",
    },
    bare=("ModernBertModel",), prefix="model", heads=("head.", "decoder.", "classifier."),
    read=_read, write=_write, tables=_tables,
)  # fmt: skip
