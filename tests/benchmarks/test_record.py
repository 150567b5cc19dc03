"""Which results replace those on record, and which configs benchmarks have."""

from __future__ import annotations

import json

import pytest

from benchmarks import record, stage
from transformer.errors import UserError


def test_only_the_command_on_record_replaces_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")

    def folder_of(command, directory="runs/x"):
        return record.folder_for(directory, "runs/x", "x", command)

    # The first result is the record, whatever its command.
    assert folder_of("manyheads-bench x --steps 5") is None
    path = record.save("x", "manyheads-bench x", {"figure": 1})
    assert path.parent == tmp_path / "results" and json.loads(path.read_text())["result"] == {"figure": 1}
    assert folder_of("manyheads-bench x") is None
    assert folder_of("manyheads-bench x --steps 5") == "runs/x"
    assert folder_of("manyheads-bench x", "elsewhere") == "elsewhere"
    assert str(path) in capsys.readouterr().out


def test_a_shipped_config_outside_a_checkout(tmp_path, monkeypatch):
    assert stage.load(stage.CONFIGS / "tiny.yaml").name == "tiny"
    monkeypatch.setattr(stage, "CONFIGS", tmp_path / "configs")
    with pytest.raises(UserError, match=r"^configs/tiny\.yaml: .* in a checkout of the source$"):
        stage.load(tmp_path / "configs" / "tiny.yaml")
