"""Runs as real processes: to the end, killed and resumed, stopped by a signal, and on another number of devices."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import pytest

from tests.train.run_records import records
from tests.train.stops import asked_to_stop
from train.checkpoints.integrity import write_hashes
from train.checkpoints.stored import StoredCheckpoints
from train.commands.cli import main
from train.config import load
from train.run.run_files import load_run


def params_of(run_dir):
    return jax.device_get(load_run(Path(run_dir), "latest").params)


def wait_until(holds, process, seconds=120):
    """Until `holds()`, while the process lives."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError(f"it never came: {process.communicate()}")


def wait_for(run_dir, step, process):
    """Until the run has recorded `step`."""
    wait_until(lambda: (Path(run_dir) / "metrics.jsonl").exists() and step in records(run_dir), process)


def test_a_run_says_what_it_does_and_learns(whole):
    output = (whole / "output.txt").read_text()
    assert re.search(r"small: starting; [\d,]+ parameters on 1 × cpu \(dp\); 128 tokens a step", output)
    assert re.search(r"step 12/12  loss [\d.]+  lr [\d.e-]+  grad [\d.]+  [\d.]+k? tok/s  MFU –  left 0:00", output)
    assert re.search(r"bits per byte: this model [\d.]+, gzip -9 [\d.]+, xz -9 [\d.]+", output)
    assert "── sample ──\na" in output
    losses = records(whole)
    assert list(losses) == list(range(1, 13))
    assert losses[12] < losses[1] - 1
    assert set(records(whole, "eval/bits_per_byte")) == {4, 8, 12}
    assert load(whole / "config.yaml").run_dir == str(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_saves_and_says_how_to_go_on(start, whole, tmp_path, number):
    process = start(tmp_path / "run", "--checkpoint.every", "0", "--steps", "4000", "--evaluation.every", "0")
    wait_for(tmp_path / "run", 3, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    stopped = int(re.search(r"stopped after step (\d+); .* Run the same command again", output).group(1))
    checkpoints = StoredCheckpoints(tmp_path / "run")
    assert checkpoints.latest == stopped


def test_a_signal_in_the_last_evaluation_does_not_wait_for_its_end(config_file, tmp_path, capsys):
    # Once the steps are done.
    arguments = ("--steps", "3", "--evaluation.every", "0", "--checkpoint.every", "0")
    with asked_to_stop(looks=3):
        assert cli(config_file, tmp_path / "run", *arguments) == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert re.search(r"step 3: the evaluation was interrupted after 1 of \d+ batches", said)
    assert "stopped after step 3; the state is saved" in said and "for the results; all steps are done" in said
    checkpoints = StoredCheckpoints(tmp_path / "run")
    assert checkpoints.latest == 3
    assert 3 not in records(tmp_path / "run", "eval/loss")
    # What is missing is made when the command is given again, and then nothing is.
    assert cli(config_file, tmp_path / "run", *arguments) == 0
    said = capsys.readouterr().out
    assert "all steps are done, 3; making the results" in said and "step 3  held-out loss" in said
    assert 3 in records(tmp_path / "run", "eval/loss")
    assert cli(config_file, tmp_path / "run", *arguments) == 0
    assert "already finished at step 3" in capsys.readouterr().out


def test_keeps_the_newest_and_the_best(whole):
    checkpoints = StoredCheckpoints(whole)
    scores = records(whole, "eval/selection_loss")
    assert checkpoints.best == min(scores, key=scores.__getitem__)
    assert checkpoints.steps[-2:] == [8, 12]


def cli(config_file, run_dir, *arguments):
    return main(["train", str(config_file), "--run-dir", str(run_dir), *arguments])


def one_line(capsys):
    """The error, which is one line."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("manyheads: ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    return lines[0]


def test_a_checkpoint_of_another_config(config_file, whole, capsys):
    before = (whole / "metrics.jsonl").read_text()
    assert cli(config_file, whole, "--model.embed-dim", "64", "--seed", "3") == 2
    message = one_line(capsys)
    assert "seed: 0 → 3; model.embed_dim: 32 → 64. Another model.embed_dim makes it another run" in message
    assert "--run-dir" in message
    assert (whole / "metrics.jsonl").read_text() == before
    assert load(whole / "config.yaml").seed == 0


def test_a_checkpoint_of_a_version_that_knew_fewer_fields(config_file, whole, tmp_path, capsys):
    run = tmp_path / "old"
    shutil.copytree(whole, run)
    checkpoints = StoredCheckpoints(run)
    step = checkpoints.latest
    path = run / "checkpoints" / str(step) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["config"]["optimizer"]["moment_dtype"], meta["config"]["mesh"]["offload_optimizer"]
    path.write_text(json.dumps(meta))
    write_hashes(path.parents[1])
    assert cli(config_file, run, "--steps", str(step + 1)) == 0
    assert f"resuming after step {step}" in capsys.readouterr().out


def test_updates_that_are_never_finite_stop_the_run(config_file, tmp_path, capsys):
    arguments = ("--optimizer.learning-rate", "1e30", "--optimizer.clip-norm", "null", "--stability.max-skipped", "3")
    assert cli(config_file, tmp_path / "run", *arguments, "--steps", "40", "--checkpoint.every", "1") == 2
    message = one_line(capsys)
    assert re.search(r"step \d+: 3 updates in a row were skipped, the last on examples \d+, \d+", message)
    good = re.search(r"the last good checkpoint is at step (\d+)", message)
    # It was still being written.
    assert good and load_run(tmp_path / "run", good[1]).step == int(good[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.vocab-size", "100"), r"token id \d+ is outside the model's vocabulary of 100"),
        (("--data.sources.0.path", "/nowhere/*.txt"), "/nowhere"),
        (("--batch-size", "12", "--mesh.data", "8"), "batch_size: got 12, .* try 8 or 16"),
        (("--mesh.data", "3"), "3 devices, but there are 8"),
        (("--data.sources.0.limit", "1"), "no document with text to train on"),
        (("--model.max-length", "50000"), "shorter than|sequence"),
    ],
)
def test_bad_input_is_one_line_and_status_2(config_file, tmp_path, capsys, arguments, message):
    assert cli(config_file, tmp_path / "run", *arguments) == 2
    assert re.search(message, one_line(capsys))


def test_without_held_out_text_it_trains_and_saves(config_file, tmp_path, capsys):
    arguments = ("--data.validation-fraction", "0", "--model.vocab-size", "300", "--sample.prompt", "a" * 40)
    assert cli(config_file, tmp_path / "run", *arguments, "--steps", "4") == 0
    assert "── sample ──" in capsys.readouterr().out
    checkpoints = StoredCheckpoints(tmp_path / "run")
    assert checkpoints.latest == 4


def test_a_finished_run_stays_as_it_is(config_file, whole, capsys):
    before = (whole / "metrics.jsonl").read_text()
    assert cli(config_file, whole) == 0
    assert "already finished at step 12" in capsys.readouterr().out
    assert cli(config_file, whole, "--steps", "6") == 2
    assert "already at step 12, and steps is 6; set steps to 12 or more" in one_line(capsys)
    assert (whole / "metrics.jsonl").read_text() == before


def test_one_folder_is_for_one_process(config_file, start, tmp_path, capsys):
    process = start(tmp_path / "run", "--steps", "4000")
    wait_for(tmp_path / "run", 2, process)
    assert cli(config_file, tmp_path / "run") == 2
    assert "another process is training here" in one_line(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model.attention.backend", "cudnn"),
        ("--model.attention.soft-cap", "5", "--model.attention.backend", "xla"),
    ],
)
def test_a_named_backend_that_cannot_run_is_one_line(config_file, tmp_path, capsys, arguments):
    assert cli(config_file, tmp_path / "run", *arguments) == 2
    assert "cannot do this: it" in one_line(capsys)


def test_a_refused_run_leaves_no_folder(config_file, tmp_path, capsys):
    for options in (
        ("--mesh.tensor", "3"),
        ("--data.packing", "pad"),
        ("--model.attention.num-heads", "4", "--mesh.tensor", "8"),
    ):
        assert cli(config_file, tmp_path / "new", *options) == 2
        assert not (tmp_path / "new").exists(), one_line(capsys)


def test_a_run_folder_that_cannot_be_made(config_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli(config_file, tmp_path / "file" / "run") == 2
    assert str(tmp_path / "file") in one_line(capsys)


def test_an_unknown_device(start, tmp_path):
    for name in ("quantum", "gpu"):
        process = start(tmp_path / "run", "--platform", name)
        _, errors = process.communicate()
        assert process.returncode == 2
        assert errors.count("\n") == 1
        assert f"no device of platform {name!r} here" in errors


def test_profile_names_the_stages_of_the_model(config_file, tmp_path, capsys):
    assert cli(config_file, tmp_path / "run", "--steps", "4", "--profile", "2:3") == 0
    assert "profile of steps 2 to 3" in capsys.readouterr().out
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz"))
