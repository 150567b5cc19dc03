"""ALBERT: BERT with layers that share their parameters, and embeddings narrower than the layers (Lan et al. 2020)."""

from __future__ import annotations

from typing import Any

from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.encoders import (
    BUFFERS,
    bert_config,
    bert_fields,
    classes,
    classes_of,
    head_of,
    masked_head,
    small_heads,
)
from transformer.huggingface.fields import HFConfigReader
from transformer.huggingface.mapping import ATTENTION, BLOCKS, FEED_FORWARD, Tables, TensorRule, linear, norm, table
from transformer.models.bert import BertConfig

_LAYER = "albert.encoder.albert_layer_groups.{}.albert_layers.0"


def _read(theirs: HFConfigReader, head: Any) -> BertConfig:
    theirs.must("inner_group_num", [1], 1)
    common = bert_config(
        theirs,
        dim=4096,
        num_heads=64,
        mlp_dim=16384,
        activation="gelu_new",
        dropout=0.0,
        classifier_dropout="classifier_dropout_prob",
    )
    width, groups = theirs.size("embedding_size", 128), theirs.size("num_hidden_groups", 1)
    layers = common["num_layers"]
    if width == common["embed_dim"]:
        # They have a layer between the two in any case.
        theirs.wrong(f"embedding_size: got {width}, which is hidden_size; supported: another number")
    if layers % groups:
        theirs.wrong(f"num_hidden_groups: got {groups}; supported: a divisor of num_hidden_layers ({layers})")
        groups = 1
    return BertConfig(
        **common | {"vocab_size": theirs.size("vocab_size", 30000)},
        embedding_size=width,
        distinct_layers=None if groups == layers else groups, head=head_of(head, **classes_of(theirs, head), pooler="tanh"),
    )  # fmt: skip


def _write(c: BertConfig) -> dict[str, Any]:
    fields = bert_fields(c)
    return fields | {
        "embedding_size": c.dim_of_embedding, "num_hidden_groups": c.distinct_layers or c.num_layers, "inner_group_num": 1,
        "classifier_dropout_prob": c.dropout,
    }  # fmt: skip


def _tables(c: BertConfig) -> Tables:
    heads: list[TensorRule] = list(small_heads(c))
    copies = {}
    if c.head.kind in ("masked", "pretraining"):
        heads += masked_head("predictions.dense", "predictions.LayerNorm", "predictions.bias")
        copies = {
            "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
            "predictions.decoder.bias": "predictions.bias",
        }
    if c.head.kind in ("pretraining", "classification", "choice", "embedding"):
        heads += linear("albert.pooler", "pooled_head.pooler")
    if c.head.kind in ("pretraining", "classification", "choice"):
        out = "sop_classifier.classifier" if c.head.kind == "pretraining" else "classifier"
        heads += linear(out, "pooled_head.out")
    rules = rules_of(
        table("albert.embeddings.word_embeddings", "embed"),
        table("albert.embeddings.position_embeddings", "positions"),
        table("albert.embeddings.token_type_embeddings", "types"),
        norm("albert.embeddings.LayerNorm", "embed_norm"),
        linear("albert.encoder.embedding_hidden_mapping_in", "embedding_projection"),
        *(linear(f"{_LAYER}.attention.{name}", f"{ATTENTION}.{name}") for name in ("query", "key", "value")),
        linear(f"{_LAYER}.attention.dense", f"{ATTENTION}.out", num_in=2),
        norm(f"{_LAYER}.attention.LayerNorm", f"{BLOCKS}.attention_norm"),
        linear(f"{_LAYER}.ffn", f"{FEED_FORWARD}.up"),
        linear(f"{_LAYER}.ffn_output", f"{FEED_FORWARD}.down"),
        norm(f"{_LAYER}.full_layer_layer_norm", f"{BLOCKS}.feed_forward_norm"),
        heads,
    )
    return Tables(rules, copies, ("predictions.*", "sop_classifier.*", "albert.pooler.*", *BUFFERS))


ALBERT = Architecture(
    model_type="albert", family=BertConfig,
    classes=classes("Albert", ForPreTraining="pretraining"), bare=("AlbertModel",), prefix="albert",
    heads=("predictions.", "sop_classifier.", "classifier.", "qa_outputs."), read=_read, write=_write, tables=_tables,
)  # fmt: skip
