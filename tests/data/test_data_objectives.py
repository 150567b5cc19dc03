"""Objectives: their batches hold what they must, and are a function of the seed and the step."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.huggingface.vocabularies import tokenizer as vocabulary
from train.data.evaluation import evaluation_batches
from train.data.examples.draws import Draws
from train.data.examples.masked import Masking, MaskingRule
from train.data.examples.spans import MODES
from train.data.loader import Batches, train_batches
from train.data.prepared.prepare import DataConfig, check_vocabulary, prepare
from train.data.prepared.store import Prepared
from train.data.sources.source_config import FilesSource
from train.data.tokenization.tokenizer import CLS, MASK, SEP, SubwordTokenizer, TokenizerConfig
from train.objectives import OBJECTIVES, Causal, Masked, Objective, Seq2Seq, SpanCorruption, Ul2
from transformer.errors import ConfigError, UserError

LENGTH = 32
MASKED_KEYS = {"tokens", "targets", "weights", "predicted", "segments", "positions", "lengths", "example"}
SIDES_KEYS = MASKED_KEYS - {"predicted"} | {"source_tokens", "source_segments", "source_positions", "source_lengths"}
KEYS: dict[str, set[str]] = {
    "causal": {"tokens", "targets", "weights", "example"},
    "masked": MASKED_KEYS,
    "next_sentence": MASKED_KEYS | {"token_types", "labels"},
    "sentence_order": MASKED_KEYS | {"token_types", "labels"},
    "replaced_tokens": MASKED_KEYS,
    "prefix": {"tokens", "targets", "weights", "prefix", "example"},
    "span_corruption": SIDES_KEYS,
    "ul2": SIDES_KEYS,
}
TEXT_KINDS = list(KEYS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """60 documents of 1 to 200 letters as bytes; a document is one letter again and again, spaced."""
    folder = tmp_path_factory.mktemp("objectives")
    random = np.random.default_rng(0)
    texts = [chr(ord("0") + number).join([" "] * random.integers(2, 100)).strip() for number in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYHEADS_CACHE", str(folder))
        return prepare(config_of(folder / "rows.jsonl"), progress=False)


def config_of(path: Path | str = "rows.jsonl", **settings) -> DataConfig:
    tokenizer = TokenizerConfig(special_tokens=(MASK, CLS, SEP, *MODES), sentinels=40)
    defaults = {"validation_fraction": 0.3, "tokenizer": tokenizer}
    return DataConfig(sources=(FilesSource(path=str(path)),), **defaults | settings)


def objective_of(kind: str, **settings) -> Objective:
    return OBJECTIVES[kind](**({"source_length": 48} if kind in ("span_corruption", "ul2") else {}) | settings)


def batches_of(prepared: Prepared, objective: Objective, packing="chunk", **settings) -> Batches:
    defaults = {"batch_size": 4, "length": LENGTH, "seed": 0}
    return train_batches(prepared, config_of(packing=packing), objective=objective, **defaults | settings)


def cases() -> list:
    documents: list[str] = ["masked", "next_sentence", "sentence_order"]
    return [(kind, "chunk") for kind in TEXT_KINDS] + [(kind, "documents") for kind in documents]


@pytest.mark.parametrize(("kind", "packing"), cases())
def test_a_step_depends_on_seed_and_step_alone(prepared: Prepared, kind: str, packing: str) -> None:
    objective = objective_of(kind)
    batches = batches_of(prepared, objective, packing)
    for step in (0, 7, 123_456):
        expected = batches.batch(step)
        assert set(expected) == KEYS[kind]
        again = batches_of(prepared, objective, packing).batch(step)
        halves = [
            batches_of(prepared, objective, packing, process_index=index, process_count=2).batch(step)
            for index in (0, 1)
        ]
        for name, value in expected.items():
            np.testing.assert_array_equal(again[name], value)
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), value)
            wanted = {"weights": np.float32, "example": np.int64}.get(name, np.int32)
            assert value.dtype == wanted, name
            assert value.shape[0] == 4 and value.flags.c_contiguous
    shapes = {name: value.shape for name, value in expected.items()}
    assert {name: value.shape for name, value in batches.batch(8).items()} == shapes


@pytest.mark.parametrize("kind", ["masked", "next_sentence", "sentence_order", "prefix", "span_corruption", "ul2"])
def test_an_example_is_corrupted_anew_each_epoch(prepared: Prepared, kind: str) -> None:
    batches = batches_of(prepared, objective_of(kind), batch_size=1)
    count = batches.examples_per_epoch
    shown: dict[int, set[bytes]] = {}
    for step in range(3 * count):
        batch = batches.batch(step)
        content = b"".join(batch[name].tobytes() for name in sorted(batch))
        shown.setdefault(int(batch["example"][0]), set()).add(content)
    assert len(shown) == count
    assert np.mean([len(different) for different in shown.values()]) > 2
    other = batches_of(prepared, objective_of(kind), batch_size=1, seed=1)
    assert any(batches.batch(0)[name].tobytes() != other.batch(0)[name].tobytes() for name in ("tokens", "weights"))


@pytest.mark.parametrize("kind", ["masked", "span_corruption"])
def test_rows_of_several_sources_are_corrupted_as_if_alone(prepared: Prepared, kind: str) -> None:
    two = dataclasses.replace(prepared, train=prepared.train * 2)
    config = dataclasses.replace(config_of(), sources=config_of().sources * 2)
    settings = {"batch_size": 6, "length": LENGTH, "seed": 5, "objective": objective_of(kind)}
    expected = train_batches(two, config, **settings).batch(3)
    assert len({example * 2 // (1 + max(expected["example"])) for example in expected["example"].tolist()}) == 2
    for index in range(6):
        row = train_batches(two, config, **settings, process_index=index, process_count=6).batch(3)
        for name, value in expected.items():
            np.testing.assert_array_equal(row[name][0], value[index])


@pytest.mark.parametrize(("kind", "packing"), cases())
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_is_the_same_each_time(prepared: Prepared, kind: str, packing: str, processes: int) -> None:
    examples = []
    for index in range(processes):
        runs = []
        for _ in range(2):
            batches = evaluation_batches(
                prepared, config_of(packing=packing), batch_size=4, length=LENGTH, objective=objective_of(kind),
                process_index=index, process_count=processes,
            )  # fmt: skip
            runs.append(list(batches))
        for one, other in zip(*runs, strict=True):
            assert set(one) == KEYS[kind]
            for name, value in one.items():
                np.testing.assert_array_equal(value, other[name])
            beyond = one["example"] < 0
            assert not one["weights"][beyond].any()
            if "labels" in one:
                assert np.all(one["labels"][beyond] == -1) and np.all(one["labels"][~beyond] >= 0)
            examples += one["example"][~beyond].tolist()
        assert len({batch["tokens"].shape for batch in runs[0]}) == 1
    assert sorted(examples) == list(range(max(examples) + 1))


def special(prepared: Prepared, *names: str) -> list[int]:
    return [prepared.tokenizer.special_ids[name] for name in names]


def all_of(batches: Batches, steps: int = 200) -> dict[str, np.ndarray]:
    parts = [batches.batch(step) for step in range(steps)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("packing", ["chunk", "documents"])
def test_masked_text_is_framed_and_its_specials_stay(prepared: Prepared, packing: str) -> None:
    mask, cls, sep = special(prepared, MASK, CLS, SEP)
    rows = all_of(batches_of(prepared, objective_of("masked"), packing))
    tokens, targets, weights, segments = (rows[name] for name in ("tokens", "targets", "weights", "segments"))
    assert np.all(tokens[:, 0] == cls)
    framing = np.isin(targets, (cls, sep, 0))
    assert not weights[framing].any()
    np.testing.assert_array_equal(tokens[framing], targets[framing])
    assert np.all(targets[segments > 0] != prepared.tokenizer.end_of_text)
    assert not np.any(tokens[weights == 0] == mask)
    assert np.all(tokens[segments == 0] == 0)
    text = (segments > 0) & ~framing
    assert weights[text].mean() == pytest.approx(0.15, abs=0.01)
    hidden = weights > 0
    assert np.mean(tokens[hidden] == mask) == pytest.approx(0.8, abs=0.03)
    assert np.mean(tokens[hidden] == targets[hidden]) == pytest.approx(0.1, abs=0.025)
    np.testing.assert_array_equal(rows["targets"][~hidden], tokens[~hidden])
    for row in range(50):
        for segment in range(1, segments[row].max() + 1):
            piece = targets[row][segments[row] == segment]
            assert piece[0] == cls and piece[-1] == sep
            if packing == "documents":  # one document is one letter
                assert np.sum(piece == sep) == 1
                assert len(set(piece.tolist()) - {cls, sep, ord(" ")}) <= 1
            np.testing.assert_array_equal(rows["positions"][row][segments[row] == segment], np.arange(len(piece)))


def test_a_token_that_was_added_to_a_vocabulary_is_not_drawn_in_the_place_of_another() -> None:
    """Its model may have no embedding for it."""
    made = vocabulary("wordpiece")
    made.add_special_tokens([MASK])
    made.add_tokens(["later"])
    tokenizer = SubwordTokenizer(made, "</s>")
    size, later = tokenizer.vocab_size - 2, tokenizer.encode("later")[0]
    assert later == size + 1
    rule = MaskingRule(rate=1.0, mask_share=0.0, random_share=1.0, whole_word=False, ngram=1)
    tokens = np.full((40, 100), later)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens)}
    hidden = Masking(tokenizer, rule).apply(batch, Draws(np.uint64(0), np.arange(40)))
    assert hidden["weights"].all() and set(hidden["tokens"].ravel()) == set(range(4, size))


@pytest.mark.parametrize("settings", [{}, {"whole_word": True}, {"ngram": 10}, {"mask_rate": 0.4}])
def test_places_to_score_hold_all_that_is_predicted(prepared: Prepared, settings: dict) -> None:
    rows = all_of(batches_of(prepared, objective_of("masked", **settings)))
    predicted, weights = rows["predicted"], rows["weights"]
    assert all(len(set(row)) == len(row) for row in predicted.tolist())
    found = np.take_along_axis(weights, predicted, axis=1)
    np.testing.assert_array_equal(found.sum(axis=1), weights.sum(axis=1))
    # In order, and first those that count.
    assert np.all(np.diff(found, axis=1) <= 0)
    if not settings.keys() & {"whole_word", "ngram"}:
        assert predicted.shape[1] == math.ceil(settings.get("mask_rate", 0.15) * LENGTH)


def test_masked_evaluation_shows_all_of_the_text(prepared: Prepared) -> None:
    for packing in ("chunk", "documents"):
        batches = evaluation_batches(
            prepared, config_of(packing=packing), batch_size=4, length=LENGTH, objective=objective_of("masked")
        )
        text = np.concatenate([b["targets"][b["example"] >= 0].reshape(-1) for b in batches])
        expected = prepared.validation[0].tokens
        assert sorted(text[(text > 0) & (text < 256)].tolist()) == sorted(expected[expected > 0].tolist())


def test_words_are_hidden_whole(prepared: Prepared) -> None:
    rows = all_of(batches_of(prepared, objective_of("masked", whole_word=True, mask_rate=0.3)), 50)
    letter = (rows["targets"] >= ord("0")) & (rows["targets"] < ord("Z"))
    together = (
        letter[:, 1:]
        & letter[:, :-1]
        & np.array([chr(n).isalnum() for n in range(256)] + [False] * 99)[rows["targets"][:, 1:]]
    )
    together &= np.isin(rows["targets"][:, :-1], [n for n in range(256) if chr(n).isalnum()])
    np.testing.assert_array_equal(rows["weights"][:, 1:][together], rows["weights"][:, :-1][together])


@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
def test_two_stretches_of_text_and_what_they_are_to_each_other(prepared: Prepared, kind: str) -> None:
    cls, sep = special(prepared, CLS, SEP)
    rows = all_of(batches_of(prepared, objective_of(kind)), 400)
    labels = rows["labels"]
    assert labels.mean() == pytest.approx(0.5, abs=0.04)
    tokens = prepared.train[0].tokens.tobytes()
    for row in range(200):
        inside = rows["segments"][row] > 0
        targets, types = rows["targets"][row][inside], rows["token_types"][row][inside]
        assert targets[0] == cls and targets[-1] == sep and np.sum(targets == sep) == 2
        assert np.all(np.diff(types) >= 0) and set(types) == {0, 1}
        first, second = targets[types == 0][1:-1], targets[types == 1][:-1]
        assert len(first) and len(second)
        parts = [part.astype(prepared.tokenizer.dtype).tobytes() for part in (first, second)]
        assert parts[0] in tokens and parts[1] in tokens
        if kind == "sentence_order":
            assert (parts[0] + parts[1] if labels[row] else parts[1] + parts[0]) in tokens
        elif labels[row]:
            assert parts[0] + parts[1] in tokens
        else:
            assert set(first.tolist()) - {ord(" ")} != set(second.tolist()) - {ord(" ")} or len(second) == 1
        assert not rows["token_types"][row][~inside].any()
    beyond = rows["segments"] == 0
    assert not rows["weights"][beyond].any()


def test_a_prefix_is_seen_and_the_rest_is_predicted(prepared: Prepared) -> None:
    rows = all_of(batches_of(prepared, objective_of("prefix")), 500)
    causal = all_of(batches_of(prepared, objective_of("causal")), 500)
    for name in ("tokens", "targets", "example"):
        np.testing.assert_array_equal(rows[name], causal[name])
    prefix = rows["prefix"]
    assert (prefix.min(), prefix.max()) == (1, LENGTH - 1)
    assert prefix.mean() == pytest.approx(LENGTH / 2, rel=0.05)
    # The token that stands at place p is the target of place p - 1: the first that is not seen is predicted.
    np.testing.assert_array_equal(rows["weights"].sum(axis=1), LENGTH - prefix + 1)
    assert np.all(rows["weights"][np.arange(len(prefix)), prefix - 1] == 1)


def texts_of_sides(rows: dict[str, np.ndarray], row: int, sentinels: list[int]) -> list[int]:
    """The raw text of a row: the source with each sentinel replaced by its span."""
    target = rows["targets"][row][rows["segments"][row] > 0].tolist()
    source = rows["source_tokens"][row][rows["source_segments"][row] > 0].tolist()
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            spans[last := token] = []
        else:
            spans[last].append(token)
    return [token for place in source[:-1] for token in (spans[place] if place in sentinels else [place])]


@pytest.mark.parametrize(("kind", "modes"), [("span_corruption", False), ("ul2", False), ("ul2", True)])
def test_spans_come_back_and_rows_are_laid_out_for_two_sides(prepared: Prepared, kind: str, modes: bool) -> None:
    objective = objective_of(kind, **({"mode_tokens": modes} if kind == "ul2" else {}))
    batches = batches_of(prepared, objective)
    rows = all_of(batches)
    end = prepared.tokenizer.end_of_text
    ids = [id for name, id in prepared.tokenizer.special_ids.items() if name.startswith("<extra")]
    tokens = prepared.train[0].tokens.tobytes()
    assert (rows["source_tokens"].shape[1], rows["tokens"].shape[1]) == (
        objective.source_width(LENGTH),
        objective.target_width(LENGTH),
    )
    if kind == "span_corruption":
        assert rows["tokens"].shape[1] < LENGTH
        assert np.all(rows["weights"] == 1) and np.all(rows["source_segments"] == 1)
    found_modes = set()
    for row in range(400):
        text = texts_of_sides(rows, row, ids)
        if modes:
            found_modes.add(text.pop(0))
        assert np.array(text).astype(prepared.tokenizer.dtype).tobytes() in tokens
        for side, width in (("source_", 48), ("", rows["tokens"].shape[1])):
            filled = int(rows[f"{side}segments"][row].sum())
            np.testing.assert_array_equal(rows[f"{side}segments"][row], np.arange(width) < filled)
            np.testing.assert_array_equal(rows[f"{side}positions"][row][:filled], np.arange(filled))
        assert rows["tokens"][row][0] == end
        np.testing.assert_array_equal(rows["tokens"][row][1:filled], rows["targets"][row][: filled - 1])
        assert rows["targets"][row][filled - 1] == end
    np.testing.assert_array_equal(rows["weights"], rows["segments"])
    assert found_modes == (set(special(prepared, *MODES)) if modes else set())
    filled = [rows[name].mean() for name in ("segments", "source_segments")]
    assert [batches.efficiency, batches.source_efficiency] == pytest.approx(filled, abs=0.03)


def test_denoisers_are_mixed_by_weight(prepared: Prepared) -> None:
    first, second, third = special(prepared, *MODES)
    rows = all_of(batches_of(prepared, objective_of("ul2", mode_tokens=True, denoiser_weights=(3.0, 1.0, 0.0))), 500)
    assert np.mean(rows["source_tokens"][:, 0] == first) == pytest.approx(0.75, abs=0.04)
    assert np.mean(rows["source_tokens"][:, 0] == second) == pytest.approx(0.25, abs=0.04)
    assert third not in rows["source_tokens"][:, 0]


@pytest.mark.parametrize(
    ("kind", "least"),
    [("masked", 3), ("next_sentence", 5), ("sentence_order", 5), ("prefix", 2), ("span_corruption", 3), ("ul2", 8)],
)
def test_the_shortest_sequences_work(prepared: Prepared, kind: str, least: int) -> None:
    known = {field.name for field in dataclasses.fields(OBJECTIVES[kind])}
    settings = {"source_length": least, "mode_tokens": True}
    objective = objective_of(kind, **{name: value for name, value in settings.items() if name in known})
    assert batches_of(prepared, objective, length=least).batch(3)["tokens"].shape == (4, least)
    with pytest.raises(UserError, match=f"at least {least}"):
        batches_of(prepared, objective, length=least - 1)


@pytest.mark.parametrize(
    ("objective", "length", "message"),
    [
        (objective_of("seq2seq"), 32, "'seq2seq' needs pairs, but the sources give single texts; set their target_field"),
        (objective_of("masked"), 2, "length: got 2; masked needs at least 3"),
        (objective_of("next_sentence"), 4, "length: got 4; next_sentence needs at least 5"),
        (objective_of("prefix"), 1, "length: got 1; prefix needs at least 2"),
        (objective_of("span_corruption", source_length=2), 32, r"source_length: got 2; span_corruption needs at least 3"),
        (objective_of("span_corruption", source_length=200), 32, "a source of 200 tokens gives targets of 45: set length"),
        (objective_of("span_corruption", source_length=1000), 300, "vocabulary has 40; set data.tokenizer.sentinels"),
        (objective_of("ul2"), 7, "length: got 7; ul2 needs at least 8"),
        (objective_of("ul2", source_length=700), 700, r"vocabulary has 40; set data\.tokenizer\.sentinels: \d+"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_early(prepared: Prepared, objective, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        objective.check_data(prepared, length)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=message):
        batches_of(prepared, objective, length=length)


def test_missing_special_tokens_are_named(corpus: Path) -> None:
    config = config_of(corpus / "*.txt", tokenizer=TokenizerConfig(special_tokens=(MASK,)))
    prepared = prepare(config, progress=False)
    with pytest.raises(
        UserError, match=r'needs \[CLS\], \[SEP\], which.*special_tokens: \["\[MASK\]", "\[CLS\]", "\[SEP\]"\]'
    ):
        objective_of("masked").check_data(prepared, 32)
    with pytest.raises(UserError, match=r"needs \[R\], \[S\], \[X\]"):
        objective_of("ul2", mode_tokens=True).check_data(prepared, 32)
    with pytest.raises(
        UserError, match=r"of up to \d+ spans; the vocabulary has 0; set data\.tokenizer\.sentinels: \d+"
    ):
        objective_of("span_corruption").check_data(prepared, 32)


@pytest.mark.parametrize("kind", ["prefix", "span_corruption", "ul2"])
def test_running_text_is_not_packed_by_document(prepared: Prepared, kind: str) -> None:
    with pytest.raises(
        UserError, match=rf"data\.packing: got 'documents'; {kind} is for running text: set it to 'chunk'"
    ):
        batches_of(prepared, objective_of(kind), "documents")


def test_too_little_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a b"}\n')
    config = config_of(tmp_path / "rows.jsonl", validation_fraction=0.0)
    prepared = prepare(config, progress=False)
    for kind in ("masked", "span_corruption", "prefix"):
        with pytest.raises(UserError, match=r"rows\.jsonl: 4 tokens are fewer"):
            train_batches(prepared, config, batch_size=1, length=LENGTH, seed=0, objective=objective_of(kind))
    with pytest.raises(UserError, match="'next_sentence' needs at least two documents"):
        objective_of("next_sentence").check_data(prepared, LENGTH)


def test_causal_refuses_sources_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "other": "b"}\n')
    source = FilesSource(path=str(tmp_path / "rows.jsonl"), target_field="other")
    prepared = prepare(DataConfig(sources=(source,), packing="pad", validation_fraction=0.0), progress=False)
    with pytest.raises(
        UserError, match="'causal' is for single texts, but the sources give pairs; set it to .*seq2seq"
    ):
        Causal().check_data(prepared, LENGTH)


def test_a_vocabulary_holds_what_an_objective_puts_in(prepared: Prepared) -> None:
    check_vocabulary(prepared, 256)
    check_vocabulary(prepared, 259, inserted=objective_of("masked").largest_inserted(prepared.tokenizer))
    for kind in ("masked", "ul2"):
        with pytest.raises(UserError, match="outside the model's vocabulary of 256; set model.vocab_size"):
            check_vocabulary(prepared, 256, inserted=objective_of(kind).largest_inserted(prepared.tokenizer))


@pytest.mark.parametrize(
    ("objective", "settings", "field"),
    [
        (Masked, {"mask_rate": 0.0}, "mask_rate"),
        (Masked, {"mask_share": 1.1}, "mask_share"),
        (Masked, {"random_share": 0.3}, "random_share"),
        (Masked, {"ngram": 0}, "ngram"),
        (SpanCorruption, {"noise_density": 0.6}, "noise_density"),
        (SpanCorruption, {"mean_span": 0.5}, "mean_span"),
        (Ul2, {"denoiser_weights": (0.0, 0.0, 0.0)}, "denoiser_weights"),
        (Ul2, {"denoiser_weights": (1.0, 1.0)}, "denoiser_weights"),
        (Seq2Seq, {"source_length": 1}, "source_length"),
        (Seq2Seq, {"target_length": 0}, "target_length"),
    ],
)
def test_inconsistent_configs_are_refused(objective: type, settings: dict, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        objective(**settings)
    assert raised.value.field == field
