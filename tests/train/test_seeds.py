"""Several seeds of one config: each is a run of its own, none is run twice, and their scores are summed up."""

from __future__ import annotations

import json
import re
import signal
import statistics

import pytest

from tests.train.run_records import records
from tests.train.stops import asked_to_stop
from train.commands.cli import main
from train.examine import seeds

pytestmark = pytest.mark.usefixtures("one_device")


def command(config_file, folder, *arguments):
    small = (
        "--steps",
        "3",
        "--evaluation.every",
        "0",
        "--checkpoint.every",
        "0",
        "--sample.max-tokens",
        "0",
        "--seed",
        "5",
        "--model.num-layers",
        "1",
        "--model.dropout",
        "0",
    )
    return main(["train", str(config_file), "--run-dir", str(folder), *small, *arguments])


def test_each_seed_is_a_run_and_the_table_is_of_all(config_file, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    # Nothing is learned: the losses are those of the seeds' own parameters.
    still = ("--optimizer.learning-rate", "1e-12")
    assert command(config_file, folder, "--seeds", "2", *still) == 0
    capsys.readouterr()
    times = {seed: (folder / f"seed-{seed}" / "metrics.jsonl").stat().st_mtime_ns for seed in (5, 6)}
    # One more, which ends early for it does not become better: the first two are not run again.
    early = ("--evaluation.every", "1", "--evaluation.patience", "1")
    assert command(config_file, folder, "--seeds", "3", *still, *early) == 0
    said = capsys.readouterr().out
    assert said.count("already finished at step 3") == 2 and "small-seed-7: starting" in said
    assert times == {seed: (folder / f"seed-{seed}" / "metrics.jsonl").stat().st_mtime_ns for seed in (5, 6)}
    result = json.loads((folder / "seeds.json").read_text())
    assert list(result["seeds"]) == ["5", "6", "7"] and result["config"]["seed"] == 5
    # Each is scored at its own end.
    curves = [records(folder / f"seed-{seed}", "eval/loss") for seed in (5, 6, 7)]
    assert list(map(max, curves)) == [3, 3, 2]
    losses = [curve[max(curve)] for curve in curves]
    assert len(set(losses)) == 3
    assert [result["seeds"][seed]["loss"] for seed in ("5", "6", "7")] == losses
    assert set(result["mean"]) == {"loss", "perplexity", "bits_per_byte"}
    assert result["mean"]["loss"] == pytest.approx(statistics.mean(losses))
    assert result["median"]["loss"] == pytest.approx(statistics.median(losses))
    assert result["deviation"]["loss"] == pytest.approx(statistics.stdev(losses))
    for label, value in (("5", losses[0]), ("median", statistics.median(losses)), ("mean", statistics.mean(losses))):
        assert re.search(rf"^ +{label} +{value:.4f} ", said, re.MULTILINE), label


def test_a_signal_stops_all_of_them(config_file, tmp_path, capsys):
    with asked_to_stop(looks=0):
        assert command(config_file, tmp_path / "run", "--seeds", "2") == 128 + signal.SIGTERM
    assert "Run the same command again to resume" in capsys.readouterr().out
    assert not (tmp_path / "run" / "seed-6").exists() and not (tmp_path / "run" / seeds.FILE).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "seeds: got 0; allowed: 1 or more"),
        (("--seeds", "2", "--profile", "1:2"), "--profile: traces a single run; leave out --seeds"),
        (("--seeds", "2", "--data.validation-fraction", "0"), "no held-out scores of its last step, 3"),
    ],
)
def test_invalid_arguments_are_refused(config_file, tmp_path, capsys, arguments, message):
    assert command(config_file, tmp_path / "run", *arguments) == 2
    assert message in capsys.readouterr().err
