"""The certificate passes what is exact and fails what is not; lengths, speeds and the table of support are made."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import record
from benchmarks.attention import certify, length, speed, support
from benchmarks.attention.cases import MASKS, MECHANISMS, SCORES
from benchmarks.cli import main
from transformer.attention.dispatch import BACKENDS, Backend

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "attention.md"


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Figures of a test are not results."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(certify, "MASKS", {"window": MASKS["window"]})
    monkeypatch.setattr(certify, "SCORES", {"score_mod": SCORES["score_mod"]})
    monkeypatch.setattr(certify, "HEADS", {"GQA": 2})
    names = ("fast weights, delta", "hard, argmax")
    monkeypatch.setattr(certify, "MECHANISMS", {name: MECHANISMS[name] for name in names})


def test_the_certificate(few_cases, results, monkeypatch):
    wrong = Backend(
        lambda q, k, v, variant: BACKENDS["reference"].attend(q, k, v, variant) * 1.001, lambda request: None
    )
    monkeypatch.setitem(BACKENDS, "wrong", wrong)
    result = certify.run(length=48)
    status = {}
    for row in result["rows"]:
        if row["dtype"] == "float32":
            status.setdefault(row["backend"], set()).add(row["status"])
    assert status["wrong"] == {"failed"}
    assert status["cudnn"] == {"not run"}
    for name in ("reference", "blockwise", "blockwise, looped", "ring", "ulysses", "chunked", "recurrent"):
        assert status[name] == {"passed"}, name
    kept = json.loads((results / "attention_certificate_cpu.json").read_text())["result"]
    assert kept["failed"] == result["failed"] > 0
    table = (results / "attention_certificate_cpu.md").read_text()
    assert "| softmax | ring | window | GQA | float32 |" in table and "needs an NVIDIA GPU" in table


def test_an_error_is_relative_and_never_hides_nan():
    assert certify.error([jnp.array([1.0, 0.0])], [np.array([1.0, 0.1])]) == pytest.approx(0.1 / 1.01**0.5)
    assert certify.error([jnp.array([jnp.nan])], [np.array([1.0])]) == float("inf")
    assert certify.error([jnp.zeros(2)], [np.zeros(2)]) == 0


def test_lengths_are_measured_and_drawn(results):
    result = length.run(budget=0.05, last=128, planned=256)
    assert all(points and points[0]["length"] == 64 for points in result["figures"].values())
    assert all(point["bytes"] > 0 for points in result["figures"].values() for point in points)
    planned = result["mebibytes_at_256"]
    assert planned["softmax, reference"] > planned["softmax, blockwise"] > 0
    assert (results / "attention_length_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_backends_are_timed_in_turn(results, monkeypatch):
    monkeypatch.setattr(speed, "TOKENS", {"cpu": 64})
    monkeypatch.setattr(speed, "LENGTHS", {"cpu": (32,)})
    monkeypatch.setattr(speed, "matmul_tflops", lambda dtype: 1.0)
    cases = speed.run(rounds=1)["cases"]
    assert len(cases) == 4
    assert all(case["blockwise_over_reference"]["rounds"] == 1 for case in cases)


def test_flops_count_the_causal_half_once():
    assert speed.flops(2, 10, 3, 4, causal=True, backward=False) == 2 * 2 * 2 * 3 * 4 * 100 / 2
    assert speed.flops(1, 10, 1, 4, causal=False, backward=True) == 7 * 2 * 4 * 100


def test_the_table_in_the_docs_is_what_the_command_prints(capsys):
    assert main(["attention", "--support"]) == 0
    table = capsys.readouterr().out.strip()
    assert table == support.table().strip()
    assert table in DOCS.read_text()


def test_something_must_be_asked_for(capsys):
    assert main(["attention"]) == 2
    assert "--certify" in capsys.readouterr().err
