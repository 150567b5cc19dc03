"""`manyheads embed` and `predict` work through files of any size: a part at a time, with the results of the whole."""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import json
import os
import tracemalloc

import numpy as np
import pytest
from pyarrow import parquet

from tests.train.task_runs import rows_of, run_of, write_rows
from train.commands.cli import main
from train.inference import embed as embedding
from train.inference import predict as predicting
from train.run.loop import train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run of each task, of one step."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(kind: str):
        config = run_of(kind, write_rows(kind, folder), folder / kind)
        if kind == "answer":
            config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, question_length=30))
        train(dataclasses.replace(config, steps=1))
        return config.directory

    return run


@pytest.fixture
def parts(monkeypatch):
    """Sets how many documents are in memory together."""

    def most(count: int) -> None:
        monkeypatch.setattr(embedding, "CHUNK", count)
        monkeypatch.setattr(predicting, "CHUNK", count)

    return most


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def assert_close(found, expected):
    """The same JSON, but for the last digits of numbers."""
    assert type(found) is type(expected)
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=3e-6)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_close(list(found.values()), list(expected.values()))
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("kind", ["classification", "token_classification", "answer"])
def test_parts_of_a_file_have_the_predictions_of_the_whole(runs, parts, tmp_path, capsys, kind):
    rows = rows_of(kind, 60)
    if kind == "answer":
        # Longer than what is left of the row: how much is cut must not depend on the other documents.
        rows[20] |= {"question": "which of them is it then?", "context": "1"}
        rows[30]["context"] *= 5
    file, found = written(tmp_path / "rows.jsonl", rows), []
    capsys.readouterr()
    for count in (1000, 16):
        parts(count)
        assert main(["predict", str(runs(kind)), "--file", str(file), "--out", str(tmp_path / "out.jsonl")]) == 0
        assert "60 predictions: " in capsys.readouterr().out
        found.append([json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()])
    assert [one["id"] for one in found[0]] == [f"rows.jsonl:{number}" for number in range(1, 61)]
    assert_close(found[1], found[0])


def test_parts_of_a_file_have_the_vectors_of_the_whole(runs, parts, tmp_path):
    rows = [{"text": "ab" * (1 + number % 9), "other": number} for number in range(50)]
    file, found = written(tmp_path / "rows.jsonl", rows), []
    for count in (1000, 8):
        parts(count)
        for out in (array := tmp_path / "out.npy", table := tmp_path / "out.parquet"):
            assert main(["embed", str(runs("classification")), "--file", str(file), "--out", str(out)]) == 0
        found.append(np.load(array))
        read = parquet.read_table(table)
        assert read["text"].to_pylist() == [row["text"] for row in rows]
        assert read["id"].to_pylist() == [f"rows.jsonl:{number}" for number in range(1, 51)]
        np.testing.assert_array_equal(np.array(read["embedding"].to_pylist(), np.float32), found[-1])
    np.testing.assert_allclose(found[1], found[0], atol=2e-6)
    # Byte for byte what numpy writes when it knows the number of rows.
    np.save(stream := io.BytesIO(), found[1])
    assert array.read_bytes() == stream.getvalue()


@pytest.mark.parametrize("out", ["out.npy", "out.parquet", "out.jsonl"])
def test_a_fault_in_the_middle_leaves_the_file_as_it_was(runs, parts, tmp_path, capsys, out):
    parts(4)
    rows = [{"text": "a", "a": "ab", "b": "cd"}] * 9 + [{"text": "", "a": "", "b": ""}, {"text": "a"}]
    file = written(tmp_path / "rows.jsonl", rows)
    (tmp_path / out).write_text("before")
    command = "predict" if out == "out.jsonl" else "embed"
    assert main([command, str(runs("classification")), "--file", str(file), "--out", str(tmp_path / out)]) == 2
    assert "rows.jsonl:10: field" in capsys.readouterr().err
    assert (tmp_path / out).read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [out, "rows.jsonl"]
    file.write_text("\n")
    assert main([command, str(runs("classification")), "--file", str(file), "--out", str(tmp_path / out)]) == 2
    assert "it has no documents" in capsys.readouterr().err
    assert (tmp_path / out).read_text() == "before"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_lines_in_lines_out(runs, parts, tmp_path, capsys, encoding):
    """Row n of vectors, or of predictions, is that of line n: a blank line is one, and U+2028 ends none."""
    parts(3)
    second = "Grüße" if encoding == "cp1252" else "Ann\u2028in York"
    lines = ["Ann walks", "", second, " ", "New York", "Ann walks", ""]
    file = tmp_path / "lines.txt"
    file.write_bytes("".join(f"{line}\r\n" for line in lines).encode(encoding))
    folder = str(runs("token_classification"))
    arguments = ["--file", str(file), *(["--encoding", encoding] if encoding == "cp1252" else [])]
    for out in (array := tmp_path / "out.npy", table := tmp_path / "out.parquet"):
        assert main(["embed", folder, *arguments, "--out", str(out)]) == 0
    ids = [f"lines.txt:{number}" for number in range(1, 8)]
    read, vectors = parquet.read_table(table), np.load(array)
    assert read["id"].to_pylist() == ids and read["text"].to_pylist() == lines
    np.testing.assert_allclose(vectors[5], vectors[0], atol=2e-6)
    assert np.isfinite(vectors).all() and np.abs(vectors[2] - vectors[0]).max() > 1e-3
    capsys.readouterr()
    assert main(["predict", folder, *arguments]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.removesuffix("\n").split("\n")]
    assert [one["id"] for one in found] == ids
    assert [one.get("words") for one in found] == [line.split() or None for line in lines]
    assert [one["label"] is None for one in found] == [not line.strip() for line in lines]
    assert found[5]["label"] == found[0]["label"]
    file.write_bytes(b"fine\nGr\xfc\xdfe\n")
    assert main(["predict", folder, "--file", str(file)]) == 2
    said = capsys.readouterr().err
    assert "lines.txt:2: not valid UTF-8 (bytes 0xfc 0xdf at column 3); set encoding" in said
    assert len(said.splitlines()) == 1


def test_what_is_cut_is_said_once(runs, parts, tmp_path, capsys):
    parts(16)
    rows = [{"words": ["Ann"] * (30 if number in (3, 40) else 2)} for number in range(50)]
    file = written(tmp_path / "long.jsonl", rows)
    folder = str(runs("token_classification"))
    capsys.readouterr()
    assert main(["predict", folder, "--file", str(file)]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 50
    assert said.err == f"{file}: 2 of 50 documents are longer than 40 tokens with [CLS] and [SEP]: cut\n"


def test_predictions_go_into_a_pipe_too(runs, tmp_path):
    file = written(tmp_path / "rows.jsonl", rows_of("classification", 3))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert main(["predict", str(runs("classification")), "--file", str(file), "--out", str(pipe)]) == 0
        assert len(os.read(reader, 1 << 16).splitlines()) == 3 and pipe.is_fifo()
    finally:
        os.close(reader)


@pytest.mark.parametrize("out", ["out.npy", "out.parquet", "out.jsonl"])
def test_memory_does_not_grow_with_the_file(runs, parts, tmp_path, monkeypatch, out):
    parts(16)
    command = "predict" if out == "out.jsonl" else "embed"
    arguments = [command, str(runs("classification")), "--file", "-", "--out", str(tmp_path / out)]
    text = "a" * 4000
    line = (json.dumps({"a": text, "b": text}) if command == "predict" else text) + "\n"

    def peak(documents: int) -> int:
        """The most memory of Python objects and arrays, in bytes."""
        (tmp_path / "input").write_text(line * documents)
        with (tmp_path / "input").open("rb") as stream:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))
            tracemalloc.start()
            try:
                assert main(arguments) == 0
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # Python's own: the suite's lets garbage pile up
    try:
        peak(32)  # what is made once, such as programs
        few, many = peak(64), peak(512)  # 2 MB more text, and 4 MB more of pairs
    finally:
        gc.set_threshold(*before)
    assert many < few + 500_000
