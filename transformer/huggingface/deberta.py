"""DeBERTa v2 and v3: BERT with disentangled attention over contents and distances (He et al. 2021a, 2021b)."""

from __future__ import annotations

from typing import Any

from transformer.errors import UserError
from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.encoders import (
    BUFFERS,
    class_fields,
    classes,
    classes_of,
    head_of,
    masked_head,
    small_heads,
)
from transformer.huggingface.fields import ACTIVATIONS, HFConfigReader, dense_mlp, name_of
from transformer.huggingface.mapping import ATTENTION, BLOCKS, FEED_FORWARD, Tables, TensorRule, linear, norm, table
from transformer.layers.feed_forward import DenseConfig
from transformer.mixers.disentangled import DisentangledConfig
from transformer.models.bert import BertConfig

_TERMS = ("c2p", "p2c")
_NORMS = ("none", "layer_norm")
_POOLERS = {"gelu": "gelu_exact", "tanh": "tanh", "relu": "relu"}
_HEAD, _NEW_HEAD = "cls.predictions", "lm_predictions.lm_head"
_RENAMED = {
    f"{_NEW_HEAD}.{new}": f"{_HEAD}.{old}"
    for new, old in {
        "dense.weight": "transform.dense.weight", "dense.bias": "transform.dense.bias",
        "LayerNorm.weight": "transform.LayerNorm.weight", "LayerNorm.bias": "transform.LayerNorm.bias", "bias": "bias",
    }.items()
}  # fmt: skip
"""The head over masked tokens has other names with `legacy: false`, and in Microsoft's files; it computes the same."""


def _read(theirs: HFConfigReader, head: Any) -> BertConfig:
    theirs.must("tie_word_embeddings", [True], True)
    theirs.must("relative_attention", [True], False)
    theirs.must("conv_kernel_size", [0], 0)
    theirs.flag("legacy", True)
    dim, num_heads = theirs.size("hidden_size", 1536), theirs.size("num_attention_heads", 24)
    for name in ("embedding_size", "pooler_hidden_size"):
        theirs.must(name, [dim], dim)
    theirs.must("attention_head_size", [dim // num_heads], dim // num_heads)
    max_length = theirs.size("max_position_embeddings", 512)
    dropouts = theirs.dropouts("hidden_dropout_prob", "attention_probs_dropout_prob", "cls_dropout")
    pooled: dict[str, Any] = {}
    if head in ("classification", "choice"):
        pooled = {"activation": theirs.one_of("pooler_hidden_act", _POOLERS, "gelu")}
        if rate := theirs.number("pooler_dropout", 0.0):
            theirs.notes.append(f"pooler_dropout is {rate:g} there; here nothing is dropped before the pooler")
    return BertConfig(
        vocab_size=theirs.size("vocab_size", 128100), max_length=max_length,
        num_layers=theirs.layers("num_hidden_layers", 24), embed_dim=dim,
        attention=_attention(theirs, num_heads, max_length),
        position_embedding="learned" if theirs.flag("position_biased_input", True) else "none",
        mlp=DenseConfig(
            dim=theirs.size("intermediate_size", 6144), activation=theirs.one_of("hidden_act", ACTIVATIONS, "gelu")
        ),
        norm_eps=theirs.number("layer_norm_eps", 1e-7), token_types=theirs.token("type_vocab_size", 0), **dropouts,
        init_std=theirs.number("initializer_range", 0.02), head=head_of(head, **classes_of(theirs, head), **pooled),
    )  # fmt: skip


def _attention(theirs: HFConfigReader, num_heads: int, max_length: int) -> DisentangledConfig:
    terms = _parts(theirs, "pos_att_type", _TERMS)
    if not terms:
        theirs.wrong("pos_att_type: got none; supported: c2p, p2c, or both")
        terms = list(_TERMS)
    norms = _parts(theirs, "norm_rel_ebd", _NORMS)
    buckets, distance = (theirs.size(name, -1, least=-1) for name in ("position_buckets", "max_relative_positions"))
    return DisentangledConfig(
        num_heads=num_heads, max_distance=distance if distance > 0 else max_length,
        num_buckets=buckets if buckets > 0 else None,
        content_to_position="c2p" in terms, position_to_content="p2c" in terms,
        share_projections=theirs.flag("share_att_key", False), norm_embeddings="layer_norm" in norms,
    )  # fmt: skip


def _parts(theirs: HFConfigReader, name: str, allowed: tuple[str, ...]) -> list[str]:
    """The parts of a field that is a list, or a text with | between them."""
    value = theirs.get(name, [])
    parts = [part.strip() for part in value.lower().split("|")] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(part in allowed for part in parts):
        theirs.wrong(f"{name}: got {value!r}; supported: {', '.join(allowed)}, with | between them")
        return list(allowed)
    return parts


def _mixer(c: BertConfig) -> DisentangledConfig:
    first, *others = dict.fromkeys(c.mixers())
    if others:
        raise UserError("a pattern of mixers that differ")
    if not isinstance(first, DisentangledConfig):
        raise UserError(f"attention of kind {first.kind}")
    return first


def _write(c: BertConfig) -> dict[str, Any]:
    mixer, mlp = _mixer(c), dense_mlp(c)
    terms = [
        name for name, has in zip(_TERMS, (mixer.content_to_position, mixer.position_to_content), strict=True) if has
    ]
    return {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim, "num_attention_heads": mixer.num_heads,
        "attention_head_size": mixer.head_dim or c.embed_dim // mixer.num_heads,
        "intermediate_size": mlp.width(c.embed_dim), "hidden_act": name_of(ACTIVATIONS, mlp.activation),
        "relative_attention": True, "max_relative_positions": mixer.max_distance,
        "position_buckets": -1 if mixer.num_buckets is None else mixer.num_buckets,
        "pos_att_type": terms, "share_att_key": mixer.share_projections,
        "norm_rel_ebd": "layer_norm" if mixer.norm_embeddings else "none",
        "position_biased_input": c.embedded_positions == "learned", "type_vocab_size": c.token_types,
        "layer_norm_eps": c.norm_eps, "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout, "initializer_range": c.init_std,
        "pooler_hidden_size": c.embed_dim, "pooler_hidden_act": name_of(_POOLERS, getattr(c.head, "activation", "gelu_exact")),
        "legacy": True, **class_fields(c),
    }  # fmt: skip


def _tables(c: BertConfig) -> Tables:
    mixer = _mixer(c)
    inner, layer = "deberta.encoder.layer.{}.attention.self", "deberta.encoder.layer.{}"
    names = {"query": "query_proj", "key": "key_proj", "value": "value_proj"}
    if not mixer.share_projections:
        names |= {"position_key": "pos_key_proj"} if mixer.content_to_position else {}
        names |= {"position_query": "pos_query_proj"} if mixer.position_to_content else {}
    heads: list[TensorRule] = list(small_heads(c))
    copies = {}
    if c.head.kind == "masked":
        heads += masked_head(f"{_HEAD}.transform.dense", f"{_HEAD}.transform.LayerNorm", f"{_HEAD}.bias")
        copies = {
            f"{_HEAD}.decoder.weight": "deberta.embeddings.word_embeddings.weight",
            f"{_HEAD}.decoder.bias": f"{_HEAD}.bias",
        }
    if c.head.kind in ("classification", "choice"):
        heads += [*linear("pooler.dense", "pooled_head.pooler"), *linear("classifier", "pooled_head.out")]
    rules = rules_of(
        table("deberta.embeddings.word_embeddings", "embed"),
        table("deberta.embeddings.position_embeddings", "positions") if c.embedded_positions == "learned" else [],
        table("deberta.embeddings.token_type_embeddings", "types") if c.token_types else [],
        norm("deberta.embeddings.LayerNorm", "embed_norm"),
        table("deberta.encoder.rel_embeddings", "layers.relative"),
        norm("deberta.encoder.LayerNorm", "layers.relative.norm") if mixer.norm_embeddings else [],
        *(linear(f"{inner}.{theirs}", f"{ATTENTION}.{ours}") for ours, theirs in names.items()),
        linear(f"{layer}.attention.output.dense", f"{ATTENTION}.out", num_in=2),
        norm(f"{layer}.attention.output.LayerNorm", f"{BLOCKS}.attention_norm"),
        linear(f"{layer}.intermediate.dense", f"{FEED_FORWARD}.up"),
        linear(f"{layer}.output.dense", f"{FEED_FORWARD}.down"),
        norm(f"{layer}.output.LayerNorm", f"{BLOCKS}.feed_forward_norm"),
        heads,
    )
    return Tables(rules, copies, ("cls.*", "lm_predictions.*", "mask_predictions.*", *BUFFERS))


DEBERTA_V2 = Architecture(
    model_type="deberta-v2", family=BertConfig,
    # Files without the name of a class are read as the body where nothing else fits.
    classes={"DebertaV2Model": "embedding"} | classes("DebertaV2"), bare=("DebertaV2Model",), prefix="deberta",
    heads=("cls.", "lm_predictions.", "mask_predictions.", "pooler.", "classifier.", "qa_outputs."), renamed=_RENAMED,
    read=_read, write=_write, tables=_tables,
)  # fmt: skip
