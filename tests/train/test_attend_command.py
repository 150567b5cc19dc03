"""`manyheads attend`, as a user types it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from train.commands.cli import main
from train.data.tokenization.tokenizer import ByteTokenizer
from train.inference.labels import labels
from transformer.interpret.capture import readable

pytestmark = pytest.mark.usefixtures("one_device")


def test_all_layers_and_heads(whole, capsys, tmp_path):
    assert (
        main(["attend", str(whole), "--text", "value_3 = 5", "--pictures", "--out", str(tmp_path / "look" / "here")])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    folder = tmp_path / "look" / "here"
    size = (folder / "attention.html").stat().st_size
    assert lines == [
        "text      11 tokens",
        "layers    all 2",
        "heads     all 2",
        "memory    7.6 KiB for 4 maps of 11 × 11 weights",
        f"page      {folder / 'attention.html'} ({readable(size)})",
        f"pictures  {folder / 'heads.png'}",
        f"          {folder / 'layer-0-head-0.png'} and 3 more",
    ]
    written = {path.name for path in folder.iterdir()}
    pictures = {f"layer-{layer}-head-{head}.png" for layer in (0, 1) for head in (0, 1)}
    assert written == {"attention.html", "heads.png"} | pictures


def test_chosen_layers_and_heads_are_written_into_the_runs_folder(whole, capsys):
    assert main(["attend", str(whole), "--text", "a = 1", "--layers", "1", "--heads", "0, 0", "--step", "best"]) == 0
    output = capsys.readouterr().out
    assert "layers    1 (of 2, from 0)\nheads     0 (of 2, from 0)\n" in output
    folder = whole / "attention"
    assert {path.name for path in folder.iterdir()} == {"attention.html"}
    text = (folder / "attention.html").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))
    assert (data["layers"], data["heads"], data["rows"]) == ([1], [0], ["a", "␣", "=", "␣", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a", "--layers", "0,2"], "layers: got 2; allowed: 0 to 1"),
        (["--text", "a", "--heads", "7"], "heads: got 7; allowed: 0 to 1"),
        (["--text", "a", "--heads", "-1"], "--heads: got '-1'; allowed: comma-separated numbers from 0"),
        (["--text", "a", "--layers", ""], "--layers: got ''; allowed"),
        ([], "no text given: use --text TEXT"),
        (["--text", ""], "no text given: use --text TEXT"),
        (["--text", "\0"], "text: this run's tokenizer gives no tokens"),
        (["--text", "a" * 17], "text: its 17 tokens exceed the model's context of 16"),
        (["--text", "a", "--step", "5"], "step: got '5'; this run has latest, best"),
        (["--text", "a", "--out", "/dev/null/x"], "/dev/null/x: cannot be written: Not a directory"),
    ],
)
def test_it_refuses_in_one_line(whole, capsys, arguments, message):
    assert main(["attend", str(whole), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]


def test_without_a_run(tmp_path, capsys):
    assert main(["attend", str(tmp_path), "--text", "a"]) == 2
    assert "no run here" in capsys.readouterr().err


def test_a_part_of_a_character_is_shown_as_bytes():
    tokenizer = ByteTokenizer()
    assert labels(tokenizer, tokenizer.encode("aé")) == ["a", "\\xc3", "\\xa9"]
    assert labels(tokenizer, np.array([0])) == [""]
