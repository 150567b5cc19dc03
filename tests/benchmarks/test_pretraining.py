"""Pretrained against random weights: both arms are run and told, and what is finished is not run again."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import pretraining, record, stage
from benchmarks.cli import main
from benchmarks.report import report
from tests.train.fine_tuning import classifier_of, config_of, write_texts
from train.config import dump
from train.data.tokenization.tokenizer import TokenizerConfig
from transformer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Files of an encoder's and a classifier's config."""
    folder = tmp_path_factory.mktemp("configs")
    texts = write_texts(folder / "rows.jsonl")
    encoder, classifier = config_of(texts, folder / "encoder"), classifier_of(texts, folder / "tuned", steps=3)
    trained = TokenizerConfig(kind="bpe", vocab_size=264, special_tokens=encoder.data.tokenizer.special_tokens)
    encoder = dataclasses.replace(encoder, data=dataclasses.replace(encoder.data, tokenizer=trained))
    same = TokenizerConfig(kind="file", path="elsewhere/tokenizer.json")
    classifier = dataclasses.replace(classifier, data=dataclasses.replace(classifier.data, tokenizer=same))
    paths = {}
    for name, config in (("encoder", encoder), ("classifier", classifier)):
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(dump(config), encoding="utf-8")
    return paths


def test_both_arms_with_each_seed(configs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    result = pretraining.run(2, str(tmp_path / "runs"), **configs)
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "runs" / "pretraining_cpu.json").read_text())["result"] == json.loads(
        json.dumps(result)
    )
    assert {arm: len(values) for arm, values in result["accuracies"].items()} == {"pretrained": 2, "random": 2}
    pairs = list(zip(*result["accuracies"].values(), strict=True))
    assert result["difference"]["mean"] == pytest.approx(sum(one - other for one, other in pairs) / 2)
    for arm, rate in result["learning_rates"].items():
        tried = result["tried_with_seed_0"]
        assert tried[f"{arm} {rate:g}"] == max(tried[f"{arm} {other:g}"] for other in pretraining.LEARNING_RATES)
        assert tried[f"{arm} {rate:g}"] == result["accuracies"][arm][0]
        assert f"{arm}, learning rate {rate:g}, seed 1: accuracy" in said
    runs = {path.parent.name: path.read_text() for path in tmp_path.rglob("output.txt")}
    assert len(runs) == 1 + 4 + 2
    assert all(("weights from" in text) == name.startswith("pretrained") for name, text in runs.items())
    assert not list(tmp_path.rglob("random-*/checkpoints")) and list(tmp_path.rglob("encoder/checkpoints"))
    assert "tuned, held-out accuracy from pretrained weights" in report(tmp_path / "runs")
    assert not (tmp_path / "results").exists()

    # Only the encoder, which is at its end, is asked again.
    train = stage.train
    monkeypatch.setattr(
        stage, "train", lambda config: train(config) if config.name == "encoder" else pytest.fail("again")
    )
    assert pretraining.run(2, str(tmp_path / "runs"), **configs) == result

    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "train", stopped)
    with pytest.raises(UserError, match=r"pretraining: stopped in .*; run the same command again to resume"):
        pretraining.run(3, str(tmp_path / "runs"), **configs)


def test_the_command_passes_its_options_on(monkeypatch):
    given = []
    monkeypatch.setattr(pretraining, "run", lambda *options: given.append(options))
    assert main(["pretraining"]) == main(["pretraining", "--seeds", "2", "--dir", "here"]) == 0
    assert given == [(5, "runs/pretraining"), (2, "here")]
