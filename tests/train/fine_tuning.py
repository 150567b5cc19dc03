"""A tiny masked language model, a classifier of the same shape, and their parameters by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax import nnx

from train.config import RunConfig
from train.config.sections import CheckpointConfig, EvaluationConfig, LogConfig, SampleConfig
from train.data.prepared.prepare import DataConfig
from train.data.sources.source_config import FilesSource
from train.data.tokenization.tokenizer import CLS, MASK, SEP, TokenizerConfig
from train.objectives import Classification, Masked
from train.optimizer import OptimizerConfig
from train.trained import dotted
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.heads import ClassificationHeadConfig

SPECIAL = (MASK, CLS, SEP)
SMALL = {
    "vocab_size": 264,
    "max_length": 24,
    "num_layers": 2,
    "embed_dim": 32,
    "attention": SoftmaxConfig(num_heads=2),
    "norm_first": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def write_texts(path: Path) -> Path:
    """Texts whose class is a word in them."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(160):
        label = ("bad", "good")[number % 2]
        before, after = ("".join(rng.choice(list("wxyz"), rng.integers(1, 6))) for _ in range(2))
        rows.append({"text": f"{before} {label} {after}", "class": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(texts, folder, **changes) -> RunConfig:
    """A few steps of a masked language model on the texts."""
    base = RunConfig(
        name=folder.name, run_dir=str(folder), steps=4, batch_size=8, length=24, model=BertConfig(**SMALL),
        objective=Masked(),
        data=DataConfig(
            sources=(FilesSource(path=str(texts)),), packing="documents", validation_fraction=0.2,
            tokenizer=TokenizerConfig(special_tokens=SPECIAL),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
        evaluation=EvaluationConfig(every=2), checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1, trackers=()), sample=SampleConfig(every=0),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def classifier_of(texts, folder, **changes) -> RunConfig:
    """The same encoder with a head over classes."""
    base = config_of(texts, folder)
    source = dataclasses.replace(base.data.sources[0], label_field="class")
    tuned = dataclasses.replace(
        base,
        model=BertConfig(**SMALL, head=ClassificationHeadConfig(pooling="mean")),
        objective=Classification(),
        data=dataclasses.replace(base.data, sources=(source,)),
        # Writing takes longer than the steps.
        evaluation=EvaluationConfig(every=20), checkpoint=CheckpointConfig(every=20),
    )  # fmt: skip
    return dataclasses.replace(tuned, **changes)


def by_path(params):
    """Dotted name → array."""
    return {dotted(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(params)}
