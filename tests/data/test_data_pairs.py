"""Pairs: read from every format, kept side by side, held out by group, and laid out so that none sees another."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data.evaluation import EvaluationBatches, evaluation_batches
from train.data.examples.pairs import choose_widths
from train.data.loader import Batches, train_batches
from train.data.prepared.prepare import DataConfig, check_vocabulary, fingerprint, prepare
from train.data.prepared.store import Prepared
from train.data.sources.records import Document, Rejects
from train.data.sources.source import documents
from train.data.sources.source_config import FilesSource, HubSource, SourceConfig, StdlibSource
from train.data.tokenization.tokenizer import TokenizerConfig
from train.objectives import Seq2Seq
from transformer.errors import ConfigError, UserError

SEQ2SEQ = Seq2Seq()
PAIRS = [("one", "eins", 1), ("two: Grüße", "zwei", 1), ("three", "drei", 2)]


@pytest.fixture
def verses(tmp_path: Path) -> Path:
    """300 pairs of 1 to 20 letters a side in 30 chapters; a source is the number of the pair, then x."""
    random = np.random.default_rng(0)
    path = tmp_path / "verses.jsonl"
    rows = [
        {"en": f"{number:03}".ljust(3 + random.integers(0, 18), "x"), "fr": f"{number:03}".ljust(3 + random.integers(0, 12), "y"),
         "chapter": number // 10}
        for number in range(300)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(path: Path, packing="documents", **settings) -> DataConfig:
    source = FilesSource(path=str(path), text_field="en", target_field="fr", group_field="chapter")
    return DataConfig(sources=(source,), packing=packing, **{"validation_fraction": 0.2} | settings)


def files_with_pairs(folder: Path) -> dict[str, SourceConfig]:
    rows = [{"id": group, "translation": {"en": one, "de": other}} for one, other, group in PAIRS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    lines = "".join(f"{group},{one},{other}\n" for one, other, group in PAIRS)
    (folder / "rows.csv").write_text(f"id,en,de\n{lines}", "utf-8")
    connection = sqlite3.connect(folder / "rows.db")
    connection.execute("create table t (en text, de text, id integer)")
    connection.executemany("insert into t values (?, ?, ?)", PAIRS)
    connection.commit()
    connection.close()
    nested = {"text_field": "translation.en", "target_field": "translation.de", "group_field": "id"}
    flat = {"text_field": "en", "target_field": "de", "group_field": "id"}
    (folder / "set").mkdir()
    (folder / "set" / "train.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    return {
        "jsonl": FilesSource(path=f"{folder}/rows.jsonl", **nested),
        "parquet": FilesSource(path=f"{folder}/rows.parquet", **nested),
        "hub": HubSource(path=f"{folder}/set", streaming=True, **nested),
        "csv": FilesSource(path=f"{folder}/rows.csv", **flat),
        "sqlite": FilesSource(path=f"{folder}/rows.db", query="select * from t", **flat),
    }


@pytest.mark.parametrize("form", ["jsonl", "parquet", "hub", "csv", "sqlite"])
def test_every_format_gives_pairs(tmp_path: Path, form: str) -> None:
    source = files_with_pairs(tmp_path)[form]
    assert source.gives_pairs
    found = list(documents(source))
    assert [(*document.sides, int(document.group)) for document in found] == PAIRS
    assert found[0].split_by == "1"
    wrong = dataclasses.replace(source, target_field=source.target_field.replace("de", "dee"))
    with pytest.raises(UserError, match=r"no field '.*dee'.*set target_field"):
        list(documents(wrong))


def test_a_trained_tokenizer_reads_sqlite_pairs(tmp_path: Path) -> None:
    source = files_with_pairs(tmp_path)["sqlite"]
    config = DataConfig(
        sources=(source,), validation_fraction=0, packing="pad", tokenizer=TokenizerConfig(kind="bpe", vocab_size=300)
    )
    assert prepare(config, progress=False).meta.train[0].documents == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"en": "a", "fr": "  "}', r"rows\.jsonl:2: field 'fr' is empty"),
        ('{"en": "", "fr": "b"}', r"rows\.jsonl:2: field 'en' is empty"),
        ('{"en": "a", "fr": null}', r"rows\.jsonl:2: field 'fr' holds null, not text"),
        ('{"en": "a"}', r"rows\.jsonl:2: no field 'fr' \(there is en\); set target_field"),
        ('{"en": {"x": "a"}, "fr": "b"}', r"rows\.jsonl:2: field 'en' holds dict, not text"),
    ],
)
def test_a_pair_without_a_side_stops_or_is_counted(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"en": "a", "fr": "b"}\n' + row + "\n")
    source = FilesSource(path=str(path), text_field="en", target_field="fr")
    with pytest.raises(UserError, match=message):
        list(documents(source))
    rejects = Rejects("skip")
    skipping = dataclasses.replace(source, on_error="skip")
    assert list(documents(skipping, rejects)) == [Document("rows.jsonl:1", "a", "b")]
    assert rejects.count == 1


@pytest.mark.parametrize("own_vocabulary", [False, True])
def test_both_sides_are_kept_in_step(verses: Path, own_vocabulary: bool) -> None:
    other = TokenizerConfig(kind="bpe", vocab_size=300) if own_vocabulary else None
    config = config_of(verses, target_tokenizer=other)
    for _ in range(2):  # made, then found
        prepared = prepare(config, progress=False)
    meta = prepared.meta
    assert prepared.pairs and meta.pairs
    assert (prepared.target_tokenizer is prepared.tokenizer) == (not own_vocabulary)
    expected = [document.sides for document in documents(config.sources[0])]
    found = []
    for array in (*prepared.train, *prepared.validation):
        assert array.target is not None
        assert array.documents == array.target.documents
        for number in range(array.documents):
            source = array.tokens[array.offsets[number] : array.offsets[number + 1]]
            target = array.target.tokens[array.target.offsets[number] : array.target.offsets[number + 1]]
            found.append((prepared.tokenizer.decode(source), prepared.target_tokenizer.decode(target)))
    assert sorted(found) == sorted(expected)
    held_out = prepared.validation_pairs()
    assert held_out == found[-len(held_out) :]
    assert meta.validation[0].documents == len(held_out)
    assert meta.bytes("validation") == sum(len(target.encode()) for _, target in held_out)
    assert meta.tokens("validation") == len(prepared.validation[0].target.tokens) - 1  # pyright: ignore
    assert meta.target_vocab_size == prepared.target_tokenizer.vocab_size
    chapters = [{int(source[:3]) // 10 for source, _ in part} for part in (held_out, found[: -len(held_out)])]
    assert not chapters[0] & chapters[1]
    assert chapters[0]


def test_vocabularies_of_both_sides_are_checked(verses: Path) -> None:
    config = config_of(verses, target_tokenizer=TokenizerConfig(kind="bpe", vocab_size=300))
    prepared = prepare(config, progress=False)
    assert prepared.meta.largest_target_id > 256
    check_vocabulary(prepared, 256, target_vocab_size=300)
    with pytest.raises(UserError, match="set model.vocab_size to at least"):
        check_vocabulary(prepared, 256, target_vocab_size=200)
    with pytest.raises(UserError, match="set model.source_vocab_size to at least"):
        check_vocabulary(prepared, 50, target_vocab_size=300)
    with pytest.raises(UserError, match="set model.vocab_size to at least"):
        check_vocabulary(prepared, 200)


def test_references_are_the_text_itself_where_the_tokenizer_keeps_less(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"en": f"a  b {n}", "fr": f"語 «x»  {n}"}, ensure_ascii=False) + "\n" for n in range(9))
    )
    config = config_of(path, tokenizer=TokenizerConfig(kind="wordpiece", vocab_size=300), validation_fraction=0.5)
    config = dataclasses.replace(config, sources=(dataclasses.replace(config.sources[0], group_field=""),))
    held_out = prepare(config, progress=False).validation_pairs()
    assert held_out
    assert all(target == f"語 «x»  {source[-1]}" for source, target in held_out)


def test_what_pairs_depend_on_changes_the_fingerprint(verses: Path) -> None:
    config = config_of(verses)
    source = config.sources[0]
    others = [
        dataclasses.replace(config, target_tokenizer=TokenizerConfig()),
        dataclasses.replace(config, sources=(dataclasses.replace(source, group_field=""),)),
        dataclasses.replace(config, sources=(dataclasses.replace(source, target_field="en", text_field="fr"),)),
    ]
    assert len({fingerprint(config), *map(fingerprint, others)}) == 4
    assert fingerprint(dataclasses.replace(config, packing="pad")) == fingerprint(config)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"packing": "chunk"}, "packing"),
        ({"validation": (StdlibSource(),)}, "validation"),
    ],
)
def test_pairs_are_packed_and_validated_as_pairs(verses: Path, settings: dict, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of(verses, **settings)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"packing": "pad"}, "packing"), ({"target_tokenizer": TokenizerConfig()}, "target_tokenizer")],
)
def test_single_texts_are_not_taken_for_pairs(settings: dict, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        DataConfig(**settings)
    assert raised.value.field == field
    for wrong in ({"target_field": "x"}, {"group_field": "x"}):
        with pytest.raises(ConfigError):
            FilesSource(path="a.txt", **wrong)


def batches_of(prepared: Prepared, config: DataConfig, length: int = 24, **settings) -> Batches:
    defaults = {"batch_size": 6, "seed": 1, "objective": SEQ2SEQ}
    return train_batches(prepared, config, length=length, **defaults | settings)


def pairs_in(batch: dict[str, np.ndarray], prepared: Prepared) -> list[tuple[str, str]]:
    """The texts of all pairs in a batch, after a check that each is laid out as it must be."""
    end, found = prepared.tokenizer.end_of_text, []
    np.testing.assert_array_equal(batch["weights"] > 0, batch["segments"] > 0)
    for row in range(len(batch["tokens"])):
        source_segments, segments = batch["source_segments"][row], batch["segments"][row]
        assert set(source_segments) - {0} == set(segments) - {0} == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            read, said = source_segments == segment, segments == segment
            source, targets, inputs = (
                batch["source_tokens"][row][read], batch["targets"][row][said], batch["tokens"][row][said],
            )  # fmt: skip
            np.testing.assert_array_equal(batch["source_positions"][row][read], np.arange(read.sum()))
            np.testing.assert_array_equal(batch["positions"][row][said], np.arange(said.sum()))
            assert source[-1] == targets[-1] == inputs[0] == end
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            found.append((prepared.tokenizer.decode(source), prepared.target_tokenizer.decode(targets)))
    for side in ("source_", ""):
        assert np.all(batch[f"{side}tokens"][batch[f"{side}segments"] == 0] == 0)
    return found


@pytest.mark.parametrize("packing", ["documents", "pad"])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_shows_every_pair_once(verses: Path, packing: str, processes: int) -> None:
    config = config_of(verses, packing, num_workers=1)
    prepared = prepare(config, progress=False)
    parts = [batches_of(prepared, config, process_index=n, process_count=processes) for n in range(processes)]
    steps = -(-parts[0].examples_per_epoch // 6)
    one = batches_of(prepared, config)
    epochs = []
    shapes = set()
    for epoch in range(2):
        seen: Counter[tuple[str, str]] = Counter()
        count = 0
        for step in range(epoch * steps, (epoch + 1) * steps):
            rows = [part.batch(step) for part in parts]
            batch = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
            whole = one.batch(step)
            for name, value in whole.items():
                np.testing.assert_array_equal(batch[name], value)
                assert batch[name].dtype == value.dtype
            shapes.add((batch["source_tokens"].shape, batch["tokens"].shape))
            seen.update(pairs_in(batch, prepared))
            count += len(batch["example"])
        epochs.append(seen)
    everything = [document.sides for document in documents(config.sources[0])]
    training = set(everything) - set(prepared.validation_pairs())
    if packing == "pad":  # batches divide the epoch: an empty row fills the last
        assert epochs[0] == epochs[1] == Counter(training)
        assert 2 <= len(shapes) <= 6
        assert all(width % 8 == 0 for shape in shapes for width in (shape[0][1], shape[1][1]))
    else:
        assert set(epochs[0]) <= training
        assert shapes == {((6, 24), (6, 24))}
    assert one.batch(0)["example"].tolist() != one.batch(steps)["example"].tolist()
    assert one.batch(0)["tokens"].dtype == np.int32 and one.batch(0)["weights"].dtype == np.float32


@pytest.mark.parametrize("packing", ["documents", "pad"])
def test_evaluation_sees_every_held_out_pair_once(verses: Path, packing: str) -> None:
    config = config_of(verses, packing)
    prepared = prepare(config, progress=False)
    batches: EvaluationBatches = evaluation_batches(prepared, config, batch_size=4, length=24, objective=SEQ2SEQ)
    found: list[tuple[str, str]] = []
    targets = 0
    for batch in batches:
        kept = {name: rows[batch["example"] >= 0] for name, rows in batch.items()}
        assert not batch["weights"][batch["example"] < 0].any()
        found += pairs_in(kept, prepared)
        targets += int(batch["weights"].sum())
    assert sorted(found) == sorted(prepared.validation_pairs())
    assert targets == prepared.meta.tokens("validation")


def test_efficiency_counts_what_is_there(verses: Path) -> None:
    for packing in ("documents", "pad"):
        config = config_of(verses, packing)
        prepared = prepare(config, progress=False)
        batches = batches_of(prepared, config, length=48, batch_size=1)
        parts = [batches.batch(step) for step in range(batches.examples_per_epoch)]
        for prefix, efficiency in (("", batches.efficiency), ("source_", batches.source_efficiency)):
            filled = sum(int((part[f"{prefix}segments"] > 0).sum()) for part in parts)
            assert efficiency == pytest.approx(filled / sum(part[f"{prefix}segments"].size for part in parts))


def test_long_pairs_are_left_out_or_cut_and_reported(verses: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for packing in ("documents", "pad"):
        config = config_of(verses, packing, validation_fraction=0.0)
        prepared = prepare(config, progress=False)
        fits = [
            sides for sides in (document.sides for document in documents(config.sources[0]))
            if len(sides[0]) < 12 and len(sides[1]) < 9
        ]  # fmt: skip
        for too_long in ("drop", "truncate"):
            objective = Seq2Seq(source_length=12, target_length=9, too_long=too_long)
            batches = batches_of(prepared, config, objective=objective, batch_size=1)
            found: list[tuple[str, str]] = []
            for step in range(batches.examples_per_epoch):
                found += pairs_in(batches.batch(step), prepared)
            assert max(len(source) for source, _ in found) == 11
            assert max(len(target) for _, target in found) == 8
            assert len(found) == (len(fits) if too_long == "drop" else 300)
            assert too_long == "truncate" or sorted(found) == sorted(fits)
        if packing == "documents":
            said = capsys.readouterr().err
            assert (
                f"{300 - len(fits)} of 300 pairs are longer than 12 tokens of source or 9 of target: left out" in said
            )
            assert ": cut" in said
    batches_of(prepared, config, objective=objective)
    assert "longer" not in capsys.readouterr().err  # once is enough
    with pytest.raises(UserError, match="none of 300 pairs fits 3 tokens of source"):
        batches_of(prepared, config, objective=Seq2Seq(source_length=3))


def test_no_more_shapes_than_are_allowed() -> None:
    sizes = np.arange(1, 90)
    for most in (1, 2, 4):
        assert len(choose_widths(sizes, sizes, 100, 100, most=most)) == most


def test_widths_waste_less_than_one_width_does() -> None:
    random = np.random.default_rng(0)
    source = random.integers(3, 100, 2000)
    target = np.clip(source + random.integers(-5, 6, 2000), 2, 100)
    widths = choose_widths(source, target, 100, 100, most=6)
    assert len(widths) == 6
    assert np.all(np.diff(widths, axis=0) >= 0)
    assert widths[-1].tolist() == [100, 100]
    fits = (source[:, None] <= widths[:, 0]) & (target[:, None] <= widths[:, 1])
    assert fits[:, -1].all()
    positions = widths.sum(axis=1)[fits.argmax(axis=1)]
    assert (source + target).sum() / positions.sum() > 0.8
    assert choose_widths(source[:1], target[:1], 100, 100, most=6).shape == (1, 2)


def test_sources_of_pairs_are_mixed_by_weight(verses: Path) -> None:
    one = config_of(verses, "pad", validation_fraction=0.0)
    config = dataclasses.replace(
        one, sources=(one.sources[0], dataclasses.replace(one.sources[0], limit=100, weight=3.0))
    )
    batches = batches_of(prepare(config, progress=False), config)
    firsts = [batches.batch(step)["example"].max() >= 300 for step in range(200)]
    assert np.mean(firsts) == pytest.approx(0.75, abs=0.02)
