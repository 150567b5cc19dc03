"""A small corpus and a run over it, and texts with an encoder of them, which several files of tests share.

What is of the framework is imported in the fixtures: shapes and types are checked of what comes after pytest's set-up.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.devices import on_one_device
from tests.train.run_records import surroundings

ROOT = Path(__file__).parents[2]

CONFIG = """
name: small
steps: 12
batch_size: 8
model: {{vocab_size: 256, max_length: 16, num_layers: 2, embed_dim: 32, attention: {{num_heads: 2}}, dropout: 0.1}}
data:
  sources: [{{kind: files, path: "{corpus}/*.txt"}}]
  tokenizer: {{kind: bytes}}
  validation_fraction: 0.2
optimizer: {{learning_rate: 1e-2, warmup_steps: 2}}
evaluation: {{every: 4, batches: 2}}
checkpoint: {{every: 4}}
log: {{every: 1, trackers: []}}
sample: {{every: 0, max_tokens: 8, prompt: "a"}}
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """40 files of lines that follow a rule."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(40):
        lines = [f"value_{rng.integers(10)} = {rng.integers(100)}" for _ in range(20)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A file of texts whose class is a word in them."""
    from tests.train.fine_tuning import write_texts

    return write_texts(tmp_path_factory.mktemp("texts") / "rows.jsonl")


@pytest.fixture(scope="session")
def encoder(texts, tmp_path_factory):
    """The folder of a masked language model of these texts."""
    from tests.train.fine_tuning import config_of
    from train.run.loop import train

    folder = tmp_path_factory.mktemp("runs") / "encoder"
    with on_one_device():
        train(config_of(texts, folder))
    return folder


@pytest.fixture(scope="session")
def config_file(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG.format(corpus=corpus), encoding="utf-8")
    return path


@pytest.fixture
def start(config_file):
    """Start `manyheads train` on the small config as a real process; none outlives its test."""
    started = []

    def run(run_dir, *arguments, **options):
        command = [
            sys.executable,
            "-m",
            "train.commands.cli",
            "train",
            str(config_file),
            "--run-dir",
            str(run_dir),
            *arguments,
        ]
        process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            stream.close()


@pytest.fixture(scope="session")
def whole(config_file, tmp_path_factory):
    """The folder of a run that nothing interrupted, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "train.commands.cli", "train", str(config_file), "--run-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=surroundings(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text(result.stdout, encoding="utf-8")
    return folder
