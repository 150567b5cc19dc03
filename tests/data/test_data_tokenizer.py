"""Tokenizers: text comes back, ends of text stay the program's own, streams show no half characters."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.tokenization.stream import StreamDecoder
from train.data.tokenization.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    TokenizerConfig,
    byte_of_letter,
)
from train.data.tokenization.vocabulary import make_tokenizer
from transformer.errors import ConfigError, UserError

REVERSIBLE = ["bytes", "bpe", "unigram"]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    trained = {} if kind == "bytes" else {"vocab_size": 600}
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text("utf-8") for name in ("argparse.py", "ast.py", "bdb.py")]
    return make_tokenizer(TokenizerConfig(kind=kind, **trained), texts)  # pyright: ignore[reportArgumentType]


def streamed(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push([int(token)]) for token in ids), decoder.flush()]


@pytest.mark.parametrize("kind", REVERSIBLE)
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_any_text_comes_back(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    assert ids.dtype == tokenizer.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text
    assert tokenizer.end_of_text not in ids


@pytest.mark.parametrize("kind", [*REVERSIBLE, "wordpiece"])
def test_text_that_spells_the_end_of_text_does_not_end_it(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    assert tokenizer.end_of_text not in tokenizer.encode(f"a{END_OF_TEXT}b {END_OF_TEXT}")
    assert tokenizer.decode([tokenizer.end_of_text]) == ""
    assert tokenizer.token_bytes(tokenizer.end_of_text) in (b"", None)


@pytest.mark.parametrize("kind", REVERSIBLE)
@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 255), max_size=12))
def test_streams_of_arbitrary_tokens_end_as_the_whole_decodes(kind: str, numbers: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    assert "".join(streamed(tokenizer, np.array(numbers, np.int64))) == tokenizer.decode(numbers)


@pytest.mark.parametrize("kind", REVERSIBLE)
def test_a_stream_holds_a_character_back_until_it_is_whole(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    pieces = streamed(tokenizer, tokenizer.encode("x🙂ß"))
    assert "".join(pieces) == "x🙂ß"
    assert not any("\ufffd" in piece for piece in pieces)
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push([int(token)]) for token in tokenizer.encode("🙂")[:-1]) == ""
    assert "\ufffd" in decoder.flush()


def test_a_stream_of_wordpieces_ends_as_the_whole_decodes() -> None:
    tokenizer = tokenizer_of("wordpiece")
    ids = tokenizer.encode("def add_argument(self, *args): isn't it unhelpful?")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["words", "wordpiece", *REVERSIBLE])
def test_text_that_goes_on_from_a_prompt_keeps_the_space_between_them(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = "import argparse as _argparse"
    ids = tokenizer.encode(text).tolist()
    for place in range(1, len(ids)):
        prompt, new = ids[:place], ids[place:]
        assert tokenizer.decode(prompt) + tokenizer.continuation(prompt, new) == tokenizer.decode(ids)
        decoder = StreamDecoder(tokenizer, prompt)
        pieces = [*(decoder.push([token]) for token in new), decoder.flush()]
        assert "".join(pieces) == tokenizer.continuation(prompt, new)
    if kind in ("words", "wordpiece"):
        assert tokenizer.continuation(tokenizer.encode("import").tolist(), tokenizer.encode("def").tolist()) == " def"


@pytest.mark.parametrize("kind", [*REVERSIBLE, "wordpiece"])
def test_a_special_token_is_read_in_a_prompt_if_asked_for(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    end = tokenizer.end_of_text
    assert end not in tokenizer.prompt(f"import{END_OF_TEXT}def")
    spelled = tokenizer.prompt(f"import{END_OF_TEXT}def", special=True)
    assert spelled == [*tokenizer.encode("import"), end, *tokenizer.encode("def")]


def test_wordpiece_keeps_words_and_marks_the_unknown() -> None:
    tokenizer = tokenizer_of("wordpiece")
    assert tokenizer.decode(tokenizer.encode("import  os\n\nimport sys")) == "import os import sys"
    assert len(tokenizer.encode("語")) == 1


def test_bytes_are_bytes_and_drop_the_null() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aß\0").tolist() == [97, 0xC3, 0x9F]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (256, 0)


def test_indentation_and_punctuation_become_single_tokens() -> None:
    tokenizer = tokenizer_of("bpe")
    assert len(tokenizer.encode("):\n        ")) == 1
    assert len(tokenizer.encode("\n\n    ")) == 1


@pytest.mark.parametrize("kind", [*REVERSIBLE, "wordpiece"])
def test_a_saved_tokenizer_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    text = f"def f(x):\n    return x  # Grüße {END_OF_TEXT}"
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_fingerprints_differ_between_tokenizers() -> None:
    assert len({tokenizer_of(kind).fingerprint() for kind in [*REVERSIBLE, "wordpiece"]}) == 4


def test_an_existing_file_is_used_as_it_is(tmp_path: Path) -> None:
    trained = tokenizer_of("bpe")
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    loaded = make_tokenizer(TokenizerConfig(kind="file", path=str(path)), [])
    assert loaded.encode("def f(x):").tolist() == trained.encode("def f(x):").tolist()
    with pytest.raises(UserError, match=r"has no token '<none>'.*end_of_text"):
        make_tokenizer(TokenizerConfig(kind="file", path=str(path), end_of_text="<none>"), [])
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        make_tokenizer(TokenizerConfig(kind="file", path=str(path)), [])
    with pytest.raises(UserError, match=r"missing\.json: cannot be read"):
        make_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "missing.json")), [])
    with pytest.raises(UserError, match="no tokenizer can be read here"):
        Tokenizer.load(tmp_path / "missing")


def test_merges_are_recovered_from_ranks(tmp_path: Path) -> None:
    """A byte-pair encoding written as ranks and read back encodes as before."""
    trained = tokenizer_of("bpe")
    assert isinstance(trained, SubwordTokenizer)
    vocabulary = json.loads(trained.model.to_str())["model"]["vocab"]
    spelled = {token: bytes(byte_of_letter()[c] for c in token) for token in vocabulary if token != END_OF_TEXT}
    lines = [b"%s %d" % (base64.b64encode(spelled[token]), vocabulary[token]) for token in spelled]
    (tmp_path / "ranks.tiktoken").write_bytes(b"\n".join(lines))
    ranked = make_tokenizer(TokenizerConfig(kind="gpt2", path=str(tmp_path / "ranks.tiktoken")), [])
    for word in ("argument", " parser", "unhelpfulness", "Grüße"):
        assert ranked.encode(word).tolist() == trained.encode(word).tolist()

    (tmp_path / "ranks.tiktoken").write_bytes(lines[0] + b"\n!\n")
    with pytest.raises(UserError, match=r"ranks\.tiktoken:2: not 'base64 rank'"):
        make_tokenizer(TokenizerConfig(kind="gpt2", path=str(tmp_path / "ranks.tiktoken")), [])


def test_ids_that_no_array_holds(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 77, "</s>": 1}, unk_token="a"))
    (tmp_path / "tokenizer.json").write_text(model.to_str().replace("77", str(2**32 - 1)))
    with pytest.raises(UserError, match="the tokenizer's ids go up to 4,294,967,295; allowed: below 16,777,216"):
        make_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json")), ())


def test_text_that_a_vocabulary_cannot_encode(tmp_path: Path) -> None:
    words = tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="?")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json")), ())
    with pytest.raises(UserError, match="this vocabulary cannot encode the text: .*; give its tokenizer.json a token"):
        tokenizer.encode("b")


def test_gpt2_gives_the_known_ids() -> None:
    try:
        tokenizer = make_tokenizer(TokenizerConfig(kind="gpt2"), [])
    except UserError as error:
        pytest.skip(f"needs a package index: {error}")
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.decode(tokenizer.encode("  Grüße 🙂\n")) == "  Grüße 🙂\n"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "bpe"}, "vocab_size"),
        ({"kind": "bpe", "vocab_size": 256}, "vocab_size"),
        ({"kind": "bytes", "vocab_size": 256}, "vocab_size"),
        ({"kind": "file"}, "path"),
        ({"kind": "bytes", "path": "x"}, "path"),
        ({"kind": "gpt2", "end_of_text": "x"}, "end_of_text"),
        ({"kind": "bpe", "vocab_size": 300, "training_bytes": 0}, "training_bytes"),
    ],
)
def test_inconsistent_configs_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        TokenizerConfig(**settings)
    assert raised.value.field == field


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TokenizerConfig().kind = "bpe"  # pyright: ignore[reportAttributeAccessIssue]
