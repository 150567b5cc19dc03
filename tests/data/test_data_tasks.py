"""The documents of an encoder's tasks: read, stored and laid out in rows; nothing is lost without being counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from train.data.evaluation import evaluation_batches
from train.data.examples.choices import Choices
from train.data.examples.labelled import LabelledDocuments
from train.data.examples.rows import longest_first
from train.data.examples.tagged import TaggedWords
from train.data.examples.windows import AnswerWindows
from train.data.loader import train_batches
from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.records import Answers, Document, Rejects
from train.data.sources.source import documents
from train.data.sources.source_config import FilesSource, HubSource, SourceConfig
from train.data.tokenization.align import encode_with_places, encode_words, tokens_of_answer
from train.data.tokenization.tokenizer import CLS, SEP, TokenizerConfig
from train.data.tokenization.vocabulary import make_tokenizer
from train.objectives import OBJECTIVES, Answer
from transformer.errors import UserError

BYTES = TokenizerConfig(special_tokens=(CLS, SEP))
SENTENCES = [["Peter", "Blackburn", "left", "."], ["EU", "rejects", "German", "call"], ["Grüße", "aus", "Köln"]] * 4
TAGS = [["B-PER", "I-PER", "O", "O"], ["B-ORG", "O", "B-MISC", "O"], ["O", "O", "B-LOC"]] * 4


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def source_of(path: Path, **settings) -> SourceConfig:
    return FilesSource(path=str(path), **settings)


def prepared_of(source: SourceConfig, **settings):
    config = DataConfig(
        sources=(source,), packing="documents", **{"tokenizer": BYTES, "validation_fraction": 0.0} | settings
    )
    return config, prepare(config, progress=False)


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    rows = [{"words": words, "tags": tags} for words, tags in zip(SENTENCES, TAGS, strict=True)]
    return write(tmp_path / "tagged.jsonl", rows)


TAGGED = {"text_field": "words", "label_field": "tags", "label_kind": "tags"}


@pytest.mark.parametrize("room", [3, 4, 7, 10, 40])
def test_the_longer_side_is_cut_first_as_the_library_does(room):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.enable_truncation(room, strategy="longest_first")
    sizes = np.array([(first, second) for first in range(1, 14) for second in range(1, 14)])
    first, second = longest_first(sizes[:, 0], sizes[:, 1], room)
    for (a, b), *taken in zip(sizes.tolist(), first, second, strict=True):
        encoding = model.encode("a " * a, "b " * b)
        assert taken == [encoding.type_ids.count(0), encoding.type_ids.count(1)], (a, b)


def test_pairs_stand_in_one_row_with_types(tmp_path):
    rows = [{"a": "x" * (1 + n % 7), "b": "y" * (1 + n % 11), "y": n % 2} for n in range(40)]
    source = source_of(
        write(tmp_path / "pairs.jsonl", rows), text_field="a", target_field="b", label_field="y", limit=40
    )
    _, prepared = prepared_of(source)
    cls, sep = (prepared.tokenizer.special_ids[name] for name in (CLS, SEP))
    made = LabelledDocuments(prepared.train[0], prepared.tokenizer, 12, "truncate")
    batch = made.gather(np.arange(40))
    for n, row in enumerate(rows):
        first, second = (int(one[0]) for one in longest_first(np.array([len(row["a"])]), np.array([len(row["b"])]), 9))
        wanted = [cls, *[ord("x")] * first, sep, *[ord("y")] * second, sep]
        rest = [0] * (12 - len(wanted))
        assert batch["tokens"][n].tolist() == wanted + rest
        assert batch["token_types"][n].tolist() == [0] * (first + 2) + [1] * (second + 1) + rest
        assert batch["segments"][n].tolist() == [1] * len(wanted) + rest
        assert batch["positions"][n].tolist() == [*range(len(wanted)), *rest]
        assert batch["labels"][n] == n % 2
    assert made.efficiency == pytest.approx(batch["segments"].mean())
    short = LabelledDocuments(prepared.train[0], prepared.tokenizer, 12, "drop")
    assert len(short) == sum(len(row["a"]) + len(row["b"]) <= 9 for row in rows)


@pytest.mark.parametrize("twice", [False, True], ids=["bert", "roberta"])
def test_pairs_are_framed_as_a_pretrained_tokenizer_frames_them(tmp_path, twice):
    names = ("<s>", "</s>", "<unk>")
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({n: i for i, n in enumerate([*names, *"abcdefg"])}, names[2])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(list(names))
    model.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    if not twice:
        model.post_processor = tokenizers.processors.BertProcessing(("</s>", 1), ("<s>", 0))
    model.save(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(20):
        question, context = (" ".join(rng.choice(list("abcdefg"), count)) for count in rng.integers(1, 6, 2))
        answer = {"text": [context[-1]], "answer_start": [len(context) - 1]}
        rows.append({"question": question, "context": context, "answers": answer})
    own = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"), end_of_text="</s>")
    _, prepared = prepared_of(source_of(write(tmp_path / "questions.jsonl", rows), **ANSWERS), tokenizer=own)
    made = AnswerWindows(prepared.train[0], prepared.tokenizer, 14, stride=128, question_length=64)
    batch = made.gather(np.arange(len(made)))
    assert len(made) == len(rows) and prepared.tokenizer.separators == 1 + twice
    for row, tokens, segments, types, (first, last) in zip(
        rows, *(batch[name] for name in ("tokens", "segments", "token_types", "labels")), strict=True
    ):
        expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(
            row["question"], row["context"]
        )
        assert tokens[segments > 0].tolist() == expected.ids
        assert types.sum() == len(row["context"].split()) + 1
        assert first == last == len(expected.ids) - 2
    assert made.efficiency == pytest.approx(batch["segments"].mean())


def test_numbers_are_numbers_and_else_file_and_row_are_named(tmp_path):
    good = write(tmp_path / "good.jsonl", [{"text": "a", "y": 1}, {"text": "b", "y": "-2.5"}, {"text": "c", "y": 0.25}])
    source = source_of(good, label_field="y", label_kind="number")
    _, prepared = prepared_of(source)
    assert prepared.train[0].labels.dtype == np.float32 and prepared.train[0].labels.tolist() == [1, -2.5, 0.25]
    assert prepared.meta.labels == () and prepared.meta.label_kind == "number"
    for value, said in (("often", "'often'"), (None, "None"), ("nan", "'nan'"), ("inf", "'inf'"), ([1], r"\[1\]")):
        bad = write(tmp_path / "bad.jsonl", [{"text": "a", "y": 1}, {"text": "b", "y": value}])
        with pytest.raises(UserError, match=rf"bad\.jsonl:2: field 'y' holds {said}, not a number; fix it"):
            list(documents(source_of(bad, label_field="y", label_kind="number")))


@pytest.mark.parametrize("kind", ["bytes", "wordpiece", "bpe", "unigram", "words"])
def test_the_first_token_of_each_word_is_found(kind):
    texts = [" ".join(words) for words in SENTENCES]
    sizes = {} if kind == "bytes" else {"vocab_size": 300}
    tokenizer = make_tokenizer(TokenizerConfig(kind=kind, special_tokens=(CLS, SEP), **sizes), texts)
    for words, (ids, firsts) in zip(SENTENCES, encode_words(tokenizer, SENTENCES), strict=True):
        assert tokenizer.decode(ids).replace(" ", "") == "".join(words)
        ends = [*firsts[1:], len(ids)]
        assert [tokenizer.decode(ids[a:b]).strip() for a, b in zip(firsts, ends, strict=True)] == words
    ((ids, firsts),) = encode_words(make_tokenizer(BYTES, []), [["a", "", "\0", "b"]])
    assert firsts.tolist() == [0, 1, 2, 3] and bytes(ids.astype(np.uint8)) == b"a   b"


def test_a_word_has_its_tag_at_its_first_token(tagged):
    _, prepared = prepared_of(source_of(tagged, **TAGGED))
    assert prepared.meta.labels == ("B-LOC", "B-MISC", "B-ORG", "B-PER", "I-PER", "O")
    made = TaggedWords(prepared.train[0], prepared.tokenizer, 40, "truncate")
    batch = made.gather(np.arange(3))
    for row, (words, tags) in enumerate(zip(SENTENCES[:3], TAGS[:3], strict=True)):
        places = np.flatnonzero(batch["weights"][row])
        sizes = [len(f" {word}".encode()) for word in words]
        assert places.tolist() == [1, *np.cumsum(sizes)[:-1]]
        assert [prepared.meta.labels[number] for number in batch["targets"][row, places]] == tags
        assert not batch["targets"][row][batch["weights"][row] == 0].any()
    cut = TaggedWords(prepared.train[0], prepared.tokenizer, 10, "truncate").gather(np.arange(3))
    assert cut["weights"].sum(1).tolist() == [2, 2, 2] and cut["weights"].dtype == np.float32


def test_tags_and_words_that_do_not_match_are_named(tmp_path):
    bad = write(tmp_path / "bad.jsonl", [{"words": ["a", "b"], "tags": ["O"]}, {"words": "a b", "tags": ["O"]}])
    with pytest.raises(UserError, match=r"bad\.jsonl:1: field 'tags' holds 1 tags, not a tag for each of 2 words"):
        list(documents(source_of(bad, **TAGGED)))
    rejects = Rejects("skip")
    assert list(documents(source_of(bad, on_error="skip", **TAGGED), rejects)) == [] and rejects.count == 2


def test_columns_of_words_and_tags(tmp_path):
    path = tmp_path / "train.conll"
    path.write_text("-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n# NN I-NP O\n1 CD I-NP O", "utf-8")
    found = list(documents(source_of(path, **TAGGED)))
    assert [(one.id, one.words, one.label) for one in found] == [
        ("train.conll:3", ("EU", "rejects"), ("B-ORG", "O")), ("train.conll:6", ("#", "1"), ("O", "O")),
    ]  # fmt: skip
    path.write_text("EU B-ORG\nrejects\n\n", "utf-8")
    with pytest.raises(UserError, match=r"train\.conll:2: a line of this text has a word and no tag: 'rejects'"):
        list(documents(source_of(path, **TAGGED)))


def test_a_data_set_names_its_classes(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features(
        {"words": datasets.List(datasets.Value("string")), "tags": datasets.List(names), "label": names}
    )
    rows = {"words": [["a", "b"], ["c", "d"]], "tags": [[1, 0], [0, 0]], "label": [1, -1]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    hub = {"path": str(tmp_path / "set"), "streaming": True}
    assert [one.label for one in documents(HubSource(**hub, **TAGGED))] == [("yes", "no"), ("no", "no")]
    plain = {"words": ["a", "b"], "label": [1, -1]}
    features = datasets.Features({"words": datasets.Value("string"), "label": names})
    datasets.Dataset.from_dict(plain, features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    rejects = Rejects("skip")
    classes = HubSource(**hub, text_field="words", label_field="label", on_error="skip")
    assert [one.label for one in documents(classes, rejects)] == ["yes"] and rejects.count == 1


CONTEXT = "Grüße! The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 3
QUESTIONS = [
    {"question": "What jumps?", "context": CONTEXT, "answers": {"text": ["brown fox"], "answer_start": [17]}},
    {"question": "Who sleeps?", "context": CONTEXT, "answers": {"text": ["the dog"], "answer_start": [131]}},
    {"question": "Why?", "context": "No reason.", "answers": {"text": [], "answer_start": []}},
]
ANSWERS = {"text_field": "question", "target_field": "context", "label_field": "answers", "label_kind": "answers"}


@pytest.mark.parametrize("kind", ["bytes", "wordpiece", "bpe", "unigram"])
def test_an_answer_is_found_among_the_tokens(kind):
    sizes = {} if kind == "bytes" else {"vocab_size": 320}
    tokenizer = make_tokenizer(TokenizerConfig(kind=kind, special_tokens=(CLS, SEP), **sizes), [CONTEXT])
    ((ids, places),) = encode_with_places(tokenizer, [CONTEXT])
    np.testing.assert_array_equal(ids, tokenizer.encode(CONTEXT))
    for answer in ("brown fox", "Grüße", "lazy dog", "on"):
        start = CONTEXT.index(answer)
        first, last = tokens_of_answer(places, start, start + len(answer))
        assert answer in CONTEXT[places[first, 0] : places[last, 1]]
        assert len(CONTEXT[places[first, 0] : places[last, 1]].strip()) <= len(answer) + 8
    assert tokens_of_answer(places, 10**6, 10**6 + 1).tolist() == [-1, -1]


@pytest.mark.parametrize("stride", [16, 1000])
def test_windows_cover_the_context_and_know_their_answer(tmp_path, stride):
    source = source_of(write(tmp_path / "questions.jsonl", QUESTIONS), **ANSWERS)
    _, prepared = prepared_of(source)
    array, tokenizer = prepared.train[0], prepared.tokenizer
    made = AnswerWindows(array, tokenizer, 64, stride=stride, question_length=64)
    batch = made.gather(np.arange(len(made)))
    for number, row in enumerate(QUESTIONS):
        context = row["context"].encode()
        covered = np.zeros(len(context), bool)
        own = np.flatnonzero(made.documents == number)
        for window in own:
            inside = (batch["token_types"][window] == 1).nonzero()[0][:-1]
            piece = bytes(batch["tokens"][window, inside].astype(np.uint8))
            start = int(made.first[window])
            assert context[start : start + len(piece)] == piece and inside[0] == made.before[window]
            covered[start : start + len(piece)] = True
            first, last = batch["labels"][window]
            answer = (row["answers"]["text"] or [""])[0].encode()
            at = len(row["context"][: (row["answers"]["answer_start"] or [0])[0]].encode())
            if answer and start <= at and at + len(answer) <= start + len(piece):
                assert bytes(batch["tokens"][window, first : last + 1].astype(np.uint8)) == answer
            else:
                assert (first, last) == (0, 0)
        assert covered.all()
        assert any(batch["labels"][window, 0] for window in own) == bool(row["answers"]["text"])
    assert len(made) > 6 and made.efficiency == pytest.approx(batch["segments"].mean())


def test_answers_that_do_not_stand_there_are_named(tmp_path):
    rows = [QUESTIONS[0] | {"answers": [{"text": "brown fox", "answer_start": 16}]}]
    with pytest.raises(UserError, match=r"bad\.jsonl:1: field 'answers': 'brown fox' is not at character 16"):
        list(documents(source_of(write(tmp_path / "bad.jsonl", rows), **ANSWERS)))
    rows = [QUESTIONS[0] | {"answers": [{"text": "The", "answer_start": -len(QUESTIONS[0]["context"])}]}]
    with pytest.raises(UserError, match="'The' is not at character -"):
        list(documents(source_of(write(tmp_path / "negative.jsonl", rows), **ANSWERS)))
    rows = [QUESTIONS[0] | {"answers": [{"text": "brown fox", "answer_start": 17}]}]
    (one,) = documents(source_of(write(tmp_path / "good.jsonl", rows), **ANSWERS))
    assert one.label == Answers(("brown fox",), (17,)) and Document.from_json(one.to_json()) == one


def test_choices_stand_in_rows_of_their_own(tmp_path):
    rows = [{"a": "He sat", "b": "and", "x": "ate", "y": "flew away", "n": n % 2} for n in range(6)]
    path = write(tmp_path / "choices.jsonl", rows)
    source = source_of(path, text_field="a", target_field="b", choice_fields=("x", "y"), label_field="n")
    _, prepared = prepared_of(source)
    made = Choices(prepared.train[0], prepared.tokenizer, 32, "drop")
    batch = made.gather(np.array([1, 4]))
    assert batch["tokens"].shape == (2, 2, 32) and batch["labels"].tolist() == [1, 0]
    for row in batch["tokens"].reshape(4, 32):
        assert bytes(row[1:7].astype(np.uint8)) == b"He sat"
    texts = [
        bytes(row[8:].astype(np.uint8)).rstrip(b"\0") for row in np.where(batch["tokens"] < 256, batch["tokens"], 0)[0]
    ]
    assert texts == [b"and ate", b"and flew away"]
    listed = write(
        tmp_path / "listed.jsonl", [{"a": "He", "x": ["sat", "ran"], "n": "B"}, {"a": "I", "x": ["a", "b"], "n": "A"}]
    )
    _, prepared = prepared_of(source_of(listed, text_field="a", choice_fields=("x",), label_field="n"))
    assert prepared.train[0].others == 2 and prepared.meta.labels == ("A", "B")
    many = [{"a": "He", "x": list("abcdefghijkl"), "n": n} for n in (11, 2, 10, 3, 11)]
    for first in (0, 1):
        shifted = [row | {"n": row["n"] + first} for row in many]
        path = write(tmp_path / f"many{first}.jsonl", shifted)
        _, prepared = prepared_of(source_of(path, text_field="a", choice_fields=("x",), label_field="n"))
        assert prepared.meta.labels == tuple(str(n + first) for n in range(12))
        assert prepared.train[0].labels.tolist() == [11, 2, 10, 3, 11]
    wrong = write(tmp_path / "wrong.jsonl", [row | {"n": "x"} for row in many])
    with pytest.raises(
        UserError, match="labels of 12 choices are x; allowed: the number of the correct one, from 0 or from 1"
    ):
        prepared_of(source_of(wrong, text_field="a", choice_fields=("x",), label_field="n"))
    uneven = write(
        tmp_path / "uneven.jsonl", [{"a": "He", "x": ["sat"], "n": "A"}, {"a": "I", "x": ["a", "b"], "n": "A"}]
    )
    with pytest.raises(
        UserError,
        match=r"uneven\.jsonl:2: 2 choices, where uneven\.jsonl:1 has 1; every document needs the same number",
    ):
        prepared_of(source_of(uneven, text_field="a", choice_fields=("x",), label_field="n"))


def test_held_out_documents_are_kept_as_they_were(tagged):
    config, prepared = prepared_of(source_of(tagged, **TAGGED), validation_fraction=0.4)
    everything = {one.id: one for one in documents(config.sources[0])}
    held_out = prepared.held_out(prepared.validation[0])
    assert 0 < len(held_out) == prepared.validation[0].documents < len(everything)
    assert all(everything[one.id] == one for one in held_out)


def test_rows_of_padding_have_no_weight_whatever_the_labels(tmp_path):
    source = source_of(write(tmp_path / "questions.jsonl", QUESTIONS), **ANSWERS)
    other = (source_of(tmp_path / "questions.jsonl", **ANSWERS),)
    config, prepared = prepared_of(source, validation=other)
    objective = Answer(stride=40)
    *_, last = evaluation_batches(prepared, config, batch_size=16, length=64, objective=objective)
    outside = last["example"] < 0
    assert outside.any() and (last["labels"][outside] == -1).all() and not last["weights"][outside].any()


def test_what_does_not_suit_the_task_is_one_line(tmp_path, tagged):
    def told(source: SourceConfig, kind: str, **settings) -> str:
        config, prepared = prepared_of(source)
        with pytest.raises(UserError) as raised:
            train_batches(prepared, config, batch_size=2, length=32, seed=0, objective=OBJECTIVES[kind](**settings))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    words = source_of(tagged, **TAGGED)
    assert (
        "'classification' needs documents with a class (label_kind 'class'), but the sources give a tag for each"
        in told(words, kind="classification")
    )
    assert "set it to 'token_classification'" not in told(words, kind="regression")
    assert "the objective to 'token_classification'" in told(words, kind="regression")
    path = write(tmp_path / "c.jsonl", [{"text": "a", "x": "b", "y": "c", "n": n} for n in (0, 1)])
    choices = source_of(path, choice_fields=("x", "y"), label_field="n")
    assert "objective.num_choices: got 4; the documents of" in told(choices, kind="choice")
    assert "'classification' is not for texts with choices" in told(choices, kind="classification")
    plain = source_of(path, label_field="n")
    assert "'choice' needs texts with choices; set choice_fields" in told(plain, kind="choice", num_choices=2)
    assert "'contrastive' needs pairs" in told(plain, kind="contrastive")
    assert "'masked' is for single texts" in told(source_of(path, target_field="x"), kind="masked")


def test_parquet_lists_are_read(tmp_path):
    table = pa.table({"words": SENTENCES[:2], "tags": TAGS[:2]})
    pq.write_table(table, tmp_path / "tagged.parquet")
    found = list(documents(source_of(tmp_path / "tagged.parquet", **TAGGED)))
    assert [list(one.words) for one in found] == SENTENCES[:2] and [list(one.label) for one in found] == TAGS[:2]
