"""Two runs side by side."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.train.run_records import records
from train.commands.cli import main
from train.run.run_files import read_origin

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def other(whole, config_file, tmp_path_factory):
    """A run with another rate, shorter, on other documents, that recorded every second step."""
    folder = tmp_path_factory.mktemp("other") / "run"
    changes = (
        *("--optimizer.learning-rate", "1e-3", "--steps", "8", "--log.every", "2", "--data.validation-fraction", "0.3"),
        *("--sample.max-tokens", "0"),
    )
    assert main(["train", str(config_file), "--run-dir", str(folder), *changes]) == 0
    return folder


def test_differences_are_reported_and_drawn(whole, other, tmp_path, capsys):
    assert main(["diff", str(whole), str(other), "--out", str(tmp_path / "new" / "curves.png")]) == 0
    said = capsys.readouterr().out
    assert "optimizer.learning_rate: 0.01 → 0.001" in said and "steps: 12 → 8" in said
    assert "run_dir" not in said
    one, two = read_origin(whole)["data"], read_origin(other)["data"]
    assert one != two and f"{one} → {two}" in said
    assert re.search(r"^versions +the same$", said, re.MULTILINE)
    a, b = records(whole), records(other)
    last = re.escape(f"{b[8] - a[12]:+.4g}")
    assert re.search(rf"train/loss +{a[12]:.5g} +{b[8]:.5g} +{last} *$", said, re.MULTILINE)
    for step in (2, 4, 6, 8):
        assert re.search(
            rf"^ +{step} +{re.escape(f'{a[step]:.5g}')} +{re.escape(f'{b[step]:.5g}')} ", said, re.MULTILINE
        )
    assert "eval/bits_per_byte" in said and "selection_loss\n" not in said
    assert (tmp_path / "new" / "curves.png").read_bytes()[1:4] == b"PNG"


def test_a_run_and_itself_differ_in_nothing(whole, capsys):
    assert main(["diff", str(whole), str(whole)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^config +the same$", said, re.MULTILINE) and "the same, " in said and "→" not in said


def test_missing_files_are_reported(whole, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    assert main(["diff", str(whole), str(bare)]) == 2
    assert "no run here (it has no config.yaml)" in capsys.readouterr().err
    shutil.copy(whole / "config.yaml", bare)
    assert main(["diff", str(whole), str(bare)]) == 0
    said = capsys.readouterr().out
    assert f"{bare} has no record of them" in said and f"{bare} has none yet" in said
    assert main(["diff", str(whole), str(bare), "--out", str(tmp_path / "curves.png")]) == 2
    assert "no common metric to draw" in capsys.readouterr().err
    (bare / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 2.5}) + "\n" + '{"step": 2, "tr')
    assert main(["diff", str(whole), str(bare), "--out", str(tmp_path / "curves.none")]) == 2
    assert "curves.none: cannot be written" in capsys.readouterr().err


def test_curves_of_one_run_and_of_several(whole, other, tmp_path, capsys):
    assert main(["plot", str(whole), "--out", str(tmp_path / "one.png")]) == 0
    assert main(["plot", str(whole), str(other), "--out", str(tmp_path / "two.png")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"curves    {tmp_path / 'two.png'}"
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("one", "two"))
    assert main(["plot", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
