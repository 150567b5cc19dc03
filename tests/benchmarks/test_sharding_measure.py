"""Strategies measured on the devices at hand: each equals one device, and the report holds all that was asked."""

from __future__ import annotations

import json

import pytest

from benchmarks import record
from benchmarks.cli import main
from benchmarks.sharding import measure
from transformer.errors import UserError


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\nbatch_size: 16\nmodel: {vocab_size: 64, max_length: 16, num_layers: 2, embed_dim: 32, num_heads: 4}\n"
    )
    return path


def test_strategies_equal_one_device_and_are_told(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    result = measure.run(
        str(config_file), strategies=["dp", "fsdp", "pipeline", "expert"], rounds=2, output=str(tmp_path / "plans")
    )
    assert result["refused"].keys() == {"expert"}
    for one in result["strategies"].values():
        assert one["loss_difference"] < 1e-5
        assert one["gradient_difference"] < 1e-4
        assert one["seconds"]["rounds"] == 2
        assert one["compile_seconds"] > 0
        assert one["memory"]["state"] >= one["parameter_bytes"] + one["optimizer_bytes"]
    dp, fsdp = result["strategies"]["dp"], result["strategies"]["fsdp"]
    assert fsdp["optimizer_bytes"] < dp["optimizer_bytes"] / 7
    # So small a model's tied table is summed twice, once for each use, before the two are added.
    assert 1 <= dp["sent_bytes"] / dp["least_bytes"] < 1.1
    said = capsys.readouterr().out
    assert "expert: not here: the model has no mixture of experts" in said
    page = (tmp_path / "plans" / "small_sharding_8.html").read_text()
    assert page.count("<svg") == 1 and "The least, on paper" in page
    assert json.loads((tmp_path / "results" / "sharding_small_8_cpu.json").read_text())["result"] == result


def test_nothing_to_measure(config_file):
    with pytest.raises(UserError, match="no strategy goes: expert: the model has no mixture"):
        measure.run(str(config_file), strategies=["expert"])


def test_a_strategy_that_is_none(config_file, capsys):
    assert main(["sharding", str(config_file), "--strategies", "dp,ringg"]) == 2
    assert "got 'ringg'; allowed: pmap, dp" in capsys.readouterr().err


def test_a_target_without_its_compiler(config_file, tmp_path, capsys, monkeypatch):

    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    assert main(["sharding", str(config_file), "--target", "h100:8"]) == 2
    assert "no compiler for gpu here; --install makes an environment" in capsys.readouterr().err
