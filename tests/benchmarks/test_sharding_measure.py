"""Strategies measured on the devices at hand: each equals one device, and the report holds all that was asked."""

from __future__ import annotations

import json

import pytest

from benchmarks.cli import main
from benchmarks.record import RESULTS
from benchmarks.sharding.measuring import measure
from transformer.errors import UserError


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\nbatch_size: 16\n"
        "model: {vocab_size: 64, max_length: 16, num_layers: 2, embed_dim: 32, attention: {num_heads: 4}}\n"
    )
    return path


def test_strategies_equal_one_device_and_are_reported(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    result = measure.run(str(config_file), strategies=["dp", "fsdp", "pipeline", "expert"], rounds=2)
    # What a user measures does not replace what is published.
    assert published == {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
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
    assert "expert: not measured: the model has no mixture of experts" in said
    assert "These devices are virtual, parts of one CPU: compare bytes, not milliseconds." in said
    page = (tmp_path / "plans" / "sharding_small_8_4-strategies.html").read_text()
    assert page.count("<svg") == 1 and "Theoretical minimum" in page
    assert json.loads((tmp_path / "plans" / "sharding_small_8_4-strategies_cpu.json").read_text())["result"] == result


def test_each_strategy_with_each_value(config_file, tmp_path, capsys):
    vary = ["optimizer.moment_dtype=float32,bfloat16", "mesh.offload_optimizer=True"]
    arguments = ["sharding", str(config_file), "--strategies", "fsdp", "--rounds", "1", "--dir", str(tmp_path)]
    assert main([*arguments, *(part for one in vary for part in ("--vary", one))]) == 0
    (file,) = tmp_path.glob("*.json")
    assert file.name == "sharding_small_8_fsdp-moment_dtype-offload_optimizer_cpu.json"
    written = json.loads(file.read_text())
    wide, narrow = written["result"]["strategies"].values()
    assert written["result"]["strategies"].keys() == {
        "fsdp, moment_dtype float32, offload_optimizer True", "fsdp, moment_dtype bfloat16, offload_optimizer True",
    }  # fmt: skip
    assert written["command"].endswith(
        "--vary optimizer.moment_dtype=float32,bfloat16 --vary mesh.offload_optimizer=True"
    )
    # The first moment is half of what the optimiser keeps, but for a counter.
    assert narrow["optimizer_bytes"] / wide["optimizer_bytes"] == pytest.approx(0.75, rel=1e-3)
    assert wide["loss_difference"] < 1e-5


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("model.remat", "--vary: got 'model.remat'; allowed: a field and its values, as in model.remat=none,full"),
        ("model.rematt=full", "rematt"),
        ("model.remat=none,ful", "ful"),
    ],
)
def test_values_that_a_config_does_not_take(config_file, capsys, vary, message):
    assert main(["sharding", str(config_file), "--vary", vary]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_measure(config_file):
    with pytest.raises(UserError, match="no strategy is possible: expert: the model has no mixture"):
        measure.run(str(config_file), strategies=["expert"])


def test_an_unknown_strategy_is_refused_with_those_allowed(config_file, capsys):
    assert main(["sharding", str(config_file), "--strategies", "dp,ringg"]) == 2
    assert "got 'ringg'; allowed: pmap, dp" in capsys.readouterr().err


def test_a_target_that_leaves_all_on_the_device(config_file, capsys):
    assert main(["sharding", str(config_file), "--target", "h100:8", "--vary", "mesh.offload_optimizer=True"]) == 2
    assert "mesh.offload_optimizer: got true; the compiler for GPUs leaves" in capsys.readouterr().err


def test_a_target_without_its_compiler(config_file, tmp_path, capsys, monkeypatch):

    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    assert main(["sharding", str(config_file), "--target", "h100:8"]) == 2
    assert "no compiler for gpu; --install makes an environment" in capsys.readouterr().err
