"""`manyheads eval`: a run's scores again, and on other files."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.devices import on_one_device
from tests.train.run_records import records
from tests.train.task_runs import rows_of, run_of, write_rows
from tests.train.test_identity import parsed, write_texts
from train.commands.cli import main
from train.examine.score import score
from train.run.loop import train
from transformer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run that tells three classes apart, and its rows."""
    folder = tmp_path_factory.mktemp("classifier")
    config = run_of("classification", write_rows("classification", folder), folder / "run", steps=60)
    with on_one_device():
        return config, train(config)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_scores_of_the_last_step_again(whole, capsys):
    assert main(["eval", str(whole), "--step", "latest"]) == 0
    said = capsys.readouterr().out
    loss = records(whole, "eval/loss")[12]
    assert "step 12, on files:" in said and f"held-out loss {loss:.4f}" in said and "gzip -9" in said
    assert score(whole, step="8").loss > loss


def test_another_file(whole, corpus, tmp_path, capsys):
    # A trained run knows its own texts better than others.
    (tmp_path / "other.txt").write_text("Something else altogether, which no rule explains. " * 40)
    own, other = (score(whole, data=path) for path in (str(corpus / "0*.txt"), str(tmp_path / "other.txt")))
    assert other.loss > own.loss + 0.5
    with pytest.raises(UserError, match="/nowhere"):
        score(whole, data="/nowhere/*.txt")


def test_classes_have_the_runs_numbers(classifier, tmp_path, capsys):
    """A file with two of three classes, in which each would have another number."""
    config, finished = classifier
    assert finished.scores.accuracy > 0.8
    rows = [row for row in rows_of("classification") if row["label"] != "left"]
    found = score(config.directory, data=write(tmp_path / "two.jsonl", rows), out=tmp_path / "out")
    assert found.metrics["accuracy"] > 0.8
    stored = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert stored["accuracy"] == found.metrics["accuracy"] and stored["step"] >= 1
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == len(rows) and {one["gold"] for one in predictions} == {"middle", "right"}
    # In the order of the file, and nothing is written into the run.
    assert [one["gold"] for one in predictions] == [row["label"] for row in rows]
    own = (config.directory / "predictions.jsonl").read_text()
    assert len(own.splitlines()) != len(rows)
    with pytest.raises(UserError, match=r"data: label 'up' is none that the run predicts \(left, middle, right\)"):
        score(config.directory, data=write(tmp_path / "up.jsonl", [rows[0] | {"label": "up"}, rows[1]]))


def test_a_table_in_another_encoding(classifier, tmp_path, capsys):
    config, _ = classifier
    rows = [row for row in rows_of("classification") if row["label"] != "left"]
    expected = score(config.directory, data=write(tmp_path / "rows.jsonl", rows)).metrics
    assert "data: no document has 1 of the run's 3 labels: left" in capsys.readouterr().out
    table = "".join(
        f"{row['label']};{row['b']};{row['a']}\r" for row in [{"a": "a", "b": "b", "label": "label"}, *rows]
    )
    (tmp_path / "rows.csv").write_bytes(table.encode("utf-16-le"))
    assert main(["eval", str(config.directory), "--data", str(tmp_path / "rows.csv"), "--encoding", "utf-16"]) == 0
    assert score(config.directory, data=str(tmp_path / "rows.csv"), encoding="utf-16").metrics == expected


def test_a_run_whose_data_has_changed(tmp_path, corpus):
    write_texts(tmp_path / "texts")
    source = {"kind": "files", "path": f"{tmp_path}/texts/*.txt"}
    data = {"sources": [source], "tokenizer": {"kind": "bpe", "vocab_size": 270}, "validation_fraction": 0.3}
    config = parsed(data=data, run_dir=str(tmp_path / "run"), steps=1)
    first = train(config)
    assert score(tmp_path / "run").loss == pytest.approx(first.scores.loss, rel=1e-5)
    for path in (tmp_path / "texts").iterdir():
        path.write_text("entirely other words than before, " * 9)
    with pytest.raises(UserError, match="give another vocabulary .*--data"):
        score(tmp_path / "run")
    assert score(tmp_path / "run", data=f"{tmp_path}/texts/*.txt").loss > 0


def test_documents_that_changed_are_said(tmp_path, capsys):
    write_texts(tmp_path / "texts")
    source = {"kind": "files", "path": f"{tmp_path}/texts/*.txt"}
    config = parsed(data={"sources": [source], "validation_fraction": 0.3}, run_dir=str(tmp_path / "run"), steps=1)
    train(config)
    score(tmp_path / "run")
    assert "trained on" not in capsys.readouterr().err
    (tmp_path / "texts" / "00.txt").write_text("entirely other words than before")
    score(tmp_path / "run")
    assert "run: its data are not those that it was trained on: a source has changed" in capsys.readouterr().err


def test_without_held_out_text(tmp_path, classifier):
    config, _ = classifier
    data = dataclasses.replace(config.data, validation_fraction=0.0)
    without = dataclasses.replace(config, data=data, steps=1, run_dir=str(tmp_path / "run"))
    train(without)
    with pytest.raises(UserError, match="no held-out text; give a file"):
        score(tmp_path / "run")


def test_a_run_on_the_standard_library_and_another_file(tmp_path):
    """Its source has no fields to take over."""
    config = parsed(
        data={"sources": [{"kind": "stdlib", "limit": 40}], "tokenizer": {"kind": "bytes"}, "validation_fraction": 0.3},
        run_dir=str(tmp_path / "run"), steps=1,
    )  # fmt: skip
    train(config)
    (tmp_path / "other.txt").write_text("some words of another kind " * 20)
    assert score(tmp_path / "run", data=str(tmp_path / "other.txt")).loss > 0
