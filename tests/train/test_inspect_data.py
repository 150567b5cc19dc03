"""`manyheads inspect-data`: what a step sees, of a config and of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from tests.train.task_runs import run_of, write_rows
from train.commands.cli import main
from train.config import dump, load
from train.data.loader import train_batches
from train.data.prepared.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_device")

LINES = "text_field: source, target_field: target"


def shown(capsys, *arguments):
    status = main(["inspect-data", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_a_config_before_it_runs(config_file, capsys):
    status, said = shown(capsys, config_file, "--rows", "2")
    assert status == 0 and said.startswith("step 1: tokens [8, 16], targets [8, 16], weights [8, 16]")
    assert said.count("row ") == 2 and "predicted: 16 of 16 positions" in said and "value_" in said


def test_the_batch_is_that_of_the_step(whole, config_file, tmp_path, capsys):
    """Of a run's folder as of its config, with every array."""
    status, _ = shown(capsys, whole, "--step", "5", "--out", tmp_path / "rows.jsonl")
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    config = load(config_file)
    prepared = prepare(config.data, progress=False)
    batch = train_batches(
        prepared, config.data, batch_size=8, length=16, seed=config.seed, objective=config.objective
    ).batch(4)  # fmt: skip
    for name in ("tokens", "targets", "weights", "example"):
        np.testing.assert_array_equal([row[name] for row in rows], batch[name])
    assert (
        rows[0]["text"] == [prepared.tokenizer.decode(batch["tokens"][0]).replace("\0", "<|endoftext|>")]
        or rows[0]["text"]
    )
    assert [row["step"] for row in rows] == [5] * 8


def test_two_configs_compared(config_file, tmp_path, capsys):
    data = yaml.safe_load(config_file.read_text())
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(data | {"name": "same", "steps": 99}))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(data | {"seed": 1}))
    status, said = shown(capsys, config_file, "--diff", tmp_path / "same.yaml")
    assert status == 0 and "rows that differ: none" in said and "row 0" not in said
    status, said = shown(capsys, config_file, "--diff", tmp_path / "other.yaml", "--rows", "1")
    assert status == 1 and "rows that differ: 0, 1" in said and said.count("\nrow ") == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("classification", "label: left"),
        ("token_classification", " positions: O"),
        ("regression", "label: "),
        ("choice", "label: "),
    ],
)
def test_labels_and_pairs(kind, expected, tmp_path, capsys):
    config = run_of(kind, write_rows(kind, tmp_path), tmp_path / "run")
    (tmp_path / "task.yaml").write_text(dump(config))
    status, said = shown(capsys, tmp_path / "task.yaml", "--rows", "16")
    assert status == 0 and expected in said and "[CLS]" in said and "[SEP]" in said


def test_hidden_tokens_and_two_sides(tmp_path, capsys):
    config = {
        "name": "masked", "batch_size": 8, "model": {"family": "bert", "vocab_size": 300, "max_length": 32, "num_layers": 1,
        "embed_dim": 16, "attention": {"num_heads": 2}, "head": {"kind": "masked"}}, "objective": {"kind": "masked"},
        "data": {"packing": "documents", "validation_fraction": 0.3, "sources": [],
                 "tokenizer": {"kind": "bytes", "special_tokens": ["[MASK]", "[CLS]", "[SEP]"]}},
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(" ".join(f"word{rng.integers(9)}" for _ in range(9)))
    config["data"]["sources"] = [{"kind": "files", "path": f"{tmp_path}/*.txt"}]
    (tmp_path / "masked.yaml").write_text(yaml.safe_dump(config))
    status, said = shown(capsys, tmp_path / "masked.yaml")
    assert status == 0 and "[MASK]" in said and 'positions: ["' in said
    pairs = {
        "name": "pairs", "batch_size": 8, "objective": {"kind": "seq2seq"},
        "model": {"family": "vaswani", "vocab_size": 300, "max_length": 64, "embed_dim": 16, "attention": {"num_heads": 2}},
        "data": {"packing": "pad", "sources": [{"kind": "synthetic", "limit": 60}]},
    }  # fmt: skip
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(pairs))
    status, said = shown(capsys, tmp_path / "pairs.yaml")
    assert status == 0 and "  source (" in said and "  text (" in said


def test_no_such_step(config_file, capsys):
    assert main(["inspect-data", str(config_file), "--step", "0"]) == 2
    assert "step: got 0; allowed: 1 or more" in capsys.readouterr().err
