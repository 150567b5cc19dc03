"""Special tokens: there when asked for, never out of text, never in what is read back."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from train.data.tokenization.tokenizer import CLS, END_OF_TEXT, MASK, SEP, Tokenizer, TokenizerConfig, sentinel
from train.data.tokenization.vocabulary import make_tokenizer
from train.data.tokenization.words import WordPieces
from transformer.errors import ConfigError, UserError

NAMES = (MASK, CLS, SEP)
ADDED = (*NAMES, sentinel(0), sentinel(1))
KINDS = ["bytes", "bpe", "wordpiece", "unigram", "words"]
SPELLED = f"a {MASK} b{CLS} {SEP}c {sentinel(0)} {sentinel(1)}d [x] {END_OF_TEXT}"


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    trained = {} if kind == "bytes" else {"vocab_size": 600}
    config = TokenizerConfig(kind=kind, special_tokens=NAMES, sentinels=2, **trained)  # pyright: ignore
    text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text("utf-8")
    return make_tokenizer(config, [text, SPELLED * 50])


@pytest.mark.parametrize("kind", KINDS)
def test_they_have_ids_that_no_text_gives(kind: str, tmp_path: Path) -> None:
    made = tokenizer_of(kind)
    made.save(tmp_path)
    for tokenizer in (made, Tokenizer.load(tmp_path)):
        ids = [tokenizer.special(name) for name in (*ADDED, END_OF_TEXT)]
        assert None not in ids
        assert len(set(ids)) == 6
        assert tokenizer.special(END_OF_TEXT) == tokenizer.end_of_text
        assert tokenizer.special("[NONE]") is None
        assert max(ids) < tokenizer.vocab_size <= 600  # pyright: ignore
        assert not set(ids) & set(tokenizer.encode(SPELLED).tolist())
        text = tokenizer.encode("return the parser").tolist()
        assert tokenizer.decode([ids[0], *text, ids[3], ids[4]]) == tokenizer.decode(text)
        assert all(tokenizer.token_bytes(id) in (b"", None) for id in ids)  # pyright: ignore
        assert tokenizer.fingerprint() == made.fingerprint()
        assert tokenizer.dtype == np.uint16


def test_bytes_grow_above_255() -> None:
    tokenizer = tokenizer_of("bytes")
    assert [tokenizer.special(name) for name in ADDED] == [256, 257, 258, 259, 260]
    assert tokenizer.vocab_size == 261
    assert tokenizer.fingerprint() != make_tokenizer(TokenizerConfig(), []).fingerprint()


def test_a_file_keeps_those_it_has_and_gains_others(tmp_path: Path) -> None:
    trained = tokenizer_of("wordpiece")
    trained.save(tmp_path)
    config = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"))
    assert make_tokenizer(config, []).special_ids == trained.special_ids
    more = TokenizerConfig(kind="file", path=config.path, special_tokens=(MASK, "[R]"), sentinels=3)
    loaded = make_tokenizer(more, [])
    assert loaded.special(MASK) == trained.special(MASK)
    assert [loaded.special(name) for name in ("[R]", sentinel(2))] == [trained.vocab_size, trained.vocab_size + 1]
    assert loaded.vocab_size == trained.vocab_size + 2
    assert loaded.encode("parser").tolist() == trained.encode("parser").tolist()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"special_tokens": ("MASK",)}, "special_tokens"),
        ({"special_tokens": ("[MASK]", "[MASK]")}, "special_tokens"),
        ({"special_tokens": (END_OF_TEXT,)}, "special_tokens"),
        ({"special_tokens": (sentinel(0),), "sentinels": 1}, "special_tokens"),
        ({"sentinels": -1}, "sentinels"),
        ({"kind": "bpe", "vocab_size": 260, "sentinels": 10}, "vocab_size"),
        ({"kind": "words", "vocab_size": 1}, "vocab_size"),
    ],
)
def test_inconsistent_configs_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        TokenizerConfig(**settings)
    assert raised.value.field == field


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_word_are_known(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = "the unhelpfulness of\nargument parsers"
    ids = tokenizer.encode(text)
    joined = WordPieces(tokenizer).joined(ids[None].astype(np.int32))[0]
    begins = np.flatnonzero(~joined)
    words = [tokenizer.decode(part) for part in np.split(ids, begins[1:])]
    if kind == "words":
        assert len(words) == 5
    elif kind == "bytes":
        assert words == ["the", " ", "unhelpfulness", " ", "of", "\n", "argument", " ", "parsers"]
    else:
        found = [word.strip().removeprefix("##") for word in words if word.strip()]
        assert found == ["the", "unhelpfulness", "of", "argument", "parsers"]
        assert len(ids) > len(begins)


def test_a_vocabulary_that_marks_no_words_is_refused(tmp_path: Path) -> None:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    model.add_special_tokens(["</s>"])
    (tmp_path / "tokenizer.json").write_text(model.to_str())
    tokenizer = make_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json")), [])
    with pytest.raises(UserError, match=r"objective\.whole_word: this tokenizer\.json does not mark where words begin"):
        WordPieces(tokenizer)
