"""Shipped configs at sizes that a test can train, with few data of the kinds that they read."""

from __future__ import annotations

import dataclasses
import json

from tests.changed import changed
from train.data.prepared.prepare import DataConfig
from train.data.sources.source_config import FilesSource, SourceConfig, SyntheticSource
from train.data.tokenization.tokenizer import TokenizerConfig
from transformer.models.recurrent_config import RecurrentConfig


def write_documents(folder):
    """Documents of all kinds, and few of them: the last evaluation reads all of the held-out ones."""
    texts = [f"Document {number} of forty. " + f"It says {number} and is short. " * 8 for number in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def shrunk(config, folder):
    """The config with small sizes, one step and data from `folder`, which starts from no other run."""
    objective = config.objective
    if hasattr(objective, "source_length"):
        objective = dataclasses.replace(objective, source_length=None)
    return dataclasses.replace(
        config,
        init_from=None,
        steps=1,
        batch_size=config.microbatches * 8,
        length=None,
        model=_smaller(config.model, 64 if config.data.label_kind == "preferences" else 32),
        # Its own sources may be a download of gigabytes: their reading is tested elsewhere.
        data=DataConfig(
            sources=(_source(config, folder),),
            # A vocabulary that exists has its special tokens already.
            tokenizer=TokenizerConfig(
                special_tokens=config.data.tokenizer.special_tokens or config.objective.special_tokens, sentinels=20
            ),
            packing=config.data.packing,
        ),
        objective=objective,
        # Samples and translations have tests of their own.
        evaluation=dataclasses.replace(config.evaluation, translations=0),
        sample=dataclasses.replace(config.sample, max_tokens=0),
    )


def _smaller(model, length):
    """The same kind of model, whose parts have the same settings and small sizes."""
    sizes = {"vocab_size": 512, "max_length": length, "num_layers": 2, "embed_dim": 32}
    if getattr(model, "source_vocab_size", None) is not None:
        sizes["source_vocab_size"] = 512
    if isinstance(model, RecurrentConfig):
        attention = changed(model.attention, **({"dim": None} if hasattr(model.attention, "dim") else {}))
        return dataclasses.replace(model, **sizes, hidden_dim=32, encoder_dim=None, attention=attention)

    def mixer(one):
        known = {"num_heads": 4, "num_kv_heads": 2 if getattr(one, "num_kv_heads", None) else None, "head_dim": None}
        return changed(one, **{name: size for name, size in known.items() if hasattr(one, name)})

    mlp = {"dim": None} | ({"num_experts": 4} if model.mlp.kind == "experts" else {})
    if getattr(model, "embedding_size", None) is not None:
        sizes["embedding_size"] = 16
    pattern = tuple(map(mixer, model.pattern[:3]))
    sizes["num_layers"] = max(len(pattern), 2)
    return changed(model, **sizes, attention=mixer(model.attention), pattern=pattern, mlp=mlp)


def _source(config, folder) -> SourceConfig:
    """A small source of the same kind of documents: with the same labels, pairs, or single texts."""
    first = config.data.sources[0]
    if isinstance(first, SyntheticSource):
        return dataclasses.replace(first, limit=100)
    if getattr(first, "holds", "texts") != "texts":
        return dialogue_source(first.holds, folder)
    if config.data.labelled:
        return _labelled_source(config, folder)
    if config.data.pairs:
        return SyntheticSource(limit=100)
    return FilesSource(path=str(folder / "texts.jsonl"))


def dialogue_source(holds, folder) -> SourceConfig:
    """Short dialogues: of an answer alone, or of a question and two answers, which need 48 tokens."""
    rows = []
    for number in range(40):
        if holds == "preferences":
            row = {"prompt": "", "chosen": f"{number}", "rejected": f"{number} or"}
        else:
            row = {"messages": [{"role": "assistant", "content": f"{number}"}]}
        rows.append(json.dumps(row) + "\n")
    path = folder / f"{holds}.jsonl"
    path.write_text("".join(rows))
    return FilesSource(path=str(path), holds=holds)


def _labelled_source(config, folder) -> SourceConfig:
    (label,) = {source.label_field for source in config.data.sources}
    first, kind = config.data.sources[0], config.data.label_kind
    choices, rows = first.choice_fields, []
    # The answer of a question has no class.
    classes = len(choices) or getattr(config.model.head, "classes", 1)
    for number in range(120):
        row = {"first": f"text {number}", label: number % classes}
        if kind == "number":
            row[label] = number / 60
        elif kind == "tags":
            row |= {"first": [f"w{place}" for place in range(classes)], label: [str(place) for place in range(classes)]}
        elif kind == "answers":
            row[label] = {"text": ["of"], "answer_start": [5]}
        row |= {"second": "some of it"} | dict.fromkeys(choices, "goes on")
        rows.append(json.dumps(row) + "\n")
    path = folder / f"{config.name}.jsonl"
    path.write_text("".join(rows))
    return FilesSource(
        path=str(path), text_field="first", target_field="second" if first.target_field else "",
        choice_fields=choices, label_field=label, label_kind=kind,
    )  # fmt: skip
