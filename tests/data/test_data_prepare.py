"""Preparing: whole or not at all, once, and the same whoever does it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from train.data.prepared import make
from train.data.prepared.held_out import position_of
from train.data.prepared.prepare import DataConfig, check_vocabulary, fingerprint, prepare
from train.data.prepared.store import Prepared, TokenArray
from train.data.sources.source import documents
from train.data.sources.source_config import FilesSource
from train.data.tokenization.tokenizer import TokenizerConfig
from transformer.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
LARGE_DOCUMENTS = 150
# Prepares the files of argv[1] as `config_of` does, no file larger than argv[2] bytes; or says what the mistake is.
PROGRAM = """
import resource, sys
from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.source_config import FilesSource
from transformer.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
source = FilesSource(path=sys.argv[1])
try:
    prepare(DataConfig(sources=(source,), validation_fraction=0.5))
except UserError as error:
    sys.exit(f"UserError: {error}")
"""


def config_of(path: Path | str, **settings) -> DataConfig:
    defaults = {"sources": (FilesSource(path=str(path)),), "validation_fraction": 0.5}
    return DataConfig(**defaults | settings)  # pyright: ignore[reportArgumentType]


def start_program(path: Path, largest_file: int = resource.RLIM_INFINITY) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(path), str(largest_file)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(array: TokenArray, prepared: Prepared) -> list[str]:
    ends = array.offsets[1:]
    assert np.all(array.tokens[[0, *(ends - 1)]] == prepared.tokenizer.end_of_text)
    return [prepared.tokenizer.decode(array.tokens[a:b]) for a, b in zip(array.offsets, ends, strict=False)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One JSONL file that takes a second or two to prepare: xz is slow on the half that is held out."""
    letters = np.frombuffer(b"abcdefghijklmnop", np.uint8)
    text = np.random.default_rng(0).choice(letters, (LARGE_DOCUMENTS, 30_000))
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    path.write_text("".join(json.dumps({"text": row.tobytes().decode()}) + "\n" for row in text))
    return path


@pytest.mark.parametrize("tokenizer", [{"kind": "bytes"}, {"kind": "bpe", "vocab_size": 300}])
def test_every_document_is_in_its_split(corpus: Path, tokenizer: dict) -> None:
    config = config_of(corpus / "*.txt", tokenizer=TokenizerConfig(**tokenizer))
    prepared = prepare(config, progress=False)
    expected: dict[str, list[str]] = {"train": [], "validation": []}
    for document in documents(config.sources[0]):
        expected["validation" if position_of(document.id) < 0.5 else "train"].append(document.text)
    assert texts_of(prepared.train[0], prepared) == expected["train"]
    assert texts_of(prepared.validation[0], prepared) == expected["validation"]

    meta = prepared.meta
    for split in ("train", "validation"):
        counts = meta.counts(split)[0]
        assert counts.documents == len(expected[split])
        assert counts.bytes == sum(len(text.encode()) for text in expected[split])
        assert counts.tokens == len(getattr(prepared, split)[0].tokens) - 1
        assert meta.bytes_per_token(split) == counts.bytes / counts.tokens
    assert meta.largest_id == max(array.tokens.max() for array in (*prepared.train, *prepared.validation))
    assert 0 < (meta.bits_per_byte("xz") or 0) < 8


def test_the_number_of_workers_changes_nothing(corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=300)
    one = prepare(config_of(corpus / "*.txt", tokenizer=tokenizer, num_workers=1), progress=False)
    monkeypatch.setenv("MANYHEADS_CACHE", str(cache / "other"))
    four = prepare(config_of(corpus / "*.txt", tokenizer=tokenizer, num_workers=4), progress=False)
    assert one.directory != four.directory
    assert contents(one.directory) == contents(four.directory)


def test_a_second_call_reads_what_the_first_wrote(
    corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(corpus / "*.txt")
    first = prepare(config)
    assert "MB in" in capsys.readouterr().err
    # Nothing is written: it works with a cache folder that nobody may write to.
    (cache / "prepared" / f"{first.directory.name}.lock").unlink()
    monkeypatch.setattr("builtins.print", lambda *_, **__: pytest.fail("prepared twice"))
    second = prepare(config)
    assert second.meta == first.meta
    assert not (cache / "prepared" / f"{first.directory.name}.lock").exists()


def test_fingerprints_follow_whatever_changes_the_tokens(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus / "*.txt")
    source = config.sources[0]
    before = fingerprint(config)
    same = [
        dataclasses.replace(config, packing="documents", num_workers=3, prefetch=9),
        dataclasses.replace(config, sources=(dataclasses.replace(source, weight=2.0),)),
    ]
    other = [
        dataclasses.replace(config, validation_fraction=0.4),
        dataclasses.replace(config, validation=(source,)),
        dataclasses.replace(config, sources=(source, source)),
        dataclasses.replace(config, sources=(dataclasses.replace(source, on_error="skip"),)),
        dataclasses.replace(config, tokenizer=TokenizerConfig(kind="bpe", vocab_size=300)),
        dataclasses.replace(config, tokenizer=TokenizerConfig(kind="bpe", vocab_size=301)),
    ]
    assert {fingerprint(one) for one in same} == {before}
    assert len({before, *map(fingerprint, other)}) == 1 + len(other)

    tokenizer_file = tmp_path / "tokenizer.json"
    with_file = dataclasses.replace(config, tokenizer=TokenizerConfig(kind="file", path=str(tokenizer_file)))
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        fingerprint(with_file)
    tokenizer_file.write_text("one")
    first = fingerprint(with_file)
    tokenizer_file.write_text("two")
    assert fingerprint(with_file) != first

    (corpus / "00.txt").write_text("something else")
    assert fingerprint(config) != before


def test_sources_of_their_own_for_validation(corpus: Path) -> None:
    (corpus / "held.out").write_text("held out")
    held_out = FilesSource(path=str(corpus / "held.out"))
    prepared = prepare(config_of(corpus / "*.txt", validation=(held_out,)), progress=False)
    assert prepared.meta.train[0].documents == 40
    assert texts_of(prepared.validation[0], prepared) == ["held out"]


def test_rows_left_out_are_counted_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": \n{"text": "fine too"}\n{}\n')
    source = FilesSource(path=str(tmp_path / "rows.jsonl"), on_error="skip")
    prepared = prepare(DataConfig(sources=(source,), validation_fraction=0.0))
    assert prepared.meta.train[0].skipped == 2
    assert prepared.validation == ()
    assert "2 documents skipped, the first:" in (err := capsys.readouterr().err)
    assert "rows.jsonl:2: malformed JSON" in err


def test_a_terminal_shows_a_live_bar(corpus: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, str(corpus / "*.txt"), str(resource.RLIM_INFINITY)]
    program = subprocess.Popen(command, cwd=ROOT, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as terminal:
        while piece := terminal.read(4096):  # an error is how a terminal ends on Linux
            shown += piece
    assert program.wait(timeout=60) == 0
    assert "━━━━" in shown.decode()
    assert "kB" in shown.decode()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_fault_in_the_text_leaves_nothing_behind(tmp_path: Path, cache: Path, kind: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    tokenizer = TokenizerConfig(kind=kind, vocab_size=300 if kind == "bpe" else None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: malformed JSON"):
        prepare(config_of(tmp_path / "rows.jsonl", tokenizer=tokenizer), progress=False)
    assert [path.suffix for path in (cache / "prepared").iterdir()] == [".lock"]


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo\n\nthree")
    real = make.write_meta

    def changed(*arguments: object) -> None:
        path.write_text("one\n\nother")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(make, "write_meta", changed)
        with pytest.raises(UserError, match=r"text.txt: a file changed while it was read; run the same command again"):
            prepare(config_of(path, validation_fraction=0.0))
    assert not [one for one in (cache / "prepared").iterdir() if one.is_dir()]
    assert prepare(config_of(path, validation_fraction=0.0)).directory.is_dir()


def test_an_empty_corpus_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"empty\.txt: no document with text to train on; give the source some text"):
        prepare(config_of(tmp_path / "empty.txt"), progress=False)
    source = FilesSource(path=str(tmp_path / "bad.txt"), on_error="skip")
    with pytest.raises(UserError, match=r"no document with text to train on \(1 were left out as unreadable\)"):
        prepare(DataConfig(sources=(source,), validation_fraction=0.0), progress=False)
    with pytest.raises(UserError, match=r"missing\.txt: no such file"):
        prepare(config_of(tmp_path / "missing.txt"), progress=False)


def test_holding_out_no_document_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(
        UserError, match=r"validation_fraction 0\.001 holds out none of these few documents: raise it, cut a long text"
    ):
        prepare(config_of(tmp_path / "one.txt", validation_fraction=0.001), progress=False)


def test_a_vocabulary_that_is_too_small_is_refused(corpus: Path) -> None:
    prepared = prepare(config_of(corpus / "*.txt"), progress=False)
    largest = prepared.meta.largest_id
    check_vocabulary(prepared, largest + 1)
    with pytest.raises(
        UserError, match=rf"token id {largest} is outside the model's vocabulary of {largest}.*least 256"
    ):
        check_vocabulary(prepared, largest)


def test_damaged_data_is_not_read(corpus: Path) -> None:
    config = config_of(corpus / "*.txt")
    directory = prepare(config, progress=False).directory
    tokens = directory / "train" / "0.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"damaged .*delete this folder and prepare the data again"):
        prepare(config, progress=False)


def test_a_cache_folder_that_cannot_be_made(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "cache", Path("/proc/cache")):
        monkeypatch.setenv("MANYHEADS_CACHE", str(folder))
        with pytest.raises(UserError, match=f"cannot write {folder}.*or set MANYHEADS_CACHE") as raised:
            prepare(config_of(corpus / "*.txt"), progress=False)
        assert "\n" not in str(raised.value)


def test_a_disk_that_fills_up_leaves_nothing_behind(large: Path, cache: Path) -> None:
    program = start_program(large, largest_file=1_000_000)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 1
    assert errors.splitlines()[-1].startswith("UserError: cannot write")
    assert "File too large" in errors
    assert [path.suffix for path in (cache / "prepared").iterdir()] == [".lock"]


@pytest.mark.parametrize("next_one", ["the same", "another"])
def test_a_killed_prepare_is_not_taken_for_whole(large: Path, corpus: Path, cache: Path, next_one: str) -> None:
    folder = cache / "prepared"
    program = start_program(large)
    try:
        while not (started := list(folder.glob("*.partial/train/0.tokens"))) or not started[0].stat().st_size:
            assert program.poll() is None, program.communicate()
            time.sleep(0.01)
    finally:
        program.send_signal(signal.SIGKILL)
        program.communicate()
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".partial"]

    prepared = prepare(config_of(large if next_one == "the same" else corpus / "*.txt"), progress=False)
    counts = (*prepared.meta.train, *prepared.meta.validation)
    assert sum(split.documents for split in counts) == (LARGE_DOCUMENTS if next_one == "the same" else 40)
    # Of other data it may still be continued.
    assert len(list(folder.glob("*.partial"))) == (next_one == "another")


def test_two_at_once_make_it_once(large: Path, cache: Path) -> None:
    programs = [start_program(large) for _ in range(2)]
    errors = [program.communicate(timeout=120)[1] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], errors
    assert sum("MB in" in error for error in errors) == 1
    assert sorted(path.suffix for path in (cache / "prepared").iterdir()) == ["", ".lock"]


def test_configs_do_not_import_the_data_packages() -> None:
    program = """
import sys
import train.data.loader, train.data.prepared.prepare, train.data.sources.source
import train.data.tokenization.tokenizer, train.data.tokenization.vocabulary
heavy = {"datasets", "filelock", "grain", "jax", "pandas", "pyarrow", "rich", "tokenizers"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"sources": ()}, "sources"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"num_workers": -1}, "num_workers"),
        ({"prefetch": 0}, "prefetch"),
    ],
)
def test_inconsistent_configs_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        DataConfig(**settings)
    assert raised.value.field == field
