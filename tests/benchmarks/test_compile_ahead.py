"""A training step compiled for accelerators that are absent, by their own compilers, through the command that users run.

The compilers are in environments of their own, several gigabytes of which are kept in the user's cache.
`MANYHEADS_REQUIRE_COMPILERS=1` makes those that are missing; without it their tests are skipped.
"""

from __future__ import annotations

import json
import os

import pytest

from benchmarks import compilers
from benchmarks.cli import main

TARGETS = {"tpu": "v5e:2x2", "gpu": "h100:4"}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\nbatch_size: 8\n"
        "model: {vocab_size: 64, max_length: 32, num_layers: 2, embed_dim: 64, attention: {num_heads: 2}}\n"
    )
    return path


@pytest.fixture(params=TARGETS)
def compiler(request, monkeypatch):
    """Platform and interpreter, of the user's own cache; what is planned is kept in the tests' cache."""
    with monkeypatch.context() as patch:
        patch.delenv("MANYHEADS_CACHE")
        python = compilers.find(request.param, make=os.environ.get("MANYHEADS_REQUIRE_COMPILERS") == "1")
    if python is None:
        pytest.skip(compilers.absent(request.param))
    return request.param, python


def test_a_plan_compiles_for_devices_that_are_absent(compiler, config_file, tmp_path, capsys, monkeypatch):
    platform, python = compiler
    # An answer that was kept would hide a compiler that no longer runs.
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    arguments = ["--target", TARGETS[platform], "--candidates", "2", "--workers", "1", "--compiler-python", python]
    assert main(["plan", str(config_file), *arguments, "--dir", str(tmp_path / "plans")]) == 0
    assert "2 of " in capsys.readouterr().out
    (record,) = (tmp_path / "plans").glob("plan_small_*.json")
    result = json.loads(record.read_text())["result"]
    assert result["failed"] == []
    best = result["layouts"][0]
    assert best["fits"] and best["compiled"]["memory"] > best["compiled"]["state"] > 0
    assert best["compiled"]["prediction"]["seconds"] > 0 and best["compiled"]["collectives"]
