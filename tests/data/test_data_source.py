"""Sources: every kind and format gives the same documents each time, and every fault is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sqlite3
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.config import parse
from train.data.prepared.held_out import position_of
from train.data.sources.records import Document, Rejects
from train.data.sources.source import documents, identity, text_size
from train.data.sources.source_config import FilesSource, HubSource, SourceConfig, StdlibSource
from transformer.errors import UserError

ROWS = ["first", "second\nwith a line end", "drittes: Grüße"]


def files(path: Path | str, **settings) -> SourceConfig:
    return FilesSource(path=str(path), **settings)


def texts(config: SourceConfig) -> list[str]:
    return [document.text for document in documents(config)]


def jsonl(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": row, "other": 1}, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("compress", [None, gzip.compress, bz2.compress, lzma.compress, "zstd"])
def test_jsonl_compressed_or_not(tmp_path: Path, compress) -> None:
    suffix = {None: "", gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz", "zstd": ".zst"}[compress]
    path = tmp_path / f"rows.jsonl{suffix}"
    if compress == "zstd":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(jsonl(ROWS))
    else:
        path.write_bytes(compress(jsonl(ROWS)) if compress else jsonl(ROWS))
    assert texts(files(path)) == ROWS


def test_csv_with_quoted_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,other\nfirst,1\n"second\nwith a line end",2\ndrittes: Grüße,3\n', "utf-8-sig")
    assert texts(files(path)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ROWS, "other": [1, 2, 3]}), tmp_path / "rows.parquet")
    assert texts(files(tmp_path / "rows.parquet", text_field="body")) == ROWS


def test_sqlite_reads_rows_that_are_in_the_log_alone(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "texts.db")
    connection.execute("pragma journal_mode=wal")
    connection.execute("create table t (text)")
    connection.execute("insert into t values ('first')")
    connection.commit()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert "texts.db-wal" in before
    config = FilesSource(path=str(tmp_path / "texts.db"), query="select text from t")
    assert [document.text for document in documents(config)] == ["first"]
    one = identity(config)
    connection.execute("insert into t values ('second')")
    connection.commit()
    assert [document.text for document in documents(config)] == ["first", "second"] and identity(config) != one
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    connection.close()


@pytest.mark.parametrize("name", ["a.7z.gz", "a.safetensors", "a.pdf", "a.npz", "a.PDF", "a.rar"])
def test_what_is_not_text_by_its_name_is_refused(tmp_path: Path, name: str) -> None:
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"some text"))
    else:
        (tmp_path / name).write_text("some text")
    with pytest.raises(UserError, match=rf"{name}: \.\w+ files are not read as text: .*format: text"):
        list(documents(FilesSource(path=str(tmp_path / name))))
    assert [document.text for document in documents(FilesSource(path=str(tmp_path / name), format="text"))] == [
        "some text"
    ]


def test_what_is_not_text_by_its_beginning_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unknown.xyz").write_bytes(b"ELF\0\1\2")
    with pytest.raises(UserError, match=r"unknown\.xyz: not a text file \(it has zero bytes\)"):
        list(documents(FilesSource(path=str(tmp_path / "unknown.xyz"))))
    for name in ("README", "notes.tex", "a.b.c"):
        (tmp_path / name).write_text("plain")
        assert [document.text for document in documents(FilesSource(path=str(tmp_path / name)))] == ["plain"]


def test_sqlite_reads_one_column_of_a_query(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "rows.db")
    connection.execute("create table t (k integer, body text)")
    connection.executemany("insert into t values (?, ?)", list(enumerate(ROWS)))
    connection.commit()
    connection.close()
    assert texts(files(tmp_path / "rows.db", query="select body from t order by k")) == ROWS
    assert texts(files(tmp_path / "rows.db", query="select k, body as text from t order by k")) == ROWS
    with pytest.raises(UserError, match=r"rows\.db: query: no such table: missing"):
        texts(files(tmp_path / "rows.db", query="select body from missing"))
    with pytest.raises(UserError, match=r"no field 'text'"):
        texts(files(tmp_path / "rows.db", query="select k, body from t"))


def test_a_local_data_set_reads_as_the_hub_does(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(jsonl(ROWS))
    config = HubSource(path=str(tmp_path / "set"), streaming=True)
    assert texts(config) == ROWS
    with pytest.raises(UserError, match="cannot be read from the hub"):
        texts(HubSource(path=str(tmp_path / "set"), split="nothing", streaming=True))
    with pytest.raises(UserError, match=r"no field 'txt'.*Did you mean 'text'"):
        texts(HubSource(path=str(tmp_path / "set"), text_field="txt", streaming=True))


def test_text_files_by_glob_are_sorted_and_named_below_the_glob(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "b/empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else f"text of {name}\r\n", newline="")
    assert list(documents(files(tmp_path / "**/*.txt"))) == [
        Document("a/1.txt", "text of a/1.txt\r\n"),
        Document("b/2.txt", "text of b/2.txt\r\n"),
    ]


def test_a_separator_cuts_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("one\n<end>\ntwo\n<end>\n<end>\nthree")
    assert texts(files(tmp_path / "all.txt", separator="\n<end>\n")) == ["one", "two", "<end>\nthree"]
    assert [document.id for document in documents(files(tmp_path / "all.txt", separator="\n<end>\n", limit=2))] == [
        "all.txt#0",
        "all.txt#1",
    ]


def test_the_standard_library_without_its_tests() -> None:
    found = {document.id: document.text for document in documents(StdlibSource())}
    assert found["json/decoder.py"] == Path(sysconfig.get_path("stdlib"), "json/decoder.py").read_text("utf-8")
    assert not [name for name in found if "site-packages" in name or name.startswith("test/")]
    assert list(found) == sorted(found)
    assert text_size(StdlibSource()) == pytest.approx(sum(len(text.encode()) for text in found.values()), rel=0.01)


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        (
            "bad.txt",
            b"fine\nfine\nbad \xff\n",
            {},
            r"bad\.txt:3: not valid UTF-8 \(byte 0xff at column 5\); set encoding",
        ),
        ("bad.txt", b"a\n\n\nb\n\nbad \xff", {"separator": "\n\n"}, r"bad\.txt:6: not valid UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', {}, r"bad\.jsonl:3: malformed JSON"),
        ("bad.jsonl", b'{"text": "a"}\n["text"]\n', {}, r"bad\.jsonl:2: expected a JSON object, got list"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "a"}\n', {}, r"bad\.jsonl:2: no field 'text'.*Did you mean 'txt'"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": 1}\n', {}, r"bad\.jsonl:2: field 'text' holds int, not text"),
        (
            "bad.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            {},
            r"bad\.jsonl:2: field 'text' is not valid text \(byte 0xff at",
        ),
        (
            "bad.jsonl",
            b'{"text": "a"}\n{"text": "\\ud800"}\n',
            {},
            r"bad\.jsonl:2: field 'text' is not valid text \(half of",
        ),
        ("bad.csv", b"text,n\na,1\nb\n", {}, r"bad\.csv:3: malformed CSV \(1 field, not the header's 2: \['b'\]\)"),
        ("bad.csv", b"text,n\na,1\nb,2,3\n", {}, r"bad\.csv:3: malformed CSV"),
        (
            "bad.csv",
            b"text,n\na,1\n\xff,2\n",
            {},
            r"bad\.csv:3: field 'text' is not valid text \(byte 0xff at column 1\)",
        ),
    ],
)
def test_a_bad_document_stops_or_is_counted(
    tmp_path: Path, name: str, content: bytes, settings: dict, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        texts(files(tmp_path / name, **settings))
    assert "on_error: skip" in str(raised.value)
    assert "\n" not in str(raised.value)

    rejects = Rejects("skip")
    list(documents(files(tmp_path / name, on_error="skip", **settings), rejects))
    assert rejects.count == 1
    assert name in rejects.first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)[:-20], r"cut\.jsonl\.gz: damaged or cut short"),
        ("cut.txt.xz", b"nothing", r"cut\.txt\.xz: damaged or cut short"),
        ("cut.txt.bz2", b"nothing", r"cut\.txt\.bz2: cannot be read"),
        ("not.parquet", b"nothing", r"not\.parquet: not a readable Parquet file"),
        ("no.csv", b"a,b\n1,2\n", r"no\.csv:1: no field 'text' \(there is a, b\)"),
    ],
)
def test_a_bad_file_always_stops(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(files(tmp_path / name, on_error="skip"))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing/\*\.txt: no such file"):
        texts(files(tmp_path / "missing/*.txt"))
    with pytest.raises(UserError, match=r"a folder; name its files, such as .*/\*\*/\*\.txt"):
        texts(files(tmp_path))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "files"}, "path"),
        ({"kind": "hub"}, "path"),
        ({"kind": "stdlib", "path": "x"}, "path"),
        ({"kind": "files", "path": "x.db"}, "query"),
        ({"kind": "files", "path": "x.txt", "query": "select 1"}, "query"),
        ({"kind": "files", "path": "x.csv", "separator": "\n"}, "separator"),
        ({"kind": "files", "path": "x", "include_tests": True}, "include_tests"),
        ({"kind": "files", "path": "x", "streaming": True}, "streaming"),
        ({"kind": "hub", "path": "x", "format": "csv"}, "format"),
        ({"kind": "wheel", "path": "x", "package": "name", "sha256": "0" * 64}, "package"),
        ({"kind": "wheel", "path": "x", "package": "--index-url==1", "sha256": "0" * 64}, "package"),
        ({"kind": "wheel", "path": "x", "package": "name==1.0", "sha256": "12"}, "sha256"),
        ({"limit": 0}, "limit"),
        ({"weight": 0.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
    ],
)
def test_inconsistent_configs_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(UserError, match=rf"^test: data\.sources\.0\.{field}: "):
        parse({"name": "x", "data": {"sources": [settings]}}, "test")


def test_identity_follows_the_files_but_not_the_weight(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    before = identity(files(path))
    assert identity(files(path, weight=3.0)) == before
    assert identity(files(path, limit=3)) != before
    path.write_text("other text")
    assert identity(files(path)) != before


def test_position_ofs_are_even_and_known() -> None:
    positions = [position_of(f"document {number}") for number in range(2000)]
    assert all(0 <= position < 1 for position in positions)
    assert sum(position < 0.1 for position in positions) == pytest.approx(200, abs=50)
    assert position_of("json/decoder.py") == pytest.approx(0.1139399173, abs=1e-9)
