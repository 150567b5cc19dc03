"""Runs at remote addresses: in fsspec's memory, and in an S3-compatible server that the test starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import fsspec
import pytest

from train.commands.cli import main
from train.config import load
from train.remote import MirroredFolder, find_files, is_remote, local_path, local_run
from train.run.run_files import read_metrics
from transformer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The address of a bucket of a server on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = tmp_path_factory.mktemp("s3") / "errors.txt"
    with errors.open("w") as stream:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        for _ in range(300):
            try:
                urllib.request.urlopen(settings["AWS_ENDPOINT_URL"], timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, errors.read_text()
                time.sleep(0.2)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.kill()
    server.wait()


@pytest.fixture(params=["memory", "s3"])
def place(request):
    return "memory://bucket" if request.param == "memory" else request.getfixturevalue("s3")


def files_at(address):
    system, root = fsspec.core.url_to_fs(address)
    system.invalidate_cache()
    return {name.lstrip("/").removeprefix(root.strip("/")).lstrip("/") for name in system.find(root)}


def lose_copy(address):
    shutil.rmtree(local_path(address))


def test_a_run_is_kept_at_its_address_and_goes_on_from_there(place, config_file, capsys):
    address = f"{place}/runs/one"
    assert main(["train", str(config_file), "--run-dir", address]) == 0
    said = capsys.readouterr()
    assert f"copied to {address}" in said.out
    there = files_at(address)
    assert {"config.yaml", "metrics.jsonl", "finished.json", "checkpoints/12/hashes.json"} <= there
    assert not [name for name in there if name.split("/")[-1].startswith(".") or "tmp" in name]
    # Another machine has no copy.
    lose_copy(address)
    assert main(["generate", address, "--prompt", "value", "--max-tokens", "3"]) == 0
    assert not (local_path(address) / "checkpoints" / "12" / "state").exists()
    assert main(["checkpoints", address]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert main(["checkpoints", address, "--remove", "8"]) == 0
    assert not [name for name in files_at(address) if name.startswith("checkpoints/8/")]
    lose_copy(address)
    assert main(["train", str(config_file), "--run-dir", address, "--steps", "16"]) == 0
    said = capsys.readouterr().out
    assert f"fetched from {address}" in said and "resuming after step 12" in said
    there = files_at(address)
    assert "checkpoints/16/hashes.json" in there and not [name for name in there if name.startswith("checkpoints/4/")]
    metrics = (local_path(address) / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in metrics} == set(range(1, 17))


def test_a_part_of_a_checkpoint_is_set_aside(config_file, capsys):
    address = "memory://bucket/runs/part"
    assert main(["train", str(config_file), "--run-dir", address]) == 0
    fsspec.filesystem("memory").rm_file("/bucket/runs/part/checkpoints/12/hashes.json")
    lose_copy(address)
    assert main(["train", str(config_file), "--run-dir", address, "--steps", "16"]) == 0
    said = capsys.readouterr().out
    assert "the checkpoint of step 12 is damaged (hashes.json is missing)" in said and "resuming after step 8" in said


def test_a_copy_that_is_ahead_stays_and_one_that_is_behind_follows(tmp_path):
    folder = MirroredFolder("memory://bucket/runs/both")
    folder.local.mkdir(parents=True)
    (folder.local / "one").write_text("1")
    folder.push()
    ahead = folder.local / "checkpoints" / "8" / "two"
    ahead.parent.mkdir(parents=True)
    ahead.write_text("2")
    assert folder.fetch() and ahead.read_text() == "2"
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/runs/both/one", b"changed there")
    assert folder.fetch() and (folder.local / "one").read_text() == "changed there"
    assert not ahead.exists()
    memory.pipe_file("/bucket/runs/both/../escaped", b"x")
    (folder.local / "one").unlink()
    folder.push()
    assert "one" not in files_at(folder.address)


def test_initial_weights_from_an_address(config_file, tmp_path, capsys):
    address = "memory://bucket/runs/base"
    assert main(["train", str(config_file), "--run-dir", address, "--steps", "2"]) == 0
    lose_copy(address)
    assert (
        main(["train", str(config_file), "--run-dir", str(tmp_path / "run"), "--init-from", address, "--steps", "2"])
        == 0
    )
    assert address in capsys.readouterr().out


def test_data_at_an_address(place, config_file, corpus, tmp_path, capsys):
    system, root = fsspec.core.url_to_fs(f"{place}/texts")
    for path in sorted(corpus.iterdir()):
        system.pipe_file(f"{root}/part/{path.name}", path.read_bytes())
    found = find_files(f"{place}/texts/**/*.txt")
    assert [name for name, _ in found][:2] == ["part/00.txt", "part/01.txt"] and len(found) == 40
    assert [name for name, _ in find_files(f"{place}/texts/part/03.txt")] == ["03.txt"]
    results = {}
    for name, where in {"there": f"{place}/texts/part/*.txt", "here": f"{corpus}/*.txt"}.items():
        source = f'--data.sources=[{{"kind": "files", "path": "{where}"}}]'
        assert main(["train", str(config_file), "--run-dir", str(tmp_path / name), "--steps", "2", source]) == 0
        results[name] = read_metrics(tmp_path / name)["train/loss"]
    assert results["there"] == results["here"]
    # Another version is other data.
    system.pipe_file(f"{root}/part/00.txt", b"Another text. " * 9)
    source = f'--data.sources=[{{"kind": "files", "path": "{place}/texts/part/*.txt"}}]'
    arguments = ["train", str(config_file), "--run-dir", str(tmp_path / "there"), "--steps", "4", source]
    assert main(arguments) == 2
    assert "data" in capsys.readouterr().err


def test_what_cannot_be_reached_is_said(config_file, tmp_path, capsys, s3):
    for address, reason in {
        "nowhere://x/y": "nowhere:// is not known",
        "gs://bucket/run": "gs:// needs gcsfs; pip install it",
        "memory://bucket/nothing": "no run here",
        "s3://no-such-bucket/run": "s3://no-such-bucket/run",
    }.items():
        assert main(["generate", address, "--prompt", "x"]) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(UserError, match=r"memory://bucket/none\*: no such file"):
        find_files("memory://bucket/none*")


def test_a_home_folder_and_names_that_are_no_folder(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(config_file, ["--run-dir", "~/runs/x"]).directory == tmp_path / "runs" / "x"
    assert local_run("~/runs") == tmp_path / "runs" and not is_remote("C:/x") and is_remote("s3://b")
    for name in ("..", ".", "a/b", "a\\b", "", " "):
        assert main(["train", str(config_file), "--name", name]) == 2
        assert re.search(r"name: got .*; allowed: text that can be the name of a folder", capsys.readouterr().err)
