"""ModernBERT: rotary positions, gated feed-forward layers, and attention that is local in most layers."""

from __future__ import annotations

from typing import Any

from transformer.hf.architecture import Architecture, rules_of
from transformer.hf.encoders import BLOCKS, labels_of
from transformer.hf.fields import GATED, Theirs, name_of, rotary_fields
from transformer.hf.mapping import Rule, Tables, Vector, fused, linear, norm
from transformer.hf.mapping import Table as TableLayout
from transformer.models.bert import BertConfig

_PERIODS = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}

_HEADS = {
    "masked": ("masked_head", "dense"), "classification": ("pooled_head", "pooler"), "choice": ("pooled_head", "pooler"),
    "tokens": ("token_head", "dense"), "answer": ("token_head", "dense"),
}  # fmt: skip
"""Head → our module, and the layer in it that all of theirs begin with."""


def _read(theirs: Theirs, head: Any) -> BertConfig:
    theirs.must("tie_word_embeddings", [True], True)
    has_bias = bool(theirs.get("norm_bias", False))
    if head != "embedding":
        theirs.must("classifier_bias", [has_bias], False)
        theirs.must("classifier_activation", [theirs.get("hidden_activation", "gelu")], "gelu")
    if head == "masked":
        theirs.must("decoder_bias", [True], True)
    elif head != "embedding":
        theirs.must("classifier_activation", ["gelu"], "gelu")
    layers = theirs.size("num_hidden_layers", 22)
    every = _every(theirs, layers)
    periods = {}
    for section, (name, default) in _PERIODS.items():
        rotary = theirs.rotary(period=float(theirs.get(name, default)), section=section)
        if rotary["rotary_scaling"].kind != "none":
            theirs.wrong(
                f"rope_parameters.{section}.rope_type: got {rotary['rotary_scaling'].kind!r}; supported: default"
            )
        periods[section] = rotary["rotary_period"]
    window = theirs.size("local_attention", 128) // 2
    local = every > 1 and layers > 1
    return BertConfig(
        vocab_size=theirs.size("vocab_size", 50368), max_length=theirs.size("max_position_embeddings", 8192),
        num_layers=layers, embed_dim=theirs.size("hidden_size", 768), num_heads=theirs.size("num_attention_heads", 12),
        mlp_dim=theirs.size("intermediate_size", 1152), activation=theirs.one_of("hidden_activation", GATED, "gelu"),
        norm_epsilon=float(theirs.get("norm_eps", 1e-5)), norm_first=True, first_norm=False, token_types=0,
        position="rotary", rotary_period=periods["full_attention"],
        local_rotary_period=periods["sliding_attention"] if local else None, local_window=window if local else None,
        global_every=every if local else 3, attention_bias=bool(theirs.get("attention_bias", False)),
        mlp_bias=bool(theirs.get("mlp_bias", False)), norm_bias=has_bias, head_bias=has_bias,
        dropout=theirs.dropout("mlp_dropout", "attention_dropout", "embedding_dropout", "classifier_dropout", default=0.0),
        init_std=float(theirs.get("initializer_range", 0.02)), head=head, num_labels=labels_of(theirs),
        pooling=theirs.one_of("classifier_pooling", {"cls": "cls", "mean": "mean"}, "cls"),
        pooler_activation="gelu_exact", pooler_norm=True, token_layer=True,
    )  # fmt: skip


def _every(theirs: Theirs, layers: int) -> int:
    """Every how-manyth layer is global."""
    types = theirs.get("layer_types")
    if types is None:
        return theirs.size("global_attn_every_n_layers", 3)
    kinds = [kind == "full_attention" for kind in types]
    every = next((index for index in range(1, len(kinds)) if kinds[index]), max(len(kinds), 1))
    if kinds != [index % every == 0 for index in range(layers)]:
        theirs.wrong("layer_types: supported: full_attention in every n-th layer, from the first on")
    return every


def _write(c: BertConfig) -> dict[str, Any]:
    every = c.global_every if c.local_window is not None else 1
    kinds = ["sliding_attention" if index % every else "full_attention" for index in range(c.num_layers)]
    local = c.rotary_period if c.local_rotary_period is None else c.local_rotary_period
    return {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim, "num_attention_heads": c.num_heads, "intermediate_size": c.dim_of_mlp,
        "hidden_activation": name_of(GATED, c.activation), "norm_eps": c.norm_epsilon, "norm_bias": c.has_bias("norm"),
        "attention_bias": c.has_bias("attention"), "mlp_bias": c.has_bias("mlp"), "classifier_bias": c.head_bias,
        "layer_types": kinds, "global_attn_every_n_layers": every,
        "local_attention": 128 if c.local_window is None else 2 * c.local_window,
        "rope_parameters": {
            "full_attention": rotary_fields(c.rotary_period, c.rotary_scaling),
            "sliding_attention": rotary_fields(local, c.rotary_scaling),
        },
        "global_rope_theta": c.rotary_period, "local_rope_theta": local, "mlp_dropout": c.dropout,
        "attention_dropout": c.dropout, "embedding_dropout": c.dropout, "classifier_dropout": c.dropout,
        "initializer_range": c.init_std, "num_labels": c.num_labels, "classifier_pooling": c.pooling,
    }  # fmt: skip


def _tables(c: BertConfig) -> Tables:
    of_norms, layer = c.has_bias("norm"), "model.layers.{}"
    attention = f"{BLOCKS}.attention"
    heads: list[Rule] = []
    copies = {}
    if c.head != "embedding":
        head, dense = _HEADS[c.head]
        heads += linear("head.dense", f"{head}.{dense}", use_bias=c.head_bias)
        heads += norm("head.norm", f"{head}.norm", use_bias=c.head_bias)
        if c.head == "masked":
            heads += [Rule("decoder.bias", ("masked_head.bias",), Vector())]
            copies = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
        else:
            heads += linear("classifier", f"{head}.out")
    rules = rules_of(
        Rule("model.embeddings.tok_embeddings.weight", ("embed.table",), TableLayout()),
        norm("model.embeddings.norm", "embed_norm", use_bias=of_norms),
        norm(f"{layer}.attn_norm", f"{BLOCKS}.attention_norm", use_bias=of_norms, first=1),
        fused(
            f"{layer}.attn.Wqkv",
            [f"{attention}.{name}" for name in ("query", "key", "value")],
            use_bias=c.has_bias("qkv"),
        ),
        linear(f"{layer}.attn.Wo", f"{attention}.out", use_bias=c.has_bias("attention"), num_in=2),
        norm(f"{layer}.mlp_norm", f"{BLOCKS}.feed_forward_norm", use_bias=of_norms),
        # Theirs puts through the activation what comes first.
        fused(
            f"{layer}.mlp.Wi",
            [f"{BLOCKS}.feed_forward.{name}" for name in ("gate", "up")],
            use_bias=c.has_bias("mlp"),
        ),
        linear(f"{layer}.mlp.Wo", f"{BLOCKS}.feed_forward.down", use_bias=c.has_bias("mlp")),
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
