"""The tasks of an encoder: each trained, scored, written down and used."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json

import jax
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tests.train.run_records import records
from tests.train.task_runs import KINDS, rows_of, run_of, write_rows
from train.checkpoints.checkpoint import Checkpoints
from train.checkpoints.stored import StoredCheckpoints
from train.commands.cli import main
from train.config import RunConfig, to_data
from train.config.sections import CheckpointConfig
from train.data.prepared.prepare import prepare
from train.inference.predict import as_task_run
from train.objectives import Causal, TokenClassification
from train.parallel.mesh import make_mesh, use_mesh
from train.program.program import Program
from train.run.loop import train
from train.run.run_files import load_run, read_metrics
from transformer.errors import UserError
from transformer.models.gpt import GPTConfig

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each task, when it is first asked for: its config, and how it ended."""
    folder = tmp_path_factory.mktemp("tasks")

    @functools.cache
    def run(kind: str):
        config = run_of(kind, write_rows(kind, folder), folder / kind)
        if kind == "token_classification":
            weighted = dataclasses.replace(config.objective, class_weights="balanced")
            config = dataclasses.replace(config, objective=weighted)
        return config, train(config)

    return run


def predictions_of(config: RunConfig) -> list[dict]:
    return [json.loads(line) for line in (config.directory / "predictions.jsonl").read_text("utf-8").splitlines()]


LEARNED = {
    "classification": ("accuracy", 0.9), "regression": ("pearson", 0.8), "token_classification": ("f1", 0.8),
    "multi_label_classification": ("f1_macro", 0.8), "answer": ("exact_match", 0.6), "choice": ("accuracy", 0.8),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_learned_scored_and_written_down(runs, kind):
    config, finished = runs(kind)
    name, least = LEARNED[kind]
    assert finished.scores.metrics[name] > least and finished.scores.perplexity is None
    assert records(config.directory, f"eval/{name}")[config.steps] == finished.scores.metrics[name]
    held_out = prepare(config.data, progress=False)
    (array,) = held_out.validation
    documents = {one.id: one for one in held_out.held_out(array)}
    found = predictions_of(config)
    assert [one["id"] for one in found] == list(documents)
    for one in found:
        document = documents[one["id"]]
        if kind == "token_classification":
            assert one["words"] == list(document.words) and one["gold"] == list(document.label)
            assert len(one["label"]) == len(one["scores"]) == len(one["words"])
        elif kind == "answer":
            assert one["gold"] == list(document.label.texts)
            assert document.target.startswith(one["label"], one["start"])
        elif kind == "regression":
            assert one["gold"] == document.label
        elif kind == "multi_label_classification":
            assert one["gold"] == list(document.label)
            assert one["label"] == [name for name, part in one["scores"].items() if part >= 0.5]
        else:
            assert one["gold"] == document.label and sum(one["scores"].values()) == pytest.approx(1, abs=1e-5)
            assert one["label"] == max(one["scores"], key=one["scores"].__getitem__)


def test_the_classes_are_scored_as_by_the_library_and_drawn(runs):
    config, finished = runs("classification")
    gold, told = ([one[name] for one in predictions_of(config)] for name in ("gold", "label"))
    assert finished.scores.metrics == {
        "accuracy": accuracy_score(gold, told), "f1": f1_score(gold, told, average="macro"),
        "matthews": matthews_corrcoef(gold, told),
    }  # fmt: skip
    assert finished.scores.accuracy == pytest.approx(accuracy_score(gold, told))
    for name in ("confusion.png", "classes.png"):
        assert (config.directory / name).read_bytes().startswith(b"\x89PNG")


def test_several_classes_are_scored_as_by_the_library(runs, tmp_path, capsys):
    config, finished = runs("multi_label_classification")
    found = predictions_of(config)
    gold, told = ([[name in one[field] for name in "xyz"] for one in found] for field in ("gold", "label"))
    assert [] in [one["gold"] for one in found]
    assert finished.scores.metrics == {
        "accuracy": accuracy_score(gold, told), "f1_micro": f1_score(gold, told, average="micro"),
        "f1_macro": f1_score(gold, told, average="macro"),
    }  # fmt: skip
    assert finished.scores.accuracy == pytest.approx(accuracy_score(gold, told))
    path = config.data.sources[0].path
    for threshold in ("0.1", "0.9"):
        capsys.readouterr()
        assert main(["predict", str(config.directory), "--file", path, "--threshold", threshold]) == 0
        for one in map(json.loads, capsys.readouterr().out.splitlines()):
            assert one["label"] == [name for name, part in one["scores"].items() if part >= float(threshold)]
    for given, message in (("1.5", "threshold: got 1.5; allowed: above 0, below 1"), ("x", "invalid float value: 'x'")):
        with contextlib.suppress(SystemExit):
            assert main(["predict", str(config.directory), "--file", path, "--threshold", given]) == 2
        assert message in capsys.readouterr().err
    other, _ = runs("classification")
    assert main(["predict", str(other.directory), "--file", path, "--threshold", "0.3"]) == 2
    assert "only multi_label_classification has one, and this is classification" in capsys.readouterr().err
    # Data that lacks a class is scored by the run's numbers.
    few = [row for row in rows_of("multi_label_classification") if "x" not in row["labels"]]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    assert (
        main(["eval", str(config.directory), "--data", str(tmp_path / "few.jsonl"), "--out", str(tmp_path / "e")]) == 0
    )
    again = [json.loads(line) for line in (tmp_path / "e" / "predictions.jsonl").read_text().splitlines()]
    assert [one["gold"] for one in again] == [row["labels"] for row in few]


@pytest.mark.parametrize("kind", KINDS)
def test_new_documents_are_told_as_the_held_out_ones_were(runs, kind, tmp_path, capsys):
    config, _ = runs(kind)
    path, out = config.data.sources[0].path, tmp_path / "told.jsonl"
    assert main(["predict", str(config.directory), "--file", path, "--out", str(out)]) == 0
    told = {one["id"]: one for one in map(json.loads, out.read_text("utf-8").splitlines())}
    assert len(told) == len(rows_of(kind)) and f"{len(told)} predictions: {out}" in capsys.readouterr().out
    for one in predictions_of(config):
        other = told[one["id"]]
        assert other.keys() == one.keys() - {"gold"}
        if kind == "regression":
            assert other["label"] == pytest.approx(one["label"], abs=1e-4)
        else:
            assert other["label"] == one["label"]


def test_texts_are_told_from_files_and_standard_input(runs, tmp_path, capsys, monkeypatch):
    config, _ = runs("token_classification")
    capsys.readouterr()
    (tmp_path / "texts.txt").write_text("Ann walks in New York\n\n" + "Ann " * 30 + "\n", "utf-8")
    assert main(["predict", str(config.directory), "--file", str(tmp_path / "texts.txt")]) == 0
    said = capsys.readouterr()
    first, blank, second = map(json.loads, said.out.splitlines())
    assert blank == {"id": "texts.txt:2", "label": None}
    assert first["label"] == ["B-PER", "O", "O", "B-LOC", "I-LOC"] and first["id"] == "texts.txt:1"
    # What lies beyond the row has no tag.
    seen = [tag is not None for tag in second["label"]]
    assert len(seen) == 30 and seen == sorted(seen, reverse=True) and not all(seen)
    assert "1 of 2 documents are longer than 40 tokens with [CLS] and [SEP]: cut" in said.err
    config, _ = runs("classification")
    capsys.readouterr()
    lines = json.dumps({"a": "ab", "b": "cmd"}) + "\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["predict", str(config.directory), "--file", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "middle"
    assert main(["predict", str(config.directory), "--file", str(tmp_path / "texts.txt")]) == 2
    assert "has the fields a, b; give a .jsonl or .csv file that has them" in capsys.readouterr().err


def test_a_run_that_tells_nothing_of_documents_is_refused(runs):
    loaded = load_run(runs("classification")[0].directory)
    config = dataclasses.replace(loaded.config, objective=Causal(), model=GPTConfig())
    with pytest.raises(UserError, match="its objective is causal.* Use manyheads generate a/run"):
        as_task_run(dataclasses.replace(loaded, config=config), "a/run")


def test_a_run_stops_early_keeps_its_best_and_does_not_go_on(tmp_path, capsys):
    path = write_rows("classification", tmp_path)
    config = run_of("classification", path, tmp_path / "run", steps=40)
    # It cannot become better: nothing is learned.
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-12, warmup_steps=0),
        evaluation=dataclasses.replace(config.evaluation, every=4, patience=2),
        checkpoint=dataclasses.replace(config.checkpoint, every=4, keep=1, best="f1"),
    )
    finished = train(config)
    assert finished.step == 12 and not finished.interrupted and finished.scores is not None
    said = capsys.readouterr().out
    assert "stopped early: best f1 " in said and "at step 4; no improvement in 2 evaluations" in said
    # Of equal ones the first.
    checkpoints = StoredCheckpoints(config.directory)
    assert checkpoints.best == 4
    again = train(config)
    assert again.step == 12 and again.scores is None
    assert "already finished at step 12; raise evaluation.patience to continue" in capsys.readouterr().out
    more = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, patience=4))
    assert train(more).step == 20


def test_the_best_evaluation_has_a_checkpoint_whenever_it_comes(tmp_path):
    path = write_rows("classification", tmp_path)
    config = run_of("classification", path, tmp_path / "run", steps=10)
    config = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, every=3),
        checkpoint=dataclasses.replace(config.checkpoint, every=4, keep=1, best="f1"),
    )
    train(config)
    curve = read_metrics(config.directory)["eval/selection_f1"]
    best = max(sorted(curve), key=curve.__getitem__)
    checkpoints = StoredCheckpoints(config.directory)
    assert checkpoints.best == best and set(checkpoints.steps) == {best, 10}


@pytest.mark.parametrize(("name", "values"), [("f1", (0.9, 0.5, 0.6)), ("mse", (0.1, 0.5, 0.4))])
def test_the_best_is_kept_by_its_metric(name, values, tmp_path):
    kind = "classification" if name == "f1" else "regression"
    config = run_of(kind, tmp_path / "none.jsonl", tmp_path / "run", checkpoint=CheckpointConfig(keep=1, best=name))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with use_mesh(mesh, config.mesh.rules), Checkpoints(config.directory, config.checkpoint) as checkpoints:
        state = Program(config, mesh).init()
        for step, value in enumerate(values, start=1):
            scores = {"loss": float(-step), name: value}
            checkpoints.save(state, step, {"config": to_data(config), "labels": ["a", "b"], "tokenizer": {}})
            checkpoints.record(step, scores)
            checkpoints.wait()
    checkpoints = StoredCheckpoints(config.directory)
    assert checkpoints.steps == [1, 3] and checkpoints.best == 1 and checkpoints.meta(1)["labels"] == ["a", "b"]


def test_balanced_weights_are_counted(runs):
    config, finished = runs("token_classification")
    assert config.objective.class_weights == "balanced" and finished.step == config.steps
    prepared = prepare(config.data, progress=False)
    weights = config.objective.with_data(prepared).class_weights
    counts = np.bincount(prepared.train[0].labels[prepared.train[0].labels >= 0])
    np.testing.assert_allclose(weights, counts.sum() / (len(counts) * counts))
    with pytest.raises(UserError, match="got 2 numbers; there are 4 classes: B-LOC, B-PER, I-LOC, O"):
        TokenClassification(class_weights=(1.0, 1.0)).with_data(prepared)
