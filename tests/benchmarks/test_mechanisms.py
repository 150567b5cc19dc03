"""The table of mechanisms: each trains from the command line that it names, and what is finished is not run again."""

from __future__ import annotations

import dataclasses
import json
import typing

import pytest

from benchmarks import mechanisms, record, stage
from benchmarks.cli import main
from benchmarks.mechanisms import CONFIGS, TASKS
from benchmarks.report import report
from train.config import load
from transformer.alignment.registry import ALIGNMENTS
from transformer.errors import UserError
from transformer.mixers.registry import MIXERS

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = {
    "translation": (
        "--model.embed-dim=8", "--model.hidden-dim=8", "--model.encoder-dim=4", "--data.sources.0.limit=80",
        "--data.validation-fraction=0.1", "--batch-size=8",
    ),
    "pairs": (
        "--model.embed-dim=8", "--model.attention.num-heads=2", "--data.sources.0.limit=80",
        "--data.validation-fraction=0.1", "--batch-size=8",
    ),
}  # fmt: skip


def small(name, *titles):
    task = TASKS[name]
    kept = {title: task.mechanisms[title] for title in titles}
    return dataclasses.replace(task, mechanisms=kept, overrides=(*task.overrides, *SMALL[name]))


def test_every_kind_is_compared():
    compared = [(task, fields) for task in TASKS.values() for fields in task.mechanisms.values()]
    models = [load(CONFIGS / task.config, task.arguments(fields)).model for task, fields in compared]
    kinds = {model.attention.kind for model in models} | {
        model.head.kind for model in models if getattr(model, "head", None) is not None
    }
    for config in (*MIXERS, *ALIGNMENTS):
        assert set(typing.get_args(typing.get_type_hints(config)["kind"])) <= kinds
    assert {"structured", "decomposable"} <= kinds
    normalizers = {getattr(model.attention, "normalizer", None) for model in models}
    assert {"sparsemax", "entmax15"} <= normalizers


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(mechanisms, "_timed", lambda config, minutes: {"steps": 3, "seconds_a_step": 0.1})
    chosen = {"translation": small("translation", "additive", "none"), "pairs": small("pairs", "decomposable")}
    result = mechanisms.run(0.01, directory=str(tmp_path / "runs"), chosen=chosen)
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "runs" / "mechanisms_cpu.json").read_text())["result"]
    assert kept == json.loads(json.dumps(result))
    rows = result["mechanisms"]["translation"]["rows"]
    assert set(rows) == {"additive", "none"} and rows["additive"]["steps"] == 3
    assert rows["additive"]["figure"] == rows["additive"]["loss"] > 0
    assert "--model.attention={kind: additive}" in rows["additive"]["arguments"]
    assert 0 <= result["mechanisms"]["pairs"]["rows"]["decomposable"]["figure"] <= 1
    assert "| none | `attention: {kind: none}` |" in said and "| decomposable | as it is |" in said
    reported = report(tmp_path / "runs")
    assert "A classifier of pairs of sentences, 0.01 minutes of training each (`manyheads-bench mechanisms" in reported
    assert "| decomposable | as it is |" in reported
    assert not (tmp_path / "results").exists()
    assert not list(tmp_path.rglob("checkpoints"))

    # What is finished is read.
    monkeypatch.setattr(stage, "train", lambda config: pytest.fail("it was trained before"))
    assert mechanisms.run(0.01, directory=str(tmp_path / "runs"), chosen=chosen) == kept


def test_steps_follow_from_the_time():
    task = small("translation", "dot")
    config = load(CONFIGS / task.config, task.arguments(task.mechanisms["dot"]))
    found = mechanisms._timed(config, 1.0)
    assert found["steps"] == max(int(60 / found["seconds_a_step"]), 1)
    assert mechanisms._for_steps(config, 30).optimizer.warmup_steps == 3


def test_names_that_do_not_exist(capsys):
    with pytest.raises(UserError, match="--tasks: got 'langauge'.*Did you mean 'language'"):
        mechanisms.run(tasks=["langauge"])
    assert main(["mechanisms", "--tasks", "pears"]) == 2
    assert "allowed: language, translation, reviews, pairs" in capsys.readouterr().err
