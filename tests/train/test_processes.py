"""Several processes over loopback: the losses of one, checkpoints that both can read, and no hang when something is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.devices import on_one_device
from tests.train.run_records import surroundings
from tests.train.task_runs import run_of, write_rows
from train.config import dump
from train.run.loop import train

CONFIG = """
name: several
steps: 4
batch_size: 16
model: {vocab_size: 256, max_length: 16, num_layers: 2, embed_dim: 32, attention: {num_heads: 4}}
data: {sources: [{kind: files, path: TEXT}], tokenizer: {kind: bytes}, validation_fraction: 0.2}
optimizer: {learning_rate: 0.01, schedule: constant}
evaluation: {every: 2}
checkpoint: {every: 2}
log: {every: 1, trackers: []}
mesh: {strategy: fsdp}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    for index in range(8):
        (folder / f"text{index}.txt").write_text(f"A text, number {index}, of some length. " * 20)
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("TEXT", str(folder / "*.txt")))
    return path


def start(config, run, *options, processes=1, devices=4, wait=True, environments=({},) * 2):
    """What each process returned and printed; the processes themselves if they are not to be waited for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes), "--heartbeat-seconds", "10"]
    started = []
    for index in range(processes):
        own = [*several, "--process-id", str(index)] if processes > 1 else []
        mine = [option[index] if isinstance(option, tuple) else option for option in options]
        command = [sys.executable, "-m", "train.commands.cli", "train", str(config), "--run-dir", str(run)]
        command += ["--devices", str(devices), *own, *mine]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, **pipes, text=True, env=surroundings(**environments[index])))
    if not wait:
        return started
    said = [process.communicate(timeout=240) for process in started]
    return [(process.returncode, *words) for process, words in zip(started, said, strict=True)]


def steps_in(run):
    """Of the newest checkpoint."""
    return max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items() if name.endswith("/loss")}


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    ((code, _, errors),) = start(config, run)
    assert code == 0, errors
    return losses(run)


def test_two_processes_compute_what_one_does_and_share_one_log(config, one, tmp_path):
    run = tmp_path / "run"
    first, second = start(config, run, processes=2, devices=2)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    # The transport on CPUs prints lines of its own, its threads' mingled, on any process.
    assert "step 4/4" in first[1]
    assert not re.search("several|step|loss|manyheads", second[1])
    two = losses(run)
    assert two.keys() == one.keys()
    assert two == pytest.approx(one, rel=1e-5)


def test_processes_with_different_configs(config, tmp_path):
    ended = start(config, tmp_path / "run", "--seed", ("0", "1"), processes=2, devices=1)
    assert [code for code, _, _ in ended] == [2, 2]
    assert "processes 1 have a different config from process 0; process 1: seed: 0 → 1" in ended[0][2]


def test_a_process_that_dies_stops_the_others(config, tmp_path):
    run = tmp_path / "run"
    first, second = start(config, run, "--steps", "100000", processes=2, devices=1, wait=False)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints").exists() or not any(
        path.name.isdigit() for path in (run / "checkpoints").iterdir()
    ):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[1]
        time.sleep(0.2)
    os.kill(second.pid, signal.SIGKILL)
    second.communicate()
    # It may not hang, whatever collective it is in.
    _, errors = first.communicate(timeout=90)
    # Not that of a user's mistake. JAX itself may end it before this code does.
    assert first.returncode not in (0, 2)
    assert errors.count("manyheads: process 0 of 2 stops because another one died or is unreachable") == 1
    assert "Traceback" not in errors
    # JAX's own words, of whichever of its parts noticed first.
    assert re.search(r"[Tt]ask:? ?1\b|heartbeats\):\s+1\b", errors), errors
    # What is left goes on, here alone.
    ((code, said, errors),) = start(config, run, "--steps", str(steps_in(run) + 2), "--allow-changed", "steps")
    assert code == 0 and "resuming after step" in said, errors


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_users_error_in_one_process_ends_all_with_its_line(config, tmp_path, guilty):
    """Its cache is a file, so that it cannot prepare what the other one reads."""
    (tmp_path / "file").write_text("")
    environments = [{}, {}]
    environments[guilty] = {"MANYHEADS_CACHE": str(tmp_path / "file")}
    began = time.monotonic()
    ended = start(config, tmp_path / "run", processes=2, devices=1, environments=environments)
    assert time.monotonic() - began < 200
    for index, (code, _, errors) in enumerate(ended):
        assert code == 2, ended
        own = "manyheads: " if index == guilty else f"manyheads: process {guilty}: "
        (line,) = (line for line in errors.splitlines() if line.startswith("manyheads"))
        assert line.startswith(f"{own}cannot write {tmp_path / 'file'}"), ended
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-processes", "2"], "several processes also need --coordinator and --process-id"),
        (
            ["--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id: got 2; allowed: 0 to 1",
        ),
    ],
)
def test_flags_that_do_not_go_together(config, tmp_path, options, message):
    ((code, _, errors),) = start(config, tmp_path / "run", *options)
    assert code == 2
    assert message in errors


def test_a_task_is_scored_over_all_processes(tmp_path):
    kind = "token_classification"
    one = run_of(kind, write_rows(kind, tmp_path), tmp_path / "one", steps=3)
    with on_one_device():
        train(one)
    (tmp_path / "task.yaml").write_text(dump(one))
    for code, _, errors in start(tmp_path / "task.yaml", tmp_path / "two", processes=2, devices=1):
        assert code == 0, errors
    found = [
        [json.loads(line) for line in (tmp_path / run / "predictions.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    for first, second in zip(*found, strict=True):
        assert first["id"] == second["id"] and first["gold"] == second["gold"]
        assert second["scores"] == pytest.approx(first["scores"], abs=1e-3)
