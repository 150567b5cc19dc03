"""Small tasks of labelled documents that a tiny encoder learns, and the configs of their runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from train.config import RunConfig
from train.config.sections import CheckpointConfig, EvaluationConfig, LogConfig, SampleConfig
from train.data.prepared.prepare import DataConfig
from train.data.sources.source_config import FilesSource
from train.data.tokenization.tokenizer import CLS, SEP, TokenizerConfig
from train.objectives import OBJECTIVES
from train.optimizer import OptimizerConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.heads import AnswerHeadConfig, ChoiceHeadConfig, ClassificationHeadConfig, TokensHeadConfig

KINDS = ("classification", "multi_label_classification", "regression", "token_classification", "answer", "choice")

SOURCES = {
    "classification": {"text_field": "a", "target_field": "b", "label_field": "label"},
    "multi_label_classification": {"label_field": "labels", "label_kind": "classes"},
    "regression": {"label_field": "score", "label_kind": "number"},
    "token_classification": {"text_field": "words", "label_field": "tags", "label_kind": "tags"},
    "answer": {
        "text_field": "question", "target_field": "context", "label_field": "answers", "label_kind": "answers"
    },
    "choice": {"text_field": "a", "choice_fields": ("x", "y", "z"), "label_field": "right"},
}  # fmt: skip
SETTINGS = {
    "classification": {"too_long": "truncate"},
    "multi_label_classification": {"too_long": "truncate"},
    "token_classification": {"too_long": "truncate"},
    "answer": {"stride": 12, "answer_length": 8},
    "choice": {"num_choices": 3},
}
HEADS = {
    "classification": {"head": ClassificationHeadConfig(num_labels=3, pooling="mean")},
    "multi_label_classification": {"head": ClassificationHeadConfig(num_labels=3, multi_label=True, pooling="mean")},
    "regression": {"head": ClassificationHeadConfig(num_labels=1, pooling="mean")},
    "token_classification": {"head": TokensHeadConfig(num_labels=4)},
    "answer": {"head": AnswerHeadConfig()},
    "choice": {"head": ChoiceHeadConfig(pooling="mean")},
}


def rows_of(kind: str, count: int = 240) -> list[dict]:
    """Documents whose labels follow from what is in them."""
    rng = np.random.default_rng(0)

    def letters(low: int = 1, high: int = 7) -> str:
        return "".join(rng.choice(list("abcd"), rng.integers(low, high)))

    rows: list[dict] = []
    for number in range(count):
        if kind == "classification":
            label = ("left", "middle", "right")[number % 3]
            rows.append({"a": letters(), "b": letters() + label[0] + letters(), "label": label})
        elif kind == "multi_label_classification":
            held = [name for name in "xyz" if rng.random() < 0.4]
            rows.append({"text": "".join([*held, letters(), *held, letters(), *held]), "labels": held})
        elif kind == "regression":
            size = int(rng.integers(1, 20))
            rows.append({"text": "".join(rng.choice(["a", "x"], size)), "score": 0.0})
            rows[-1]["score"] = rows[-1]["text"].count("x") / size
        elif kind == "token_classification":
            names = [[("Ann", "B-PER")], [("New", "B-LOC"), ("York", "I-LOC")], [("walks", "O")], [("in", "O")]]
            chosen = [pair for place in rng.integers(0, 4, rng.integers(2, 6)) for pair in names[place]]
            rows.append({"words": [word for word, _ in chosen], "tags": [tag for _, tag in chosen]})
        elif kind == "answer":
            before, answer, after = letters(2, 24), str(rng.integers(100, 999)), letters(2, 24)
            found = {"text": [answer], "answer_start": [len(before) + 1]}
            rows.append({"question": "which?", "context": f"{before} {answer} {after}", "answers": found})
        else:
            right = number % 3
            texts = {name: letters() + ("z" if place == right else "") for place, name in enumerate("xyz")}
            rows.append({"a": letters(), "right": right, **texts})
    return rows


def write_rows(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)), "utf-8")
    return path


def run_of(kind: str, path: Path, folder: Path, **changes) -> RunConfig:
    """Some steps of a tiny encoder on the rows that `write_rows` wrote."""
    base = RunConfig(
        name=kind, run_dir=str(folder), steps=160, batch_size=16, length=40,
        model=BertConfig(
            vocab_size=264, max_length=48, num_layers=1, embed_dim=32, attention=SoftmaxConfig(num_heads=2), norm_first=True,
            dropout=0.0, attention_dropout=0.0, **HEADS[kind],
        ),
        objective=OBJECTIVES[kind](**SETTINGS.get(kind, {})),
        data=DataConfig(
            sources=(FilesSource(path=str(path), **SOURCES[kind]),), packing="documents",
            validation_fraction=0.25, tokenizer=TokenizerConfig(special_tokens=(CLS, SEP)),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=20),
        evaluation=EvaluationConfig(every=80, batches=2), checkpoint=CheckpointConfig(every=80),
        log=LogConfig(every=10, trackers=()), sample=SampleConfig(every=0),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)
