"""`manyheads doctor` on a CPU: all of a step's time is somewhere, operations have scopes, runs stay as they are."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import jax
import pytest

from tests.devices import on_one_device
from train.commands.cli import main
from train.config import load
from train.examine.doctor import record as recording
from train.examine.doctor.doctor import doctor, doctor_of_run
from train.examine.doctor.operations import ATTENTION, COLLECTIVE, COPY, ELEMENTWISE, MATRIX, NO_SCOPE
from train.run.loop import train
from transformer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def config(config_file):
    return load(config_file)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "doctor.html"


@pytest.fixture(scope="module")
def report(config, page):
    with on_one_device():
        return doctor(config, steps=2, folder=page.parent)


def test_parts_and_idle_time_are_the_step(report):
    b = report.breakdown
    parts = {name: total.seconds for name, total in b.categories().items()}
    assert sum(parts.values()) + b.idle == pytest.approx(b.step)
    assert sum(total.seconds for total in b.scopes().values()) + b.idle == pytest.approx(b.step)
    assert min(parts[MATRIX], parts[ATTENTION], parts[ELEMENTWISE]) > 0 and parts[COLLECTIVE] == 0
    assert b.devices == 1 and 0 <= b.idle < b.step


def test_expensive_operations_have_scopes(report):
    assert all(one.operation.scope != NO_SCOPE for one in report.breakdown.spent[:10])
    scopes = report.breakdown.scopes()
    assert {"layers/attention", "layers/attention/attend", "layers/feed_forward", "loss", "optimizer"} <= scopes.keys()
    assert {"forward", "backward"} <= scopes["layers/feed_forward"].by_phase.keys()
    assert set(scopes["layers/attention/attend"].by_category) <= {ATTENTION, COLLECTIVE}
    assert scopes["optimizer"].by_phase.keys() == {"update"}
    assert not any(one.operation.contains for one in report.breakdown.spent)


def test_each_layer_counts(report):
    # Two products forward and four backward in each of two layers.
    products = [one for one in report.breakdown.spent if one.operation.flops and "feed_forward" in one.operation.scope]
    assert sum(one.times for one in products) == pytest.approx(12)
    rows, length, dim = 8, 16, 32
    flops = sum(one.times * one.operation.flops for one in products)
    assert flops == pytest.approx(12 * 2 * rows * length * dim * 4 * dim)


def test_the_page_has_a_bar_for_each_scope(report, page):
    text = page.read_text()
    pictures = [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", text, re.S)]
    rows = pictures[1].findall("{*}g[@class='scope']")
    assert [row.findtext("{*}text") for row in rows] == list(report.breakdown.scopes())
    assert all(row.find("{*}rect") is not None for row in rows)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_what_is_printed(config, tmp_path, capsys, report, monkeypatch):
    monkeypatch.setattr("train.examine.doctor.doctor.record", lambda *_: report.recording)
    monkeypatch.chdir(tmp_path)
    doctor(config)
    said = capsys.readouterr().out
    assert "page: doctor/small/doctor.html" in said and (tmp_path / "doctor" / "small" / "doctor.html").exists()
    for text in (
        "MFU",
        "matrix products",
        "idle",
        "100.0",
        "layers/attention/attend",
        "2 heads of 16",
        "what to change",
    ):
        assert text in said


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("examined") / "run"
    with on_one_device():
        train(dataclasses.replace(config, run_dir=str(folder)))
    return folder


def test_a_run_goes_on_and_stays_as_it_is(run, tmp_path, capsys):
    def files():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}

    before = files()
    assert main(["doctor", "--run", str(run), "--steps", "1", "--dir", str(tmp_path)]) == 0
    assert "from step 13 on" in capsys.readouterr().out
    assert files() == before
    assert main(["doctor", "--run", str(run), "--model.remat", "full"]) == 2
    assert "a run has its own config; leave out --model.remat full" in capsys.readouterr().err


def test_a_run_without_a_checkpoint(run, tmp_path):
    with pytest.raises(UserError, match="no run here"):
        doctor_of_run(tmp_path)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="this run has no checkpoint yet; examine its config: manyheads doctor"):
        doctor_of_run(tmp_path)


def test_what_cannot_be_examined(config, tmp_path, capsys, monkeypatch):
    assert main(["doctor", str(tmp_path / "absent.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="--steps: got 0; allowed: 1 or more"):
        doctor(config, steps=0, folder=tmp_path)
    monkeypatch.setattr(recording, "read_events", lambda planes, platform: [])
    with pytest.raises(UserError, match="the trace holds no operation of the step"):
        doctor(config, steps=1, folder=tmp_path)


@pytest.mark.all_devices
def test_several_devices_communicate(config, tmp_path):
    model = dataclasses.replace(config.model, remat="full")
    sharded = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, strategy="fsdp"), model=model)
    report = doctor(sharded, steps=1, folder=tmp_path)
    b = report.breakdown
    assert b.devices == jax.device_count() == 8
    assert b.categories()[COLLECTIVE].seconds > 0 and b.categories()[COLLECTIVE].least is None
    assert sum(total.seconds for total in b.categories().values()) + b.idle == pytest.approx(b.step)
    assert b.where(lambda one: one.phase == "recomputed") > 0
    assert b.where(lambda one: one.category in (MATRIX, COPY)) > 0
