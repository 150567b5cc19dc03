"""Nomic BERT: BERT's body with rotary positions, gated feed-forward layers, and no biases in them (Nussbaum et al. 2024)."""

from __future__ import annotations

from typing import Any

from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.encoders import BUFFERS, class_fields, classes_of, head_of, masked_head, small_heads
from transformer.huggingface.fields import (
    GATED,
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
    Tables,
    TensorRule,
    fused,
    linear,
    norm,
    table,
)
from transformer.layers.feed_forward import DenseConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig

_BODY = "nomic_bert"


def _read(theirs: HFConfigReader, head: Any) -> BertConfig:
    theirs.must("tie_word_embeddings", [True], True)
    rotary = theirs.rotary(theta=1000.0)
    if rotary.fraction != 1.0:
        theirs.wrong(f"partial_rotary_factor: got {rotary.fraction:g}; supported: 1")
    heads, dim = theirs.size("num_attention_heads", 12), theirs.size("hidden_size", 768)
    own = theirs.size("head_dim", max(dim // heads, 1))
    return BertConfig(
        vocab_size=theirs.size("vocab_size", 30528), max_length=theirs.size("max_position_embeddings", 2048),
        num_layers=theirs.layers("num_hidden_layers", 12), embed_dim=dim,
        attention=SoftmaxConfig(num_heads=heads, head_dim=own, bias=False, position=rotary),
        mlp=DenseConfig(
            dim=theirs.size("intermediate_size", 3072), activation=theirs.one_of("hidden_act", GATED, "silu"), bias=False
        ),
        norm_eps=theirs.number("layer_norm_eps", 1e-12), token_types=theirs.size("type_vocab_size", 2),
        **theirs.dropouts(
            "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", default=0.0
        ),
        init_std=theirs.number("initializer_range", 0.02),
        head=head_of(head, **classes_of(theirs, head)),
    )  # fmt: skip


def _write(c: BertConfig) -> dict[str, Any]:
    mixer, mlp = only_mixer(c), dense_mlp(c)
    return {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim, "num_attention_heads": mixer.num_heads,
        "head_dim": mixer.head_dim or c.embed_dim // mixer.num_heads, "intermediate_size": mlp.width(c.embed_dim),
        "hidden_act": name_of(GATED, mlp.activation), "layer_norm_eps": c.norm_eps,
        "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.attention_dropout,
        "type_vocab_size": c.token_types, "initializer_range": c.init_std,
        "rope_parameters": rotary_fields(rotary_of(mixer)), **class_fields(c),
    }  # fmt: skip


def _tables(c: BertConfig) -> Tables:
    layer = f"{_BODY}.encoder.layers.{{}}"
    heads: list[TensorRule] = list(small_heads(c))
    copies = {}
    if c.head.kind == "masked":
        names = [f"cls.predictions.{name}" for name in ("transform.dense", "transform.layer_norm", "bias")]
        heads += masked_head(*names)
        copies = {
            "cls.predictions.decoder.weight": f"{_BODY}.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
    if c.head.kind == "classification":
        heads += [*linear(f"{_BODY}.pooler.dense", "pooled_head.pooler"), *linear("classifier", "pooled_head.out")]
    rules = rules_of(
        table(f"{_BODY}.embeddings.word_embeddings", "embed"),
        table(f"{_BODY}.embeddings.token_type_embeddings", "types") if c.token_types else [],
        norm(f"{_BODY}.emb_ln", "embed_norm"),
        fused(f"{layer}.attn.Wqkv", QKV, use_bias=False),
        linear(f"{layer}.attn.out_proj", f"{ATTENTION}.out", use_bias=False, num_in=2),
        norm(f"{layer}.norm1", f"{BLOCKS}.attention_norm"),
        linear(f"{layer}.mlp.fc11", f"{FEED_FORWARD}.up", use_bias=False),
        linear(f"{layer}.mlp.fc12", f"{FEED_FORWARD}.gate", use_bias=False),
        linear(f"{layer}.mlp.fc2", f"{FEED_FORWARD}.down", use_bias=False),
        norm(f"{layer}.norm2", f"{BLOCKS}.feed_forward_norm"),
        heads,
    )
    return Tables(rules, copies, ("cls.*", f"{_BODY}.pooler.*", *BUFFERS))


NOMIC_BERT = Architecture(
    model_type="nomic_bert", family=BertConfig,
    classes={
        "NomicBertForMaskedLM": "masked", "NomicBertForSequenceClassification": "classification",
        "NomicBertForTokenClassification": "tokens", "NomicBertModel": "embedding",
    },
    bare=("NomicBertModel",), prefix=_BODY, heads=("cls.", "classifier."), read=_read, write=_write, tables=_tables,
)  # fmt: skip
