"""Checkpoints that changed on the disk: none is used, each is named, and the one before it is taken."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest

from tests.devices import on_one_device
from tests.train.run_records import records
from train.checkpoints.checkpoint import DAMAGED, set_aside_damaged
from train.checkpoints.integrity import HASHES, damage, write_hashes
from train.checkpoints.selection import Selection
from train.checkpoints.stored import SCORES, StoredCheckpoints, best_of
from train.commands.cli import main
from train.run.run_files import load_run
from transformer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = """
name: small
steps: 3
batch_size: 8
model: {{vocab_size: 300, max_length: 16, num_layers: 1, embed_dim: 16, attention: {{num_heads: 2}}}}
data: {{sources: [{{kind: files, path: "{folder}/*.txt"}}], validation_fraction: 0.3}}
optimizer: {{ema_decay: 0.5}}
checkpoint: {{every: 1, keep: 3}}
evaluation: {{every: 1, batches: 1}}
log: {{every: 1, trackers: []}}
sample: {{max_tokens: 0}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("integrity")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"text {number} " * 20)
    (folder / "small.yaml").write_text(CONFIG.format(folder=folder))
    with on_one_device():
        assert main(["train", str(folder / "small.yaml"), "--run-dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to damage."""
    return shutil.copytree(trained / "run", tmp_path / "run")


def resume(trained, run, *arguments):
    return main(["train", str(trained / "small.yaml"), "--run-dir", str(run), *arguments])


def files_of(run, step=3):
    """The files of a checkpoint whose bytes matter, largest last."""
    found = [path for path in (run / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    folder = run / "checkpoints" / str(step)
    later = {folder / "_CHECKPOINT_METADATA", folder / "commit_success.txt"}
    return sorted((path for path in found if path not in later), key=lambda path: path.stat().st_size)


def first(run, step=3):
    return damage(run / "checkpoints" / str(step))


def rewritten(run, change, step=3):
    """What a checkpoint says of its run, changed by someone who changes its hash too."""
    path = run / "checkpoints" / str(step) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    write_hashes(run / "checkpoints" / str(step), ("_CHECKPOINT_METADATA", "commit_success.txt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.pop("config"), "not what a run stores: config missing or of another type"),
        (lambda meta: meta.update(tokenizer=[], labels=3), "not what a run stores: tokenizer, labels missing"),
        (lambda meta: meta["tokenizer"].update({"../../x": "a"}), "names the file '../../x', which is not inside"),
        (
            lambda meta: meta["tokenizer"].update({"tokenizer_about.json/x": "a"}),
            "has no file 'tokenizer_about.json/x'",
        ),
        (lambda meta: meta["tokenizer"].update({"x": 7}), "its tokenizer has no file 'x' with a text in it"),
        (lambda meta: meta["tokenizer"].update({"x" * 300: "a"}), "its tokenizer has no file 'xxx"),
    ],
)
def test_what_a_hostile_checkpoint_says_of_its_run(run, change, message):
    rewritten(run, change)
    with pytest.raises(UserError, match=message):
        load_run(run, "latest")


@pytest.mark.parametrize("name", ["meta/metadata", "params/_METADATA", HASHES])
def test_a_named_pipe_or_a_device_in_a_checkpoint_is_not_read(run, name):
    path = run / "checkpoints" / "3" / name
    path.unlink()
    os.mkfifo(path)
    assert first(run) == f"{name} is not a file"
    path.unlink()
    path.symlink_to("/dev/zero")
    if name != HASHES:
        write_hashes(run / "checkpoints" / "3", ("_CHECKPOINT_METADATA", "commit_success.txt"))
    assert first(run) == f"{name} is not a file"
    load_run(run, "latest")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "[1]\n", r"metrics.jsonl:1: not a step with numbers; delete this line"),
        ("metrics.jsonl", '{"step": 1, "train/loss": "low"}\n', r"metrics.jsonl:1: not a step with numbers"),
        ("metrics.jsonl", '{"train/loss": 1.0}\n', r"metrics.jsonl:1: not a step with numbers"),
        ("origin.json", "{", r"origin.json: cannot be read: .*; delete it"),
        ("origin.json", "[]", r"origin.json: not the record of a run's data and versions; delete it"),
        ("origin.json", '{"data": "a", "versions": {"jax": 1}}', r"origin.json: not the record of"),
    ],
)
def test_records_of_a_run_that_are_not_its_own(run, capsys, name, text, message):
    (run / name).write_text(text)
    assert main(["diff", str(run), str(run)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_whole_checkpoint_has_every_item_once(trained):
    stored = StoredCheckpoints(trained / "run")
    assert stored.steps == [1, 2, 3] and all(stored.damage(step) is None for step in stored.steps)
    kept = {}
    for item in ("params", "average", "state"):
        described = json.loads((stored.folder(3) / item / "_METADATA").read_text())["tree_metadata"].values()
        kept[item] = ["/".join(key["key"] for key in one["key_metadata"]) for one in described]
    assert kept["params"] == kept["average"]
    # Of the state neither, but the moments of each parameter.
    assert not [path for path in kept["state"] if path.startswith(("params", "ema")) and path.count("/")]
    assert sum(path.startswith("opt_state") for path in kept["state"]) > 2 * len(kept["params"])


def test_no_bit_flips_unseen(run):
    rng, paths = np.random.default_rng(0), files_of(run)
    for number in range(60):
        path = paths[number % len(paths)]
        before = path.read_bytes()
        data = bytearray(before)
        if not data:
            continue
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        # White space around JSON is of no importance.
        if path.name != HASHES:
            assert path.name in first(run)
        path.write_bytes(before)
        assert first(run) is None


WAYS = {
    "cut": lambda folder: _write(folder, lambda data: data[: len(data) // 2]),
    "empty file": lambda folder: _write(folder, lambda data: b""),
    "longer": lambda folder: _write(folder, lambda data: data + b"x"),
    "no file": lambda folder: files_of(folder.parents[1])[-1].unlink(),
    "no item": lambda folder: shutil.rmtree(folder / "params"),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "no hashes": lambda folder: (folder / HASHES).unlink(),
    "other hashes": lambda folder: (folder / HASHES).write_text((folder / HASHES).read_text().replace("0", "1")),
    "no end": lambda folder: (folder / "commit_success.txt").unlink(),
    "no JSON": lambda folder: (folder / "meta" / "metadata").write_text("{"),
    "hashes of another kind": lambda folder: (folder / HASHES).write_text("[]"),
}


def _write(folder, change):
    path = files_of(folder.parents[1])[-1]
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_newest_one_is_set_aside_and_named(run, way, capsys):
    WAYS[way](run / "checkpoints" / "3")
    stored = StoredCheckpoints(run)
    set_aside_damaged(stored)
    assert stored.steps == [1, 2] and (run / DAMAGED / "3").is_dir()
    said = capsys.readouterr().out
    assert re.search(
        r"the checkpoint of step 3 is damaged \(.+\); it was moved to .*, and that of step 2 is the newest\n", said
    )


def test_a_run_resumes_from_the_one_before(trained, run, capsys):
    WAYS["cut"](run / "checkpoints" / "3")
    assert resume(trained, run) == 0
    said = capsys.readouterr().out
    assert "the checkpoint of step 3 is damaged" in said and "resuming after step 2" in said
    assert StoredCheckpoints(run).steps == [1, 2, 3] and first(run) is None


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(trained, run, capsys):
    """A checkpoint is written before its step is evaluated."""
    before = records(run, "eval/loss")
    shutil.rmtree(run / "checkpoints" / "3")
    scores = json.loads((run / SCORES).read_text())
    (run / SCORES).write_text(json.dumps({"1": scores["1"]}))
    lines = [
        line
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if not ('"step": 2' in line and "eval" in line)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert resume(trained, run) == 0
    said = capsys.readouterr().out
    assert "resuming after step 2" in said and "step 2  held-out loss" in said
    assert records(run, "eval/loss") == before
    assert json.loads((run / SCORES).read_text()) == scores


def test_what_orbax_writes_last_may_be_lost(trained, run, capsys):
    (run / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text("{")
    assert resume(trained, run, "--steps", "4") == 0
    assert "resuming after step 3" in capsys.readouterr().out


def test_without_a_whole_one_it_stops(trained, run, capsys):
    for step in (1, 2, 3):
        (run / "checkpoints" / str(step) / HASHES).unlink()
    assert resume(trained, run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.count("is damaged") == 3 and "no other is left" in line
    # Given again it does not begin anew in the same folder.
    assert resume(trained, run) == 2 and StoredCheckpoints(run).steps == [1, 2, 3]


def test_steps_that_are_taken_again_are_evaluated_again(trained, run, capsys):
    """Scores and the record of the end of an earlier life are of no use."""
    assert main(["checkpoints", str(run), "--remove", "2,3"]) == 0
    wrong = json.loads((run / SCORES).read_text()) | {"2": {"loss": -1.0}, "3": {"loss": -1.0}}
    (run / SCORES).write_text(json.dumps(wrong))
    assert resume(trained, run) == 0
    said = capsys.readouterr().out
    assert "resuming after step 1" in said and "finished; " in said
    scores = json.loads((run / SCORES).read_text())
    assert list(scores) == ["1", "2", "3"] and min(found["loss"] for found in scores.values()) > 0


def test_a_value_that_is_no_number_is_never_the_best():
    scores = {1: {"loss": float("nan")}, 2: {"loss": 3.0}, 3: {"loss": 2.0}, 4: {"loss": float("nan")}}
    assert best_of(scores, [1, 2, 3, 4], "loss") == 3 and best_of(scores, [], "loss") is None
    selection = Selection("loss").after(1, float("nan")).after(2, 3.0)
    assert selection.value == 3.0 and selection.after(3, float("nan")).step == 2


def test_readers_take_another_and_say_so(trained, run, capsys):
    WAYS["no item"](run / "checkpoints" / "3")
    assert load_run(run, "latest").step == 2
    assert re.search(r"checkpoints/3: this checkpoint is damaged: .*; taking step 2 instead", capsys.readouterr().err)
    with pytest.raises(UserError, match=r"checkpoints/3: this checkpoint is damaged: params/.* is missing"):
        load_run(run, "3")
    # The state of the optimizer is not read.
    shutil.rmtree(run / "checkpoints" / "2" / "state")
    assert load_run(run, "2").step == 2
    assert main(["generate", str(run), "--prompt", "a", "--step", "1", "--max-tokens", "2"]) == 0
    for step in (1, 2):
        (run / "checkpoints" / str(step) / HASHES).unlink()
    with pytest.raises(UserError, match="no other is left"):
        load_run(run)


def test_hashes_are_of_all_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"1")
    write_hashes(tmp_path)
    assert damage(tmp_path) is None
    (tmp_path / "a" / "b" / "c").write_bytes(b"2")
    assert damage(tmp_path) == "a/b/c has changed" and damage(tmp_path, ["other"]) is None
