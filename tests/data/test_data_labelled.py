"""Documents with classes: read from every format, stored beside their tokens, and laid out one a row."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sqlite3
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data.evaluation import evaluation_batches
from train.data.examples.labelled import LabelledDocuments, commonest_share
from train.data.loader import Batches, train_batches
from train.data.prepared.prepare import DataConfig, fingerprint, prepare
from train.data.prepared.store import Prepared
from train.data.sources.records import Rejects
from train.data.sources.source import documents
from train.data.sources.source_config import FilesSource, SourceConfig
from train.data.tokenization.tokenizer import CLS, MASK, SEP, TokenizerConfig
from train.objectives import Classification, Masked
from train.objectives.tasks.task import check_labels
from transformer.errors import ConfigError, UserError

CLASSIFICATION = Classification()
ROWS = [("a fine film", "good", "one"), ("dull", "bad", "one"), ("the plot", "plot", "two"), ("Grüße", "good", "two")]
LENGTH = 24


def source_of(path: Path, **settings) -> SourceConfig:
    return FilesSource(path=str(path), label_field="class", group_field="film", **settings)


def config_of(path: Path, **settings) -> DataConfig:
    defaults = {
        "packing": "documents",
        "validation_fraction": 0.2,
        "tokenizer": TokenizerConfig(special_tokens=(CLS, SEP)),
    }
    return DataConfig(sources=(source_of(path),), **defaults | settings)


def write_rows(path: Path, rows) -> Path:
    lines = (json.dumps({"text": text, "class": label, "film": film}) + "\n" for text, label, film in rows)
    path.write_text("".join(lines), "utf-8")
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """300 texts of 1 to 30 letters about 30 films; a text is its own number and as many letters of its class as fit."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(300):
        label = ("bad", "fine", "good")[random.integers(3) if number > 2 else number]
        rows.append((f"{number:03}".ljust(3 + random.integers(0, 28), label[0]), label, f"film {number // 10}"))
    return write_rows(tmp_path / "reviews.jsonl", rows)


def written(path: Path) -> dict[str, str]:
    """Text → class of what `write_rows` wrote."""
    return {row["text"]: row["class"] for row in map(json.loads, path.read_text("utf-8").splitlines())}


def files(folder: Path) -> dict[str, Path]:
    paths = {form: folder / f"rows.{form}" for form in ("jsonl", "parquet", "csv", "db")}
    write_rows(paths["jsonl"], ROWS)
    names = ("text", "class", "film")
    pq.write_table(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in ROWS]), paths["parquet"])
    with paths["csv"].open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([names, *ROWS])
    with sqlite3.connect(paths["db"]) as connection:
        connection.execute("create table t (text text, class text, film text)")
        connection.executemany("insert into t values (?, ?, ?)", ROWS)
    connection.close()
    return paths


SEVERAL = [("a", ["joy", "anger"]), ("b", []), ("c", ["fear"]), ("d", ["anger", "joy", "anger"])]


@pytest.mark.parametrize(("form", "separator"), [("jsonl", ";"), ("parquet", ";"), ("csv", ";"), ("csv", " | ")])
def test_a_document_may_have_several_classes(form: str, separator: str, tmp_path: Path) -> None:
    rows = [{"text": text, "labels": labels} for text, labels in SEVERAL]
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([["text", "labels"], *((text, separator.join(own)) for text, own in SEVERAL)])
    source = FilesSource(path=str(path), label_field="labels", label_kind="classes", label_separator=separator)
    prepared = prepare(DataConfig(sources=(source,), packing="documents", validation_fraction=0.0), progress=False)
    assert prepared.meta.labels == ("anger", "fear", "joy") and prepared.meta.label_kind == "classes"
    (array,) = prepared.train
    np.testing.assert_array_equal(array.labels, [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "field 'labels' holds null, not a list of classes; \\[\\] is a document without any"),
        (3, "field 'labels' holds int, not a list of classes"),
        ("joy;;fear", "field 'labels' is empty, and the document has no class"),
        (["joy", 0.5], "field 'labels' holds 0.5, not a class"),
        ("joy; fear", "field .labels. holds . fear., with white space around it; set trim_labels: true"),
    ],
)
def test_a_list_of_classes_that_is_none(value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "labels": value}) + "\n")
    source = FilesSource(path=str(path), label_field="labels", label_kind="classes")
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {message}"):
        prepare(DataConfig(sources=(source,), packing="documents"), progress=False)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv", "db"])
def test_every_format_gives_classes(tmp_path: Path, form: str) -> None:
    source = source_of(files(tmp_path)[form], query="select * from t" if form == "db" else "")
    assert [(found.text, found.label, found.group) for found in documents(source)] == ROWS
    some = dataclasses.replace(source, labels=("good", "bad"))
    assert [found.text for found in documents(some)] == ["a fine film", "dull", "Grüße"]
    assert [found.text for found in documents(dataclasses.replace(some, limit=2))] == ["a fine film", "dull"]
    wrong = dataclasses.replace(source, label_field="clas")
    with pytest.raises(UserError, match=r"no field 'clas'.* set label_field\. Did you mean 'class'\?"):
        list(documents(wrong))


def test_numbers_are_class_names_and_an_empty_field_is_refused(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [("a", 1, ""), ("b", 0, ""), ("c", None, ""), ("d", " ", ""), ("e", 0.5, "")]
    )
    source = source_of(path)
    with pytest.raises(
        UserError, match=r"rows\.jsonl:3: field 'class' is empty, and the document has no class; fix it"
    ):
        list(documents(source))
    rejects = Rejects("skip")
    assert [found.label for found in documents(dataclasses.replace(source, on_error="skip"), rejects)] == ["1", "0"]
    assert rejects.count == 3 and re.search(r":3: field 'class' is empty", rejects.first)


def test_what_is_passed_over_may_be_broken(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [("a", "good", ""), (None, "plot", "")])
    assert len(list(documents(source_of(path, labels=("good",))))) == 1
    with pytest.raises(UserError, match="holds null, not text"):
        list(documents(source_of(path)))


def test_classes_are_stored_next_to_the_tokens(reviews: Path) -> None:
    config = config_of(reviews)
    prepared = prepare(config, progress=False)
    assert prepared.meta.labels == ("bad", "fine", "good")
    again = prepare(config, progress=False)  # opened this time
    assert again.meta == prepared.meta
    classes = written(reviews)
    seen = []
    for array in (*again.train, *again.validation):
        assert array.labels is not None and array.labels.dtype == np.int32 and len(array.labels) == array.documents
        for number, label in enumerate(array.labels):
            text = prepared.tokenizer.decode(array.tokens[array.offsets[number] : array.offsets[number + 1]])
            assert classes[text] == prepared.meta.labels[label]
            seen.append(text)
    assert sorted(seen) == sorted(classes)
    counts = np.bincount(again.validation[0].labels)
    assert commonest_share(again.validation) == counts.max() / counts.sum()
    without = dataclasses.replace(config.sources[0], label_field="")
    plain = dataclasses.replace(config, sources=(without,))
    assert fingerprint(plain) != fingerprint(config)
    prepared = prepare(plain, progress=False)
    assert (
        prepared.meta.labels == () and prepared.train[0].labels is None and commonest_share(prepared.validation) is None
    )


def test_the_same_films_are_held_out_whatever_else_is_read(reviews: Path) -> None:
    labelled = config_of(reviews)
    plain = dataclasses.replace(labelled, sources=(FilesSource(path=str(reviews), group_field="film"),))
    one, other = (prepare(config, progress=False).validation[0] for config in (labelled, plain))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert 0 < one.documents < 300


def test_a_class_that_training_lacks_is_named(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS[:2])
    other = write_rows(tmp_path / "other.jsonl", ROWS)
    config = config_of(train, validation=(source_of(other),))
    with pytest.raises(UserError, match=r"are of class .plot., training documents only of bad, good; .*labels"):
        prepare(config, progress=False)
    # The other way round is nothing wrong.
    assert prepare(config_of(other, validation=(source_of(train),)), progress=False).meta.labels == (
        "bad",
        "good",
        "plot",
    )


def test_damaged_labels_are_refused_with_their_counts(reviews: Path) -> None:
    prepared = prepare(config_of(reviews), progress=False)
    path = prepared.directory / "train" / "0.labels.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(UserError, match=r"damaged \(0: \d+ labels where meta\.json counts \d+ documents\); delete"):
        Prepared.load(prepared.directory)


def batches_of(prepared: Prepared, config: DataConfig, objective=CLASSIFICATION, **settings) -> Batches:
    defaults = {"batch_size": 6, "length": 40, "seed": 0, "objective": objective}
    return train_batches(prepared, config, **defaults | settings)


def texts_in(batch: dict[str, np.ndarray], prepared: Prepared) -> list[tuple[str, str]]:
    """Text and class of each row, whose layout is checked."""
    cls, sep = (prepared.tokenizer.special_ids[name] for name in (CLS, SEP))
    found = []
    for row in range(len(batch["tokens"])):
        inside = batch["segments"][row] > 0
        size = int(inside.sum())
        tokens = batch["tokens"][row]
        assert tokens[0] == cls and tokens[size - 1] == sep and not tokens[size:].any()
        np.testing.assert_array_equal(inside, np.arange(len(inside)) < size)
        assert batch["segments"][row].max() == 1
        np.testing.assert_array_equal(batch["positions"][row], np.where(inside, np.arange(len(inside)), 0))
        found.append((prepared.tokenizer.decode(tokens[1 : size - 1]), prepared.meta.labels[batch["labels"][row]]))
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_shows_every_document_once_with_its_class(reviews: Path, processes: int) -> None:
    config = config_of(reviews, num_workers=1, validation_fraction=0.0)
    prepared = prepare(config, progress=False)
    parts = [batches_of(prepared, config, process_index=n, process_count=processes) for n in range(processes)]
    one = batches_of(prepared, config)
    assert one.examples_per_epoch == 300
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(50 * epoch, 50 * epoch + 50):
            rows = [part.batch(step) for part in parts]
            batch = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
            for name, value in one.batch(step).items():
                np.testing.assert_array_equal(batch[name], value)
                wanted = {"weights": np.float32, "example": np.int64}.get(name, np.int32)
                assert value.dtype == wanted and value.flags.c_contiguous, name
            assert batch["weights"].shape == (6, 1) and batch["weights"].all()
            seen += texts_in(batch, prepared)
        assert dict(seen) == written(reviews) and len(seen) == 300
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert batches_of(prepared, config, seed=1).batch(0)["example"].tolist() != one.batch(0)["example"].tolist()
    filled = np.mean([one.batch(step)["segments"] > 0 for step in range(50)])
    assert one.efficiency == pytest.approx(filled)


def test_evaluation_sees_each_held_out_document_once(reviews: Path) -> None:
    config = config_of(reviews)
    prepared = prepare(config, progress=False)
    found, rows = [], 0.0
    for batch in evaluation_batches(prepared, config, batch_size=7, length=40, objective=CLASSIFICATION):
        inside = batch["example"] >= 0
        assert np.all(batch["labels"][~inside] == -1) and not batch["weights"][~inside].any()
        found += texts_in({name: value[inside] for name, value in batch.items()}, prepared)
        rows += batch["weights"].sum()
    assert len(found) == rows == prepared.validation[0].documents
    assert dict(found).items() <= written(reviews).items()


def test_long_documents_are_left_out_or_cut_and_reported(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(reviews, validation_fraction=0.0)
    prepared = prepare(config, progress=False)
    short = [text for text in written(reviews) if len(text) <= 10]
    for too_long in ("drop", "truncate"):
        objective = Classification(too_long=too_long)
        batches = batches_of(prepared, config, objective, batch_size=1, length=12)
        found = [texts_in(batches.batch(step), prepared)[0] for step in range(batches.examples_per_epoch)]
        assert max(len(text) for text, _ in found) == 10
        if too_long == "drop":
            assert sorted(text for text, _ in found) == sorted(short)
        else:
            assert len(found) == 300 and {text for text, _ in found} == {text[:10] for text in written(reviews)}
    said = capsys.readouterr().err
    assert f"{300 - len(short)} of 300 documents are longer than 12 tokens with [CLS] and [SEP]: left out" in said
    assert ": cut" in said
    with pytest.raises(UserError, match=r"none of 300 documents fits a row of 4 tokens; .*truncate"):
        batches_of(prepared, config, length=4)


def test_text_that_spells_out_special_tokens_stays_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [(f"a {CLS} b {SEP}", "good", ""), ("c", "bad", "")])
    config = config_of(path, validation_fraction=0.0)
    prepared = prepare(config, progress=False)
    batch = LabelledDocuments(prepared.train[0], prepared.tokenizer, 20, "drop").gather(np.arange(2))
    assert texts_in(batch, prepared) == [(f"a {CLS} b {SEP}", "good"), ("c", "bad")]
    assert np.sum(batch["tokens"] == prepared.tokenizer.special_ids[CLS]) == 2


def test_what_does_not_suit_is_one_line(reviews: Path, tmp_path: Path) -> None:
    def told(config: DataConfig, **settings) -> str:
        with pytest.raises(UserError) as raised:
            batches_of(prepare(config, progress=False), config, **settings)
        return str(raised.value)

    config = config_of(reviews)
    assert "data.packing: got 'chunk'; classification takes one document per row: set it to 'documents'" in told(
        dataclasses.replace(config, packing="chunk")
    )
    bare = dataclasses.replace(config, tokenizer=TokenizerConfig(special_tokens=(MASK,)))
    assert "needs [CLS], [SEP], which the vocabulary lacks; set data.tokenizer.special_tokens" in told(bare)
    plain = dataclasses.replace(config, sources=(FilesSource(path=str(reviews)),))
    assert "needs documents with a class, but the sources give none; set their label_field" in told(plain)
    assert "length: got 2; classification needs at least 3 tokens" in told(config, length=2)
    prepared = prepare(config, progress=False)
    check_labels(prepared, 3)
    with pytest.raises(UserError, match=r"model\.head\.num_labels: got 2; the data has 3 classes: bad, fine, good"):
        check_labels(prepared, 2)
    one = config_of(write_rows(tmp_path / "one.jsonl", ROWS[:1]), validation_fraction=0.0)
    with pytest.raises(UserError, match="all documents are of one class, good"):
        check_labels(prepare(one, progress=False), 1)


def test_other_objectives_do_not_mind_classes(reviews: Path) -> None:
    config = config_of(reviews, tokenizer=TokenizerConfig(special_tokens=(MASK, CLS, SEP)))
    batch = batches_of(prepare(config, progress=False), config, Masked()).batch(0)
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"path": "a.txt", "label_field": "class"}, "label_field"),
        ({"path": "a.csv", "label_field": "text"}, "label_field"),
        ({"path": "a.csv", "label_kind": "number"}, "label_kind"),
        ({"path": "a.csv", "label_field": "class", "label_kind": "number", "labels": ("good",)}, "labels"),
        ({"path": "a.csv", "label_field": "class", "label_kind": "answers"}, "target_field"),
        ({"path": "a.csv", "label_field": "class", "label_kind": "tags", "target_field": "other"}, "target_field"),
        ({"path": "a.csv", "label_field": "class", "label_kind": "number", "choice_fields": ("a",)}, "choice_fields"),
        ({"path": "a.csv", "labels": ("good",)}, "labels"),
    ],
)
def test_inconsistent_sources_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        FilesSource(**settings)
    assert raised.value.field == field


def test_all_sources_have_classes_or_none(reviews: Path) -> None:
    plain = FilesSource(path=str(reviews))
    with pytest.raises(ConfigError, match="it has no label_field; allowed: all sources have one, or none has"):
        DataConfig(sources=(source_of(reviews), plain))
    with pytest.raises(ConfigError, match="it has a label_field; allowed: all sources have one, or none has") as raised:
        DataConfig(sources=(plain,), validation=(source_of(reviews),))
    assert raised.value.field == "validation"
