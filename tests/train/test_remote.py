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


def test_a_part_of_a_checkpoint_does_not_count(config_file, capsys):
    address = "memory://bucket/runs/part"
    assert main(["train", str(config_file), "--run-dir", address]) == 0
    fsspec.filesystem("memory").rm_file("/bucket/runs/part/checkpoints/12/hashes.json")
    lose_copy(address)
    assert main(["train", str(config_file), "--run-dir", address, "--steps", "16"]) == 0
    assert "resuming after step 8" in capsys.readouterr().out
    assert "checkpoints/12/hashes.json" in files_at(address)


def filled(folder, step, text="x"):
    """A checkpoint in a local folder."""
    place = folder.local / "checkpoints" / str(step)
    place.mkdir(parents=True, exist_ok=True)
    for name in ("array", "hashes.json"):
        (place / name).write_text(f"{name} {step} {text}")
    return place


@pytest.fixture
def folder(place, request):
    """A folder that this machine writes, with one checkpoint that is at its address."""
    found = MirroredFolder(f"{place}/mirrors/{request.node.originalname}")
    filled(found, 4)
    (found.local / "metrics.jsonl").write_text("1")
    found.claim()
    found.push()
    return found


def as_another_machine(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "other"))
    return MirroredFolder(folder.address)


def test_what_an_interruption_left_undone_is_not_lost(folder, monkeypatch):
    ahead = filled(folder, 8)
    system, _ = fsspec.core.url_to_fs(folder.address)
    real, copied = system.put_file, []

    def killed(source, name, *rest, **options):
        copied.append(name)
        real(source, name, *rest, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(system, "put_file", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.push()
    assert copied and MirroredFolder(folder.address).fetch()
    assert (ahead / "hashes.json").is_file() and (ahead / "array").is_file()
    folder.push()
    assert {"checkpoints/8/array", "checkpoints/8/hashes.json"} <= files_at(folder.address)


def test_a_run_that_went_on_elsewhere_is_followed(folder, monkeypatch, tmp_path):
    lost = filled(folder, 8, "only here")
    with monkeypatch.context() as patch:
        other = as_another_machine(folder, patch, tmp_path)
        assert other.fetch() and (other.local / "checkpoints" / "4" / "array").read_text() == "array 4 x"
        other.claim()
        filled(other, 12)
        shutil.rmtree(other.local / "checkpoints" / "4")
        other.push()
    assert "checkpoints/4/array" not in files_at(folder.address)
    with pytest.raises(UserError, match="another process has begun to write there"):
        folder.push()
    assert folder.fetch()
    assert not lost.exists() and not (folder.local / "checkpoints" / "4").exists()
    assert (folder.local / "checkpoints" / "12" / "array").read_text() == "array 12 x"


def test_the_last_whole_checkpoint_stays_until_the_next_is_there(folder):
    shutil.rmtree(folder.local / "checkpoints" / "4")
    (folder.local / "metrics.jsonl").write_text("2")
    folder.push()
    assert "checkpoints/4/hashes.json" in files_at(folder.address)
    filled(folder, 8)
    folder.push()
    assert {"checkpoints/8/hashes.json"} == {name for name in files_at(folder.address) if name.endswith("hashes.json")}


def test_a_folder_that_was_deleted_there_is_written_anew(folder):
    system, root = fsspec.core.url_to_fs(folder.address)
    system.rm(root, recursive=True)
    assert not folder.fetch()
    folder.claim()
    folder.push()
    assert {"metrics.jsonl", "checkpoints/4/hashes.json"} <= files_at(folder.address)


def test_a_folder_of_files(tmp_path):
    folder = MirroredFolder(f"file://{tmp_path}/runs/one")
    filled(folder, 4)
    folder.claim()
    folder.push()
    assert (tmp_path / "runs" / "one" / "checkpoints" / "4" / "array").is_file()


def test_a_bucket_that_is_not_there(s3):
    folder = MirroredFolder("s3://no-such-bucket/run")
    filled(folder, 4)
    with pytest.raises(UserError, match="s3://no-such-bucket/run"):
        folder.claim()


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
