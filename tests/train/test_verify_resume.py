"""`manyheads verify-resume`: no difference for what is exact, and none unseen."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from train.commands.cli import main
from train.examine.verify_resume import compare
from train.report.metrics import read_examples


def test_a_killed_run_is_the_same_and_reported(config_file, tmp_path, capsys):
    arguments = ["--kills", "2", "--out", str(tmp_path / "out"), "--steps", "8"]
    assert main(["verify-resume", str(config_file), *arguments]) == 0
    said = capsys.readouterr().out
    assert "kill 2 of 2: after step" in said and "no difference" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["kills"]) == 2 and report["differences"] == [] and report["seed"] == 0
    assert next(kill["meant"] for kill in report["kills"]) == "start"
    assert main(["verify-resume", str(config_file), *arguments]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_run_moves_between_devices_and_processes(config_file, tmp_path, capsys):
    arguments = ["--kills", "1", "--out", str(tmp_path / "out"), "--steps", "6", "--mesh.strategy", "fsdp"]
    assert main(["verify-resume", str(config_file), *arguments, "--meshes", "2,4", "--processes", "2,1"]) == 0
    assert "no difference" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["layouts"] == [{"devices": 2, "processes": 2}, {"devices": 4, "processes": 1}]
    examples = read_examples(tmp_path / "out" / "whole")
    assert list(examples) == list(range(1, 7)) and all(len(ids) == 8 for ids in examples.values())


def test_differences_are_found(whole, tmp_path):
    other = shutil.copytree(whole, tmp_path / "other")
    assert compare(whole, other, exact=True) == []
    # One bit of one parameter.
    folder = (other / "checkpoints" / "12" / "params").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder)
        leaves, structure = jax.tree.flatten(params)
        first = np.array(leaves[0])
        first.reshape(-1)[0] = np.nextafter(first.reshape(-1)[0], np.float32(9))
        shutil.rmtree(folder)
        checkpointer.save(folder, jax.tree.unflatten(structure, [jax.device_put(first), *leaves[1:]]))
    (line,) = compare(whole, other, exact=True)
    assert line.endswith("not the same bits")
    assert compare(whole, other, exact=False) == []
    path = other / "metrics.jsonl"
    records = [json.loads(text) for text in path.read_text().splitlines()]
    for record in records:
        if "train/loss" in record and record["step"] > 9:
            record["train/loss"] *= 1 + 1e-4
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (line,) = compare(whole, other, exact=False)
    assert line.startswith("train/loss: 3 steps differ, the first is 10")
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:-4]))
    assert any("records" in line for line in compare(whole, other, exact=False))


@pytest.mark.parametrize("arguments", [["--meshes", "1,0"], ["--meshes", "a"], ["--kills", "0"], ["--processes", "0"]])
def test_wrong_arguments(config_file, arguments, capsys):
    assert main(["verify-resume", str(config_file), *arguments]) == 2
    assert f"{arguments[0]}: got" in capsys.readouterr().err


def test_devices_that_processes_do_not_divide(config_file, capsys):
    assert main(["verify-resume", str(config_file), "--meshes", "3", "--processes", "2"]) == 2
    assert (
        "--processes: 3 devices of 2 processes; allowed: numbers that divide those of --meshes"
        in capsys.readouterr().err
    )
