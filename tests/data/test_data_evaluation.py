"""Which held-out examples an evaluation sees: always the same, and at any time a fair sample of all sources and classes."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from train.config import parse, to_data
from train.data.evaluation import evaluation_batches
from train.data.prepared.prepare import prepare
from train.parallel.mesh import make_mesh, use_mesh
from train.run.evaluate import Evaluator
from train.run.steps import Run
from transformer.errors import UserError

BERT = {"family": "bert", "vocab_size": 300, "max_length": 32, "embed_dim": 16, "num_layers": 1, "dropout": 0.0,
        "attention_dropout": 0.0, "attention": {"num_heads": 2}, "head": {"kind": "classification", "num_labels": 3}}  # fmt: skip

SPECIAL = {"kind": "bytes", "special_tokens": ["[CLS]", "[SEP]"]}


def sorted_rows(path, sizes, word="text"):
    """A file whose rows come class by class."""
    rows = [f"{word} {number},{name}" for name, size in sizes.items() for number in range(size)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return {"kind": "files", "path": str(path), "label_field": "label"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sorted")
    big = sorted_rows(folder / "big.csv", {"a": 60, "b": 60, "c": 60})
    small = sorted_rows(folder / "small.csv", {"a": 60}, "other")
    train = sorted_rows(folder / "train.csv", {"a": 8, "b": 8, "c": 8}, "third")
    return parse(
        {"name": "x", "batch_size": 16, "microbatches": 2, "model": BERT, "objective": {"kind": "classification"},
         "data": {"sources": [train], "validation": [big, small], "packing": "documents", "tokenizer": SPECIAL},
         "run_dir": str(folder / "run"),
         "evaluation": {"batches": 2}, "sample": {"max_tokens": 0}, "log": {"trackers": []}},
        "test.yaml",
    )  # fmt: skip


def batches_of(config, prepared, batch_size=8, **options):
    return evaluation_batches(
        prepared,
        config.data,
        batch_size=batch_size,
        length=config.sequence_length,
        objective=config.objective,
        **options,
    )


def test_the_beginning_is_a_fair_sample(config):
    prepared = prepare(config.data, progress=False)
    batches = batches_of(config, prepared)
    assert len(batches) == 23 + 8
    # A third as many documents: a third as many batches, all along.
    for count in (4, 8, 16):
        assert abs(batches.sources[:count].count(1) - count / 4) <= 1
    labels = [batch["labels"][batch["example"] >= 0] for batch in batches]
    first = collections.Counter(
        np.concatenate([labels[index] for index in range(12) if batches.sources[index] == 0]).tolist()
    )
    assert len(first) == 3 and min(first.values()) > 0.15 * sum(first.values())


def test_every_example_comes_once_in_the_same_order(config):
    prepared = prepare(config.data, progress=False)
    seen = [np.concatenate([batch["example"] for batch in batches_of(config, prepared)]) for _ in range(2)]
    np.testing.assert_array_equal(*seen)
    assert sorted(one for one in seen[0].tolist() if one >= 0) == list(range(240))
    parts = [batches_of(config, prepared, process_index=index, process_count=2) for index in range(2)]
    for one, two, whole in zip(*parts, batches_of(config, prepared), strict=True):
        np.testing.assert_array_equal(np.concatenate([one["example"], two["example"]]), whole["example"])


@pytest.mark.usefixtures("one_device")
def test_scores_do_not_depend_on_the_size_of_a_batch(config):
    """And they say what each source has."""
    prepared = prepare(config.data, progress=False)
    mesh = make_mesh(config.mesh)
    found = []
    with use_mesh(mesh, config.mesh.rules):
        for size in (None, 16, 48):
            changed = parse(
                {**to_data(config), "evaluation": {"batches": 2, "batch_size": size}}, "test.yaml"
            )  # fmt: skip
            run = Run(changed, prepared, mesh)
            assert isinstance(run.held_out, Evaluator)
            found.append(run.held_out.evaluate(run.program.init().params, None, lambda: False))
    assert config.evaluation_batch_size == 8 and config.evaluation_batches == 4
    first = found[0].scores
    for other in found[1:]:
        assert other.scores.loss == pytest.approx(first.loss, rel=1e-5)
        assert other.scores.metrics == pytest.approx(first.metrics)
        assert [one["id"] for one in other.predictions] == [one["id"] for one in found[0].predictions]
    names = [array.name for array in prepared.validation]
    assert list(first.sources) == names and first.sources[names[0]] != first.sources[names[1]]
    mean = (180 * first.sources[names[0]] + 60 * first.sources[names[1]]) / 240
    assert mean == pytest.approx(first.loss, rel=1e-5)
    assert first.values()[f"loss of {names[0]}"] == first.sources[names[0]]


def test_a_size_that_the_devices_do_not_divide():
    with pytest.raises(UserError, match="evaluation.batch_size: got 0; allowed: 1 or more, or null"):
        parse({"name": "x", "evaluation": {"batch_size": 0}}, "test.yaml")


def test_windows_of_one_document_stay_together(tmp_path):
    rows = [
        {"question": "which one", "context": f"text number {number} " * (1 + number % 4), "answers": []}
        for number in range(20)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "files", "path": str(tmp_path / "rows.jsonl"), "text_field": "question", "target_field": "context",
              "label_field": "answers", "label_kind": "answers"}  # fmt: skip
    config = parse(
        {"name": "x", "model": BERT | {"head": {"kind": "answer"}, "max_length": 32},
         "objective": {"kind": "answer", "stride": 8, "answer_length": 8, "no_answer": True},
         "data": {"sources": [source], "validation": [source], "packing": "documents",
                  "tokenizer": SPECIAL}},
        "test.yaml",
    )  # fmt: skip
    prepared = prepare(config.data, progress=False)
    examples = config.objective.rows(prepared.validation[0], prepared.tokenizer, config.sequence_length)
    assert len(examples) > 30
    seen = np.concatenate([batch["example"] for batch in batches_of(config, prepared)])
    documents = examples.documents[seen[seen >= 0]]
    changes = 1 + np.sum(documents[1:] != documents[:-1])
    assert changes == 20 and not np.array_equal(documents, np.sort(documents))
