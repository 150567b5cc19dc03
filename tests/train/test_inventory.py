"""The list of a run's checkpoints."""

from __future__ import annotations

import shutil

import pytest

from train.checkpoints.stored import StoredCheckpoints
from train.commands.cli import main
from train.files import locked


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def rows(capsys):
    """The table's rows by step."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {int(words[0]): words for words in lines if words and words[0].isdecimal()}


def test_the_list_verifies(run, capsys):
    stored = StoredCheckpoints(run)
    assert main(["checkpoints", str(run)]) == 0
    table = rows(capsys)
    assert list(table) == stored.steps
    assert "latest" in " ".join(table[stored.latest]) and "best" in " ".join(table[stored.best])
    assert all("kB" in words for words in table.values())
    (stored.folder(8) / "params" / "_METADATA").write_text("")
    assert main(["checkpoints", str(run)]) == 1
    assert " ".join(rows(capsys)[8]).endswith("damaged: params/_METADATA has changed")


def test_removal(run, capsys):
    assert main(["checkpoints", str(run), "--remove", "8,7"]) == 2
    assert "--remove: got '7'; this run has" in capsys.readouterr().err
    with locked(run / ".lock-0"):
        assert main(["checkpoints", str(run), "--remove", "8"]) == 2
    assert "a process is training here" in capsys.readouterr().err and 8 in StoredCheckpoints(run).steps
    assert main(["checkpoints", str(run), "--remove", "8"]) == 0
    assert list(rows(capsys)) == StoredCheckpoints(run).steps and 8 not in StoredCheckpoints(run).steps


def test_no_run(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
