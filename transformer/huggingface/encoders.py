"""BERT, RoBERTa, DistilBERT, ELECTRA and MPNet: the same body, with different names, heads and details."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from transformer.huggingface.architecture import Architecture, rules_of
from transformer.huggingface.fields import ACTIVATIONS, HFConfigReader, dense_mlp, name_of, only_mixer
from transformer.huggingface.mapping import BLOCKS, Tables, TensorRule, Vector, linear, norm, table
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.position import RelativeConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.heads import (
    AnswerHeadConfig,
    ChoiceHeadConfig,
    ClassificationHeadConfig,
    EmbeddingHeadConfig,
    HeadConfig,
    MaskedHeadConfig,
    PretrainingHeadConfig,
    ReplacedHeadConfig,
    TokensHeadConfig,
)

HEADS = {
    "ForMaskedLM": "masked", "ForSequenceClassification": "classification", "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "answer", "ForMultipleChoice": "choice", "Model": "embedding",
}  # fmt: skip
"""Suffix of their classes' names → our head."""
BUFFERS = ("*.position_ids", "*.token_type_ids", "embeddings.position_ids", "embeddings.token_type_ids")
"""Tensors in older checkpoints that are not parameters."""


def classes(name: str, **more: str) -> dict[str, str]:
    """The classes of a family, with our head for each."""
    return {name + end: head for end, head in HEADS.items()} | {name + end: head for end, head in more.items()}


def _body(
    c: BertConfig, prefix: str, *, embeddings: str, layer: str, attention: dict[str, str], feed_forward: tuple[str, str],
    norms: tuple[str, str], skipped: int = 0,
) -> Iterator[TensorRule]:  # fmt: skip
    yield table(f"{prefix}.{embeddings}.word_embeddings", "embed")
    yield table(f"{prefix}.{embeddings}.position_embeddings", "positions", skipped=skipped)
    if c.token_types:
        yield table(f"{prefix}.{embeddings}.token_type_embeddings", "types")
    yield from norm(f"{prefix}.{embeddings}.LayerNorm", "embed_norm")
    one = f"{prefix}.{layer}.{{}}"
    for ours, theirs in attention.items():
        yield from linear(f"{one}.{theirs}", f"{BLOCKS}.attention.{ours}", num_in=2 if ours == "out" else 1)
    for ours, theirs in zip(("up", "down"), feed_forward, strict=True):
        yield from linear(f"{one}.{theirs}", f"{BLOCKS}.feed_forward.{ours}")
    for ours, theirs in zip(("attention_norm", "feed_forward_norm"), norms, strict=True):
        yield from norm(f"{one}.{theirs}", f"{BLOCKS}.{ours}")


def _bert_body(c: BertConfig, prefix: str, skipped: int = 0) -> Iterator[TensorRule]:
    inner = {name: f"attention.self.{name}" for name in ("query", "key", "value")}
    return _body(
        c, prefix, embeddings="embeddings", layer="encoder.layer", skipped=skipped,
        attention=inner | {"out": "attention.output.dense"}, feed_forward=("intermediate.dense", "output.dense"),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
    )  # fmt: skip


def small_heads(c: BertConfig) -> Iterator[TensorRule]:
    """Rules for the heads of single tokens, which have the same names in all of these."""
    if c.head.kind == "tokens":
        yield from linear("classifier", "token_head.out")
    if c.head.kind == "answer":
        yield from linear("qa_outputs", "token_head.out")


def masked_head(dense: str, norm_name: str, bias: str) -> Iterator[TensorRule]:
    """Rules for the head that predicts masked tokens."""
    yield from linear(dense, "masked_head.dense")
    yield from norm(norm_name, "masked_head.norm")
    yield TensorRule(bias, ("masked_head.bias",), Vector())


def head_of(
    kind: str, num_labels: int, *, multi_label: bool = False, token: dict[str, Any] | None = None, pooler: Any = None,
    **pooled: Any,
) -> HeadConfig:  # fmt: skip
    """The head of a kind.

    Args:
        multi_label: of a head over classes of rows.
        token: of the heads of single tokens.
        pooler: of embeddings.
        pooled: of the heads of whole rows.
    """
    makers: dict[str, Callable[[], HeadConfig]] = {
        "masked": MaskedHeadConfig,
        "replaced": ReplacedHeadConfig,
        "pretraining": lambda: PretrainingHeadConfig(**pooled),
        "classification": lambda: ClassificationHeadConfig(num_labels=num_labels, multi_label=multi_label, **pooled),
        "choice": lambda: ChoiceHeadConfig(**pooled),
        "tokens": lambda: TokensHeadConfig(num_labels=num_labels, **token or {}),
        "answer": lambda: AnswerHeadConfig(**token or {}),
        "embedding": lambda: EmbeddingHeadConfig(pooler=pooler),
    }
    return makers[kind]()


def bert_config(
    theirs: HFConfigReader, *, dim: int = 768, num_heads: int = 12, mlp_dim: int = 3072, activation: str = "gelu",
    dropout: float = 0.1, classifier_dropout: str = "classifier_dropout",
) -> dict[str, Any]:  # fmt: skip
    """Fields of our config from those that most of them have; the other arguments are their defaults."""
    theirs.must("is_decoder", [False], False)
    theirs.must("position_embedding_type", ["absolute"], "absolute")
    theirs.must("tie_word_embeddings", [True], True)
    return {
        "vocab_size": theirs.size("vocab_size", 30522),
        "max_length": theirs.size("max_position_embeddings", 512),
        "num_layers": theirs.layers("num_hidden_layers", 12),
        "embed_dim": theirs.size("hidden_size", dim),
        "attention": SoftmaxConfig(num_heads=theirs.size("num_attention_heads", num_heads)),
        "mlp": DenseConfig(
            dim=theirs.size("intermediate_size", mlp_dim),
            activation=theirs.one_of("hidden_act", ACTIVATIONS, activation),
        ),
        "norm_eps": theirs.number("layer_norm_eps", 1e-12),
        **theirs.dropouts("hidden_dropout_prob", "attention_probs_dropout_prob", classifier_dropout, default=dropout),
        "token_types": theirs.size("type_vocab_size", 2),
        "init_std": theirs.number("initializer_range", 0.02),
    }


def classes_of(theirs: HFConfigReader, head: Any) -> dict[str, Any]:
    """How many classes a config names, and whether a text may have several: arguments of `head_of`."""
    several = "multi_label_classification"
    if head == "classification":
        allowed = ["single_label_classification", "regression", several]
        theirs.must("problem_type", allowed, "single_label_classification")
    multi_label = head == "classification" and theirs.get("problem_type") == several
    named = theirs.get("id2label")
    if named and not (isinstance(named, dict) and sorted(map(str, named)) == sorted(map(str, range(len(named))))):
        theirs.wrong("id2label: supported: a name for each number from 0 up")
        return {"num_labels": 2, "multi_label": multi_label}
    return {"num_labels": len(named) if named else theirs.size("num_labels", 2), "multi_label": multi_label}


def bert_fields(c: BertConfig) -> dict[str, Any]:
    """The fields that `bert_config` reads."""
    mixer, mlp = only_mixer(c), dense_mlp(c)
    return {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim, "num_attention_heads": mixer.num_heads, "intermediate_size": mlp.width(c.embed_dim),
        "hidden_act": name_of(ACTIVATIONS, mlp.activation), "layer_norm_eps": c.norm_eps,
        "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.attention_dropout,
        "type_vocab_size": c.token_types, "initializer_range": c.init_std, **class_fields(c),
    }  # fmt: skip


def class_fields(c: BertConfig) -> dict[str, Any]:
    """The fields of `classes_of`."""
    kind = {}
    if isinstance(c.head, ClassificationHeadConfig) and (c.head.multi_label or c.head.classes == 1):
        # Without it, transformers' pipeline applies a sigmoid to a single number.
        kind = {"problem_type": "multi_label_classification" if c.head.multi_label else "regression"}
    return {"num_labels": num_labels_of(c)} | kind


def num_labels_of(c: BertConfig) -> int:
    """Number of classes of the head; their default for a head without classes."""
    return getattr(c.head, "classes", 2)


def _read_bert(theirs: HFConfigReader, head: Any) -> BertConfig:
    return BertConfig(**bert_config(theirs), head=head_of(head, **classes_of(theirs, head), pooler="tanh"))


def _bert_tables(c: BertConfig) -> Tables:
    heads: list[TensorRule] = list(small_heads(c))
    copies = {}
    if c.head.kind in ("masked", "pretraining"):
        names = [f"cls.predictions.{name}" for name in ("transform.dense", "transform.LayerNorm", "bias")]
        heads += masked_head(*names)
        copies = {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
    if c.head.kind in ("pretraining", "classification", "choice", "embedding"):
        heads += linear("bert.pooler.dense", "pooled_head.pooler")
    if c.head.kind in ("pretraining", "classification", "choice"):
        heads += linear("cls.seq_relationship" if c.head.kind == "pretraining" else "classifier", "pooled_head.out")
    left_out = ("cls.*", "bert.pooler.*", *BUFFERS)
    return Tables(rules_of(_bert_body(c, "bert"), heads), copies, left_out)


BERT = Architecture(
    model_type="bert", family=BertConfig,
    classes=classes("Bert", ForPreTraining="pretraining"), bare=("BertModel",), prefix="bert",
    heads=("cls.", "classifier.", "qa_outputs."),
    read=_read_bert, write=bert_fields, tables=_bert_tables,
)  # fmt: skip

_ROBERTA_HEADS = ("lm_head.", "classifier.", "qa_outputs.")
_UNUSED_ROWS = 2
"""RoBERTa's positions count from pad_token_id + 1, which is 2 in every checkpoint."""


def _read_roberta(theirs: HFConfigReader, head: Any) -> BertConfig:
    theirs.must("pad_token_id", [_UNUSED_ROWS - 1], _UNUSED_ROWS - 1)
    common = bert_config(theirs)
    rows = common["max_length"]
    if rows <= _UNUSED_ROWS:
        theirs.wrong(f"max_position_embeddings: got {rows}; allowed: above {_UNUSED_ROWS}")
        rows = _UNUSED_ROWS + 1
    made = head_of(head, **classes_of(theirs, head), pooler="tanh")
    return BertConfig(**common | {"max_length": rows - _UNUSED_ROWS}, head=made)


def _roberta_fields(c: BertConfig) -> dict[str, Any]:
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return bert_fields(c) | special | {"max_position_embeddings": c.max_length + _UNUSED_ROWS}


def _roberta_heads(c: BertConfig, prefix: str) -> tuple[list[TensorRule], dict[str, str]]:
    """The rules of the heads, and the tensors that repeat others."""
    heads: list[TensorRule] = list(small_heads(c))
    copies = {}
    if c.head.kind == "masked":
        heads += masked_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
        copies = {
            "lm_head.decoder.weight": f"{prefix}.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        }
    if c.head.kind == "classification":
        heads += [*linear("classifier.dense", "pooled_head.pooler"), *linear("classifier.out_proj", "pooled_head.out")]
    if c.head.kind in ("choice", "embedding"):
        heads += linear(f"{prefix}.pooler.dense", "pooled_head.pooler")
    if c.head.kind == "choice":
        heads += linear("classifier", "pooled_head.out")
    return heads, copies


def _roberta_tables(c: BertConfig) -> Tables:
    heads, copies = _roberta_heads(c, "roberta")
    left_out = ("lm_head.*", "roberta.pooler.*", *BUFFERS)
    return Tables(rules_of(_bert_body(c, "roberta", _UNUSED_ROWS), heads), copies, left_out)


ROBERTA = Architecture(
    model_type="roberta", family=BertConfig,
    classes=classes("Roberta"), bare=("RobertaModel",), prefix="roberta", heads=_ROBERTA_HEADS,
    read=_read_roberta,
    write=_roberta_fields, tables=_roberta_tables,
)  # fmt: skip
XLM_ROBERTA = Architecture(
    model_type="xlm-roberta", family=BertConfig,
    classes=classes("XLMRoberta"), bare=("XLMRobertaModel",), prefix="roberta", heads=_ROBERTA_HEADS,
    read=_read_roberta, write=_roberta_fields, tables=_roberta_tables,
)  # fmt: skip


def _read_distilbert(theirs: HFConfigReader, head: Any) -> BertConfig:
    theirs.must("sinusoidal_pos_embds", [False], False)
    theirs.must("tie_word_embeddings", [True], True)
    return BertConfig(
        vocab_size=theirs.size("vocab_size", 30522), max_length=theirs.size("max_position_embeddings", 512),
        num_layers=theirs.layers("n_layers", 6), embed_dim=theirs.size("dim", 768),
        attention=SoftmaxConfig(num_heads=theirs.size("n_heads", 12)),
        mlp=DenseConfig(
            dim=theirs.size("hidden_dim", 3072), activation=theirs.one_of("activation", ACTIVATIONS, "gelu")
        ),
        norm_eps=1e-12, token_types=0, init_std=theirs.number("initializer_range", 0.02),
        **theirs.dropouts("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"),
        head=head_of(head, **classes_of(theirs, head), activation="relu"),
    )  # fmt: skip


def _distilbert_fields(c: BertConfig) -> dict[str, Any]:
    mixer, mlp = only_mixer(c), dense_mlp(c)
    return {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "n_layers": c.num_layers,
        "dim": c.embed_dim, "n_heads": mixer.num_heads, "hidden_dim": mlp.width(c.embed_dim),
        "activation": name_of(ACTIVATIONS, mlp.activation), "dropout": c.dropout,
        "attention_dropout": c.attention_dropout, "initializer_range": c.init_std, **class_fields(c),
    }  # fmt: skip


def _distilbert_tables(c: BertConfig) -> Tables:
    body = _body(
        c, "distilbert", embeddings="embeddings", layer="transformer.layer",
        attention={"query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin", "out": "attention.out_lin"},
        feed_forward=("ffn.lin1", "ffn.lin2"), norms=("sa_layer_norm", "output_layer_norm"),
    )  # fmt: skip
    heads: list[TensorRule] = list(small_heads(c))
    copies = {}
    if c.head.kind == "masked":
        heads += masked_head("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
        copies = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
    if c.head.kind in ("classification", "choice"):
        heads += [*linear("pre_classifier", "pooled_head.pooler"), *linear("classifier", "pooled_head.out")]
    return Tables(rules_of(body, heads), copies, ("vocab_*", *BUFFERS))


DISTILBERT = Architecture(
    model_type="distilbert", family=BertConfig,
    classes=classes("DistilBert"), bare=("DistilBertModel",), prefix="distilbert",
    heads=("vocab_", "pre_classifier.", "classifier.", "qa_outputs."),
    read=_read_distilbert, write=_distilbert_fields, tables=_distilbert_tables,
)  # fmt: skip


def _read_electra(theirs: HFConfigReader, head: Any) -> BertConfig:
    if head == "choice":
        for name, value in (("summary_type", "first"), ("summary_use_proj", True), ("summary_activation", "gelu")):
            theirs.must(name, [value], value)
    width, dim = theirs.size("embedding_size", 128), theirs.size("hidden_size", 256)
    common = bert_config(theirs, dim=256, num_heads=4, mlp_dim=1024)
    if head == "masked":
        # The generator's head uses this activation, whatever the layers use.
        theirs.must("hidden_act", ["gelu"], "gelu")
    made = head_of(head, **classes_of(theirs, head), activation="gelu_exact")
    return BertConfig(**common, embedding_size=None if width == dim else width, head=made)


def _electra_fields(c: BertConfig) -> dict[str, Any]:
    return bert_fields(c) | {"embedding_size": c.dim_of_embedding, "summary_activation": "gelu"}


def _electra_tables(c: BertConfig) -> Tables:
    heads: list[TensorRule] = list(small_heads(c))
    copies = {}
    if c.dim_of_embedding != c.embed_dim:
        heads += linear("electra.embeddings_project", "embedding_projection")
    if c.head.kind == "masked":
        names = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")
        heads += masked_head(*names)
        copies = {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"}
    if c.head.kind == "replaced":
        heads += linear("discriminator_predictions.dense", "replaced_head.dense")
        heads += linear("discriminator_predictions.dense_prediction", "replaced_head.out")
    if c.head.kind == "classification":
        heads += [*linear("classifier.dense", "pooled_head.pooler"), *linear("classifier.out_proj", "pooled_head.out")]
    if c.head.kind == "choice":
        heads += [*linear("sequence_summary.summary", "pooled_head.pooler"), *linear("classifier", "pooled_head.out")]
    left_out = ("discriminator_predictions.*", "generator_*", *BUFFERS)
    return Tables(rules_of(_bert_body(c, "electra"), heads), copies, left_out)


ELECTRA = Architecture(
    model_type="electra", family=BertConfig,
    classes=classes("Electra", ForPreTraining="replaced"), bare=("ElectraModel",),
    prefix="electra", heads=("discriminator_", "generator_", "classifier.", "qa_outputs.", "sequence_summary."),
    read=_read_electra, write=_electra_fields, tables=_electra_tables,
)  # fmt: skip

_MPNET_BUCKETS, _MPNET_DISTANCE = 32, 128
"""Their implementation computes the buckets with these numbers, whatever config.json has."""


def _read_mpnet(theirs: HFConfigReader, head: Any) -> BertConfig:
    theirs.must("relative_attention_num_buckets", [_MPNET_BUCKETS], _MPNET_BUCKETS)
    if head == "masked":
        # Their head has this activation, whatever the layers have.
        theirs.must("hidden_act", ["gelu"], "gelu")
    roberta = _read_roberta(theirs, head)
    bias = RelativeConfig(num_buckets=_MPNET_BUCKETS, max_distance=_MPNET_DISTANCE)
    attention = dataclasses.replace(only_mixer(roberta), position=bias)
    return dataclasses.replace(roberta, token_types=0, attention=attention, position_embedding="learned")


def _mpnet_fields(c: BertConfig) -> dict[str, Any]:
    fields = _roberta_fields(c) | {"relative_attention_num_buckets": _MPNET_BUCKETS}
    del fields["type_vocab_size"]
    return fields


def _mpnet_tables(c: BertConfig) -> Tables:
    body = _body(
        c, "mpnet", embeddings="embeddings", layer="encoder.layer", skipped=_UNUSED_ROWS,
        attention={ours: f"attention.attn.{ours[0]}" for ours in ("query", "key", "value", "out")},
        feed_forward=("intermediate.dense", "output.dense"), norms=("attention.LayerNorm", "output.LayerNorm"),
    )  # fmt: skip
    bias = table("mpnet.encoder.relative_attention_bias", "layers.relative")
    heads, copies = _roberta_heads(c, "mpnet")
    return Tables(rules_of(body, bias, heads), copies, ("lm_head.*", "mpnet.pooler.*", *BUFFERS))


MPNET = Architecture(
    model_type="mpnet", family=BertConfig,
    classes=classes("MPNet"), bare=("MPNetModel",), prefix="mpnet", heads=_ROBERTA_HEADS,
    read=_read_mpnet, write=_mpnet_fields, tables=_mpnet_tables,
)  # fmt: skip
