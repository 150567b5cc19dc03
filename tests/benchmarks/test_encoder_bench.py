"""The encoders' measurements run, at a tiny size, beside their peers."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import yaml

from benchmarks import record
from benchmarks.cli import main
from benchmarks.encoders import layouts, quality, step
from benchmarks.encoders.onnx_peer import OnnxPeer
from benchmarks.report import report
from tests.changed import changed
from tests.huggingface.ours import BERT, BERT_SPECIAL, WORDS, tokenizer_json, written
from train.config import RunConfig
from train.objectives import Classification
from transformer.errors import UserError
from transformer.models.heads import ClassificationHeadConfig

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Figures of a test are not results."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.torch
def test_a_fine_tuning_step_is_compared_with_torch(results):
    model = dataclasses.replace(BERT, head=ClassificationHeadConfig())
    objective = Classification()
    work = RunConfig(name="tiny", batch_size=2, length=8, model=model, objective=objective)
    for case, name in (("plain", "fine-tuning step"), ("padded", "fine-tuning step, padded rows")):
        result = step.run(rounds=1, steps=1, work=work, case=case)
        assert set(result["tokens_per_second"]) == {"manyheads", "torch"}
        assert f"| {name}, speed over torch |" in report(results)


@pytest.mark.torch
def test_all_arms_are_scored_on_the_same_documents(tmp_path, results, capsys):
    folder = tmp_path / "bert"
    written(BERT, folder, extra={"pad_token_id": 0})
    tokenizer_json(folder, BERT_SPECIAL)
    texts = tmp_path / "texts.csv"
    rows = [f"the {'cat' if n % 3 else 'dogs'} sat on {WORDS[n % 15]},{'good' if n % 3 else 'bad'}" for n in range(60)]
    texts.write_text("\n".join(["text,label", *rows]))
    data = {
        "sources": [{"kind": "files", "path": str(texts), "label_field": "label", "labels": ["bad", "good"]}],
        "validation_fraction": 0.2, "packing": "documents", "tokenizer": {"kind": "file", "path": "none/tokenizer.json"},
    }  # fmt: skip
    model = dataclasses.asdict(dataclasses.replace(BERT, head=ClassificationHeadConfig()))
    config = {
        "name": "tiny", "steps": 2, "batch_size": 8, "init_from": "none", "model": model, "data": data,
        "objective": {"kind": "classification"},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    result = quality.run(1, str(tmp_path / "runs"), config=path, source=str(folder))
    assert {arm: len(values) for arm, values in result["accuracies"].items()} == dict.fromkeys(quality.ARMS, 1)
    assert "tiny, held-out accuracy, LoRA, median" in report(tmp_path / "runs")
    capsys.readouterr()
    quality.run(1, str(tmp_path / "runs"), config=path, source=str(folder))
    runs = {path.parent.name for path in tmp_path.rglob("output.txt")}
    assert runs == {"manyheads-0", *(f"LoRA-{rate:g}-0" for rate in quality.ADAPTER_RATES)}


def test_embedding_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert main(["embedding", "--rounds", "1"]) == 2
    assert "pip install --no-deps sentence-transformers" in capsys.readouterr().err


def test_a_peer_that_cannot_run_says_why(tmp_path):
    with pytest.raises(
        UserError, match="sentence-transformers' ONNX backend ended: .*(sentence_transformers|optimum|none)"
    ):
        OnnxPeer(sys.executable, tmp_path / "none", ["a text"], tmp_path)


@pytest.mark.all_devices
@pytest.mark.torch
def test_an_import_in_every_layout_computes_what_transformers_does(tmp_path, results):
    folder = tmp_path / "bert"
    written(changed(BERT, max_length=64, attention={"num_heads": 4}), folder, extra={"pad_token_id": 0})
    tokenizer_json(folder, BERT_SPECIAL)
    result = layouts.run(8, str(folder), texts=[" ".join(WORDS[: 1 + n % 9]) for n in range(layouts.TEXTS)])
    for found in result["import_layouts"].values():
        assert found["largest_difference"] < 1e-5 * found["largest_number"] and found["least_cosine"] > 0.99999
    assert "imported encoder, tensor on 8 devices" in report(results)
