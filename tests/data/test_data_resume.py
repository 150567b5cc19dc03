"""Preparing goes on where it was stopped, and ends with the same bytes as if it had not been."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data import stopped_prepare
from tests.data.stopped_prepare import KINDS, config_of, write_files
from train.data.prepared import write_source
from train.data.prepared.journal import Journal, Part
from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.readers import Reader
from train.data.sources.source_config import FilesSource
from train.data.tokenization import tokenise
from transformer.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_source, "PART_BYTES", stopped_prepare.PART_BYTES)
    monkeypatch.setattr(tokenise, "_BATCH_DOCUMENTS", stopped_prepare.BATCH_DOCUMENTS)


def start(kind: str, folder: Path, wanted: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.data.stopped_prepare", kind, str(folder), str(wanted)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole(kind: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], int]:
    """The files of data that was prepared without a stop, and how many calls changed the disk."""
    write_files(kind, folder)
    monkeypatch.setenv("MANYHEADS_CACHE", str(cache.with_name("whole")))
    done = start(kind, folder)
    assert done.returncode == 0, done.stderr
    found = contents(prepare(config_of(kind, folder), progress=False).directory)
    monkeypatch.setenv("MANYHEADS_CACHE", str(cache))
    return found, int(done.stdout)


def unfinished(cache: Path) -> Path:
    (partial,) = (cache / "prepared").glob("*.partial")
    return partial


def parts_of(partial: Path) -> int:
    journal = Journal.read(partial / "unfinished" / "journal.jsonl")
    return 0 if journal is None else len(journal.parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_prepare_goes_on_with_the_same_result(
    kind: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, calls = whole(kind, tmp_path, cache, monkeypatch)
    random = np.random.default_rng(KINDS.index(kind))
    finished = 0
    for wanted in random.integers(1, calls // 2, 5):
        done = start(kind, tmp_path, int(wanted))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert ("continuing" in done.stderr) == (finished > 0)
        assert parts_of(unfinished(cache)) >= finished
        finished = parts_of(unfinished(cache))
    assert finished
    prepared = prepare(config_of(kind, tmp_path), progress=False)
    assert contents(prepared.directory) == expected
    assert sorted(path.suffix for path in (cache / "prepared").iterdir()) == ["", ".lock"]


@contextlib.contextmanager
def stopping_after(parts: int) -> Iterator[None]:
    """Interrupts preparing once there are so many parts."""
    with pytest.MonkeyPatch.context() as patch:
        add_part = Journal.add_part

        def add(journal: Journal, part: Part) -> None:
            add_part(journal, part)
            if len(journal.parts) == parts:
                raise KeyboardInterrupt

        patch.setattr(Journal, "add_part", add)
        with pytest.raises(KeyboardInterrupt):
            yield


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def damage_tokens(partial: Path) -> str:
    flip(partial / "train" / "0.tokens", 1000)
    return "1 finished part is damaged"


def damage_several(partial: Path) -> str:
    flip(partial / "validation" / "0.target.tokens", 10)
    path = partial / "train" / "0.offsets.npy"
    os.truncate(path, path.stat().st_size - 8)
    return "2 finished parts are damaged"


def damage_beginnings(partial: Path) -> str:
    flip(partial / "train" / "0.tokens", 0)
    flip(partial / "train" / "0.target.offsets.npy", 128)
    return "13 parts are done"


def remove_texts(partial: Path) -> str:
    (partial / "validation" / "0.documents.jsonl").unlink()
    return "finished parts are damaged"


def remove_held_out(partial: Path) -> str:
    (partial / "unfinished" / "0.held_out").unlink()
    return "finished parts are damaged"


def damage_tokenizer(partial: Path) -> str:
    flip(partial / "tokenizer" / "tokenizer.json", 100)
    return "the finished tokenizer is damaged; all parts are made again"


def cut_the_journal(partial: Path) -> str:
    path = partial / "unfinished" / "journal.jsonl"
    os.truncate(path, path.stat().st_size - 10)
    return ": 12 parts are done"


def damage_the_journal(partial: Path) -> str:
    flip(partial / "unfinished" / "journal.jsonl", 3)
    return "tokenising"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [  # the first source has 12
        (damage_tokens, 6), (damage_tokens, 12), (damage_several, 6), (damage_several, 13), (damage_beginnings, 13),
        (remove_texts, 13), (remove_held_out, 6), (damage_tokenizer, 6), (cut_the_journal, 13), (damage_the_journal, 6),
    ],
)  # fmt: skip
def test_damaged_parts_are_made_again(
    damage: Callable[[Path], str], parts: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_files("pairs", tmp_path)
    config = config_of("pairs", tmp_path)
    monkeypatch.setenv("MANYHEADS_CACHE", str(cache.with_name("whole")))
    expected = contents(prepare(config, progress=False).directory)
    monkeypatch.setenv("MANYHEADS_CACHE", str(cache))
    with stopping_after(parts):
        prepare(config, progress=False)
    said = damage(unfinished(cache))
    capsys.readouterr()
    assert contents(prepare(config).directory) == expected
    assert said in capsys.readouterr().err


def test_finished_files_are_not_read_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files("texts", tmp_path)
    config = config_of("texts", tmp_path)
    with stopping_after(14):
        prepare(config)
    said = capsys.readouterr().err
    assert "14 parts finished: as long as no source changes, the same command continues from there" in said
    journal = Journal.read(unfinished(cache) / "unfinished" / "journal.jsonl")
    assert journal is not None and journal.parts[-1].stage == 1 and journal.parts[-1].following.file == 3
    opened: list[str] = []
    read = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda self, path, name, *more: (opened.append(name), read(self, path, name, *more))[1]
    )
    prepared = prepare(config)
    # The first source is finished, the second in its last file.
    assert opened == ["3.jsonl", "0.jsonl", "0.jsonl"]
    assert [one.skipped for one in prepared.meta.train] == [8, 8]
    assert "14 parts are done, 0.0 MB" in (said := capsys.readouterr().err)
    assert "training a bpe tokenizer" not in said


def test_a_source_that_has_changed_unnoticed_is_made_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files("classes", tmp_path)
    config = config_of("classes", tmp_path)
    with stopping_after(1):
        prepare(config)
    path = tmp_path / "classes" / "0.jsonl"
    before = path.stat()
    path.write_text(path.read_text().replace("gamma", "delta", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = contents(prepare(config).directory)
    assert "it has changed since its first parts were made; all parts are made again" in capsys.readouterr().err
    monkeypatch.setenv("MANYHEADS_CACHE", str(cache.with_name("whole")))
    assert found == contents(prepare(config, progress=False).directory)


def test_what_a_corrected_file_makes_useless_is_removed(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files("classes", tmp_path)
    config = config_of("classes", tmp_path)
    path = tmp_path / "classes" / "3.jsonl"
    whole_text = path.read_text()
    path.write_text(whole_text + "\n{")
    with pytest.raises(UserError, match="malformed JSON"):
        prepare(config)
    assert "parts finished" in capsys.readouterr().err
    old = unfinished(cache)
    path.write_text(whole_text)
    prepare(config)
    assert not old.exists()


@pytest.mark.parametrize("days", [1, 8])
def test_other_unfinished_data_is_kept_for_a_week(days: int, corpus: Path, tmp_path: Path, cache: Path) -> None:
    write_files("classes", tmp_path)
    with stopping_after(3):
        prepare(config_of("classes", tmp_path), progress=False)
    partial = unfinished(cache)
    written = time.time() - days * 24 * 3600
    os.utime(partial / "unfinished" / "journal.jsonl", (written, written))
    source = FilesSource(path=str(corpus / "*.txt"))
    prepare(DataConfig(sources=(source,)), progress=False)
    assert partial.exists() == (days == 1)


def test_a_full_disk_keeps_the_finished_parts(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = whole("tags", tmp_path, cache, monkeypatch)
    command = [sys.executable, "-m", "tests.data.stopped_prepare", "tags", str(tmp_path), "0"]
    # Of files of 39 KiB and more; a shell sets it, as a forked process may not be one that runs JAX.
    limited = ["bash", "-c", 'ulimit -f 39; exec "$@"', "bash", *command]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "UserError: cannot write" in done.stderr
    assert "parts finished" in done.stderr and parts_of(unfinished(cache)) > 1
    assert contents(prepare(config_of("tags", tmp_path), progress=False).directory) == expected
