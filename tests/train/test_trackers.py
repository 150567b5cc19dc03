"""Trackers of experiments, each as it works without a network: a run is recorded, and goes on as the same run when it resumes."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import struct

import pytest

from train.config import load
from train.report.metrics import MetricLog
from train.report.trackers import TRACKERS, flat
from transformer.errors import UserError

# Of MLflow's use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*", "ignore::DeprecationWarning:mlflow.*")

CONFIG = """name: tiny
data: {sources: [stdlib]}
log: {trackers: [TRACKER], project: studies}
"""


def log_of(tmp_path, name, start_step, run_id="abc"):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.replace("TRACKER", name))
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    return MetricLog(load(path), folder, start_step, run_id)


def two_sittings(tmp_path, name):
    """Steps 1 to 3, the last two of them twice, since training went back; then a resume after step 3."""
    with log_of(tmp_path, name, 0) as log:
        for step in (1, 2, 3):
            log.write(step, train={"loss": 4.0 - step})
        log.rewind(1)
        for step in (2, 3):
            log.write(step, train={"loss": 4.5 - step})
    with log_of(tmp_path, name, 3) as log:
        log.write(4, train={"loss": 0.25}, eval={"bits_per_byte": 2.0, "missing": None})


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    two_sittings(tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("studies").experiment_id])
    assert run.info.run_name == "tiny" and run.info.status == "FINISHED"
    assert run.data.params["model.family"] == "gpt" and run.data.params["log.project"] == "studies"
    assert run.data.metrics == {"train/loss": 0.25, "eval/bits_per_byte": 2.0}
    history = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(history) == [(1, 3.0), (2, 2.0), (2, 2.5), (3, 1.0), (3, 1.5), (4, 0.25)]


def test_a_run_that_ends_by_an_error_is_said_to_have_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    from mlflow import MlflowClient

    for error, status in ((UserError("not finite"), "FAILED"), (KeyboardInterrupt(), "FINISHED")):
        with contextlib.suppress(type(error)), log_of(tmp_path, "mlflow", 0):
            raise error
        client = MlflowClient()
        (run,) = client.search_runs([client.get_experiment_by_name("studies").experiment_id])
        assert run.info.status == status


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    two_sittings(tmp_path, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "studies.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, *_ in rows} == {"tiny-abc"}
    assert [(step, json.loads(values)["train/loss"]) for _, step, values in rows] == [
        (1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5), (3, 1.5), (4, 0.25),
    ]  # fmt: skip


def test_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    two_sittings(tmp_path, "wandb")
    from wandb.proto import wandb_internal_pb2

    ids, history = set(), []
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_of(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.run.run_id:
                ids.add((record.run.project, record.run.run_id))
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            if "train/loss" in values:
                history.append((values["step"], values["train/loss"]))
    assert ids == {("studies", "tiny-abc")}
    assert history == [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5), (3, 1.5), (4, 0.25)]


def records_of(path, block=2**15):
    """What an offline run wrote: a log of LevelDB's format, a header of 7 bytes, then pieces in blocks."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        # 1: whole, 2: first, 3: middle, 4: last.
        if kind in (1, 4):
            yield whole
            whole = b""


def test_tensorboard(tmp_path):
    two_sittings(tmp_path, "tensorboard")
    from tensorboardX.proto.event_pb2 import Event

    values, starts = [], []
    for path in sorted((tmp_path / "run" / "tensorboard").glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 16 + length
            values += [(event.step, one.simple_value) for one in event.summary.value if one.tag == "train/loss"]
            starts += [event.step] if event.session_log.status else []
    assert sorted(values) == [(1, 3.0), (2, 2.0), (2, 2.5), (3, 1.0), (3, 1.5), (4, 0.25)]
    # What TensorBoard drops: all from the step on with which a file begins.
    assert sorted(starts) == [1, 2, 4]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with log_of(tmp_path, "mlflow", 0) as log:
        log.write(1, train={"loss": 1.0})
        (tracker,) = log._trackers
        tracker._id = "0" * 32
        for step in (2, 3):
            log.write(step, train={"loss": 1.0})
        said = capsys.readouterr().err
        # Once, and not for every step.
        assert said.count("metrics cannot be written by MLflow (") == 1 and "training continues without them" in said
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_service_that_is_not_there_is_named_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://host")
    with pytest.raises(UserError, match=r"log.trackers: mlflow cannot record the run: .*nowhere"):
        log_of(tmp_path, "mlflow", 0)


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"log.trackers: wandb needs wandb, which is not installed; pip install 'manyheads\[wandb\]'"
    ):
        log_of(tmp_path, "wandb", 0)


def test_a_tracker_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="log.trackers"):
        log_of(tmp_path, "mlfow", 0)
    with pytest.raises(UserError, match=r"log.trackers: got .*; allowed: each once"):
        log_of(tmp_path, "mlflow, mlflow", 0)


def test_trackers_are_chosen_on_the_command_line(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.replace("TRACKER", ""))
    assert load(path).log.trackers == ()
    assert load(path, ("--log.trackers", "[mlflow, tensorboard]")).log.trackers == ("mlflow", "tensorboard")
    assert set(TRACKERS) == {"tensorboard", "wandb", "mlflow", "trackio"}


def test_settings_are_named_with_dots():
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2]}) == {"a.b": "1", "a.c.d": "None", "e": "[1, 2]"}
