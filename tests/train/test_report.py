"""`manyheads report`: what a run records of itself, and the page of it."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil

import pytest

from tests.train.run_records import records
from train.commands.cli import main
from train.config import load
from train.data.prepared.prepare import prepare
from train.examine.run_report.pictures import length_picture
from train.examine.run_report.read import read_run, time_spent
from train.examine.run_report.write import report
from train.run.loop import train
from train.run.run_files import config_file

HOSTILE = "</pre><script>alert('no')</script>\u2028 & \x1b[31m"


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a finished run, with samples that are not its own."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    lines = [json.dumps({"step": step, "text": f"{HOSTILE} {step}"}) for step in range(1, 12)]
    (copy / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return copy


def test_a_run_records_its_progress_and_what_it_takes(whole):
    found, config = read_run(whole), load(config_file(whole))
    epoch = prepare(config.data, progress=False)
    assert [start["step"] for start in found.starts] == [0] and found.starts[0]["devices"] == 1
    assert found.samples[-1]["step"] == 12 and found.samples[-1]["text"].startswith("a")
    assert found.curves["run/tokens_seen"][12] == 12 * 8 * 16
    assert found.data is not None and found.data["sources"][0]["documents"] == epoch.meta.train[0].documents
    assert found.curves["run/epoch"][12] == pytest.approx(12 * 8 / found.data["examples_per_epoch"])
    clock = found.curves["run/unix_seconds"]
    assert sorted(clock.values()) == [clock[step] for step in range(1, 13)]
    assert all(0 <= seconds < 60 for seconds in found.curves["run/data_wait_seconds"].values())
    assert found.curves["run/peak_memory_bytes"][12] > 1e7
    assert records(whole, "run/evaluation_seconds").keys() == {4, 8}
    assert records(whole, "run/final_evaluation_seconds").keys() == {12}


def test_a_resumed_run_records_both_starts(config_file, tmp_path):
    config = dataclasses.replace(load(config_file), run_dir=str(tmp_path / "run"), steps=4)
    train(config)
    train(dataclasses.replace(config, steps=8))
    found = read_run(tmp_path / "run")
    assert [start["step"] for start in found.starts] == [0, 4] and [one["step"] for one in found.samples] == [4, 8]
    spent = time_spent(found)
    assert 0 < spent.steps <= spent.total and 0 <= spent.data <= spent.steps and spent.evaluations > 0


def test_where_the_time_went(run):
    """Two starts, with a pause of 100 seconds between them that nothing counts."""
    before = {"unix_seconds": {2: 1010.0, 4: 1020.0, 6: 1130.0}, "step_seconds": {2: 1.0, 4: 2.0, 6: 3.0}}
    before |= {"data_wait_seconds": {2: 0.5, 6: 0.25}, "evaluation_seconds": {4: 3.0}}
    before |= {"final_evaluation_seconds": {6: 5.0}}
    curves = {f"run/{name}": curve for name, curve in before.items()} | {"checkpoint/stall_seconds": {4: 1.0}}
    # Records of 15 seconds after the checkpoint of step 4 are gone: its next steps were taken again.
    starts = [{"unix_seconds": 1000.0}, {"unix_seconds": 1120.0, "previous_until": 1035.0}]
    spent = time_spent(dataclasses.replace(read_run(run), curves=curves, starts=starts))
    # The last evaluation comes after the last record.
    assert (
        spent.total == 20 + 15 + 10 + 5
        and spent.lost == 15
        and spent.steps == 2 * 1 + 2 * 2 + 2 * 3
        and spent.data == 2 * 0.5 + 4 * 0.25
    )
    assert (spent.evaluations, spent.checkpoints, spent.rest) == (8, 1, 50 - 12 - 8 - 1 - 15)


def test_the_page_has_all_that_was_recorded(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report    {run / 'report.html'}\n"
    page = (run / "report.html").read_text("utf-8")
    heads = re.findall("<h2>(.*?)</h2>", page)
    assert heads == [
        "Curves, over steps",
        "What the model wrote",
        "Data",
        "Where the time went",
        "Config",
        "Starts",
        "Versions",
    ]
    assert "<script" not in page and html.escape(HOSTILE) in page
    # The first sample, the last, and some between them.
    assert page.count("alert(") == 8 and "12 of 12 steps, finished" in page
    assert "model.embed_dim</td>" in page and "held-out bits per byte" in page
    outside = set(re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([a-z]+:)', page)) - {"data:"}
    assert not outside and "http-equiv" not in page


def test_names_and_values_that_pictures_would_stumble_over(run, whole, tmp_path, capsys):
    """Formulas, what legends leave out, bytes that are not text, and a loss that diverged."""
    others = [tmp_path / name for name in ("r$x_$b", "_base", "日本", os.fsdecode(b"r\xff"))]
    for other in others:
        shutil.copytree(run, other)
    with (others[0] / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 13, "train/loss": 1e308}\n{"step": 14, "train/loss": -1e308}\n{"step": 15, "train/loss": NaN}\n'
        )
    page = report([whole, *others], tmp_path / "all.html").read_text("utf-8")
    assert "r$x_$b, training" in page and "_base, held out" in page and "日本" in page and r"r\udcff" in page
    data = json.loads((run / "data.json").read_text())
    data["sources"] = [data["sources"][0] | {"name": name} for name in ("cost $5 $x^^y$", "_b")]
    (run / "data.json").write_text(json.dumps(data))
    assert "cost $5 $x^^y$" in report([run]).read_text("utf-8")
    assert not capsys.readouterr().err


def test_runs_side_by_side(run, whole, tmp_path):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("warmup_steps: 2", "warmup_steps: 3"))
    page = report([whole, run], tmp_path / "both.html").read_text("utf-8")
    assert "optimizer.warmup_steps: 2 → 3" in page and page.count("<summary>") == 2
    assert f"{whole}, training" in page and f"{run}, held out" in page


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("starts.jsonl", '{"step": 0}\n', r"starts\.jsonl:1: not a record with step, unix_seconds, .*; delete this line"),
        ("starts.jsonl", '{"step": 0, "unix_seconds": 1e18, "device": "a", "devices": 1, "processes": 1, "host": "a"}\n',
         r"starts\.jsonl:1: not a time in seconds since 1970; delete this line"),
        ("samples.jsonl", '{"step": 1, "text": 3}\n', r"samples\.jsonl:1: not a record with step, text; delete this line"),
        ("data.json", "{", r"data\.json: cannot be read: .*; delete it"),
        ("data.json", '{"sources": [3]}', r"data\.json: not what a run records of its data; delete it"),
        ("skipped.jsonl", "[]\n", r"skipped\.jsonl:1: not a record with step, reason, examples; delete this line"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named(run, capsys, file, content, said):
    (run / file).write_text(content)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(said, error) and "\n" not in error


def test_what_is_not_there_is_left_out(run, tmp_path, capsys):
    for name in ("metrics.jsonl", "starts.jsonl", "samples.jsonl", "data.json", "origin.json"):
        (run / name).unlink()
    assert re.findall("<h2>(.*?)</h2>", report([run]).read_text()) == ["Config"]
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no run here" in capsys.readouterr().err
    assert length_picture([]) == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1240, 390])
def test_the_page_in_a_browser(browser, run, scheme, width):
    troubles = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.goto(report([run]).as_uri())
    assert not troubles
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(box["width"] <= width for box in (one.bounding_box() for one in page.locator("svg").all()))
    colors = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    lightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors]
    assert (lightness[0] > lightness[1]) == (scheme == "dark") and abs(lightness[0] - lightness[1]) > 400
    page.close()
