"""Files that users bring: what is read does not depend on encoding, line ends, quotation marks or compression."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train.config import load
from train.data.prepared.prepare import prepare
from train.data.sources.new_documents import file_lines, new_documents
from train.data.sources.records import Document, Rejects
from train.data.sources.source import documents
from train.data.sources.source_config import FilesSource
from train.text_files import read_lines
from transformer.errors import ConfigError, UserError

MARKED = ("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
ENCODINGS = (*MARKED, "utf-8")
LINE_ENDS = ("\n", "\r\n", "\r")
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": None}
NO_LINE_ENDS = "a é漢😀\u2028\u2029\x85\x0b\x0c\x1c\x1e\xa0\ufeff"
"""Letters, and characters at which other readers end a line."""
MARKS = NO_LINE_ENDS + "\"',;|\t\n\r"

written = settings(max_examples=40, deadline=None)
ways = st.tuples(st.sampled_from(ENCODINGS), st.sampled_from(LINE_ENDS), st.sampled_from(list(COMPRESS)))
line = st.text(NO_LINE_ENDS, max_size=8)
value = st.text(MARKS, min_size=1, max_size=8)


def encoded(text: str, encoding: str) -> bytes:
    """With a byte order mark, unless the encoding is plain UTF-8."""
    marked = encoding in MARKED and not encoding.endswith("-sig") and encoding not in ("utf-16", "utf-32")
    return (("\ufeff" if marked else "") + text).encode(encoding)


def write(folder: str | Path, name: str, data: bytes, suffix: str = "") -> Path:
    path = Path(folder, name + suffix)
    if suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(COMPRESS[suffix](data))
    return path


def found_in(path: Path | str, **given) -> list[Document]:
    return list(documents(FilesSource(path=str(path), **given)))


def labelled(path: Path | str, **given) -> list[tuple[str, object]]:
    return [(one.text, one.label) for one in found_in(path, label_field="label", **given)]


@written
@given(lines=st.lists(line, min_size=1, max_size=6), way=ways, ends=st.booleans())
def test_lines_in_lines_out(lines: list[str], way: tuple[str, str, str], ends: bool) -> None:
    """A line ends at its end and nowhere else, and a blank one is a line."""
    encoding, line_end, suffix = way
    assume(not lines[0].startswith("\ufeff") and (ends or lines[-1]))
    with tempfile.TemporaryDirectory() as folder:
        text = line_end.join(lines) + line_end * ends
        path = write(folder, "lines.txt", encoded(text, encoding), suffix)
        assert list(read_lines(path)) == file_lines(str(path)) == lines
        if any(one.strip() for one in lines):
            asked = list(new_documents(FilesSource(path="x.jsonl"), str(path)))
            assert [(one.id, one.text) for one in asked] == [
                (f"{path.name}:{number}", one) for number, one in enumerate(lines, start=1)
            ]


@written
@given(texts=st.lists(line, min_size=1, max_size=5), way=ways)
def test_a_separator_of_blank_lines(texts: list[str], way: tuple[str, str, str]) -> None:
    encoding, line_end, suffix = way
    assume(not texts[0].startswith("\ufeff"))
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, "all.txt", encoded((2 * line_end).join(texts), encoding), suffix)
        assert [one.text for one in found_in(path, separator="\n\n")] == [text for text in texts if text]


@written
@given(text=st.text(MARKS, min_size=1), way=ways)
def test_a_whole_text_keeps_its_line_ends(text: str, way: tuple[str, str, str]) -> None:
    encoding, _, suffix = way
    assume(not text.startswith("\ufeff"))
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, "one.txt", encoded(text, encoding), suffix)
        assert [one.text for one in found_in(path)] == [text]


@written
@given(
    rows=st.lists(st.tuples(value, st.sampled_from(["good", "bad", "so so"])), min_size=1, max_size=5),
    way=ways, delimiter=st.sampled_from(",;\t|"), always=st.booleans(), blank=st.booleans(),
)  # fmt: skip
def test_delimiters(
    rows: list[tuple[str, str]], way: tuple[str, str, str], delimiter: str, always: bool, blank: bool
) -> None:
    """Tables with any of the usual delimiters, found by the header, and with delimiters and line ends in quotation marks."""
    encoding, line_end, suffix = way

    def field(text: str) -> str:
        quoted = always or any(mark in text for mark in f'{delimiter}"\r\n') or text.startswith("\ufeff")
        return '"' + text.replace('"', '""') + '"' if quoted else text

    lines = [delimiter.join(map(field, row)) for row in [("label", "text", "other"), *((b, a, "1") for a, b in rows)]]
    with tempfile.TemporaryDirectory() as folder:
        data = encoded((line_end * (1 + blank)).join(lines) + line_end, encoding)
        for name in ("rows.csv", *(("rows.tsv",) if delimiter == "\t" else ())):
            path = write(folder, name, data, suffix)
            # Between tabs, rows over several lines may also be read as rows with quotation marks in their text.
            both = delimiter == "\t" and any(mark in text for row in rows for text in row for mark in "\r\n")
            told: dict[str, Any] = {"quotes": True} if both else {}
            assert labelled(path, **told) == labelled(path, delimiter=delimiter, **told) == rows


@pytest.mark.parametrize(
    "text",
    [
        'text\tlabel\n"a b\t1\nc d\t0\ne f"\t1\n',
        'label\ttext\n0\t"He said\n1\tand left"\n1\tfine\n',
    ],
)
def test_quotation_marks_of_a_text_do_not_join_its_lines(text: str, tmp_path: Path) -> None:
    """Between tabs, where the table can be read both with and without fields in quotation marks."""
    path = write(str(tmp_path), "rows.tsv", text.encode(), "")
    header, *lines = (line.split("\t") for line in text.splitlines())
    at, of_class = header.index("text"), header.index("label")
    assert labelled(path) == [(line[at], line[of_class]) for line in lines]


@written
@given(rows=st.lists(value, min_size=1, max_size=5), way=ways, ascii=st.booleans(), blank=st.booleans())
def test_json_lines(rows: list[str], way: tuple[str, str, str], ascii: bool, blank: bool) -> None:
    encoding, line_end, suffix = way
    lines = [json.dumps({"a": {"b": row}, "label": 1.0}, ensure_ascii=ascii) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, "rows.jsonl", encoded((line_end * (1 + blank)).join(lines), encoding), suffix)
        assert labelled(path, text_field="a.b") == [(row, "1") for row in rows]


@written
@given(
    texts=st.lists(
        st.lists(st.tuples(st.text("aé漢#\xa0\u2028", min_size=1, max_size=4), st.sampled_from("OB")), min_size=1), min_size=1
    ),
    way=ways,
)  # fmt: skip
def test_conll(texts: list[list[tuple[str, str]]], way: tuple[str, str, str]) -> None:
    encoding, line_end, suffix = way
    with tempfile.TemporaryDirectory() as folder:
        lines = [line_end.join(f"{word} x\t{tag}" for word, tag in text) + 2 * line_end for text in texts]
        path = write(folder, "words.conll", encoded("".join(lines), encoding), suffix)
        found = found_in(path, text_field="words", label_field="tags", label_kind="tags")
        assert [list(zip(one.words, one.label, strict=True)) for one in found] == texts


@written
@given(
    before=st.lists(line, max_size=4), start=st.text("aé漢", max_size=4), line_end=st.sampled_from(LINE_ENDS),
    after=st.text("aé漢", max_size=4),
)  # fmt: skip
def test_bytes_that_are_not_valid(before: list[str], start: str, line_end: str, after: str) -> None:
    """The message names file, line, column and bytes."""
    assume(not (before and before[0].startswith("\ufeff")))
    bad = (
        "".join(f"{one}{line_end}" for one in [*before, start]).removesuffix(line_end).encode()
        + b"\xff"
        + after.encode()
    )
    place = rf"{len(before) + 1}: not valid UTF-8 \(byte 0xff at column {len(start) + 1}\); set encoding"
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, "bad.txt", bad + line_end.encode())
        for read in (file_lines, found_in, lambda path: found_in(path, separator="\n")):
            with pytest.raises(UserError, match=rf"bad\.txt:{place}") as raised:
                read(str(path))
            assert "\n" not in str(raised.value)


def test_bom(tmp_path: Path) -> None:
    """A byte order mark is no part of a text, a header, a word, a row, or a config."""
    for encoding in MARKED:
        quoted = write(tmp_path, "q.csv", encoded('"text","label"\n"a, b","good"\n', encoding))
        assert labelled(quoted) == [("a, b", "good")]
        words = write(tmp_path, "w.conll", encoded("Anna B-PER\nsings O\n", encoding))
        assert found_in(words, text_field="words", label_field="tags", label_kind="tags")[0].words == ("Anna", "sings")
        config = write(tmp_path, "c.yaml", encoded("name: grüße\r\nsteps: 3\r\n", encoding))
        assert load(config).name == "grüße"
        prompts = write(tmp_path, "p.txt", encoded("hello there\n", encoding))
        assert file_lines(str(prompts)) == ["hello there"]


def test_an_encoding_without_a_mark(tmp_path: Path) -> None:
    for encoding in ("cp1252", "utf-16-le", "latin-1", "utf-16"):
        data = "text;label\rGrüße;good\r".encode(encoding.replace("utf-16", "utf-16-le").replace("-le-le", "-le"))
        path = write(tmp_path, "rows.csv", data)
        assert labelled(path, encoding=encoding) == [("Grüße", "good")]
        text = write(tmp_path, "rows.txt", data)
        assert found_in(text, encoding=encoding)[0].text == "text;label\rGrüße;good\r"
        assert file_lines(str(text), encoding) == ["text;label", "Grüße;good"]
    # A mark decides: it is that of another file of the same source.
    marked = write(tmp_path, "marked.txt", encoded("Grüße", "utf-8-sig"))
    assert found_in(marked, encoding="cp1252")[0].text == "Grüße"
    with pytest.raises(UserError, match=r"zero bytes.*encoding if it is UTF-16"):
        found_in(write(tmp_path, "no.txt", "Grüße".encode("utf-16-le")))
    cut = write(tmp_path, "cut.txt", encoded("ab", "utf-16")[:-1])
    with pytest.raises(UserError, match=r"cut\.txt:1: not valid UTF-16-LE \(byte 0x62 at column 2\)"):
        found_in(cut)
    for name in ("hex", "nothing", "utf-8\0", "idna", ""):
        with pytest.raises(ConfigError, match=r"allowed: a text encoding"):
            FilesSource(path="a.txt", encoding=name)
        with pytest.raises(UserError, match=r"encoding: got .*allowed: the name of a text encoding"):
            file_lines(str(cut), name)


def test_line_ends(tmp_path: Path) -> None:
    """Carriage returns alone, as old spreadsheets write them."""
    assert labelled(write(tmp_path, "cr.csv", b"text,label\rwe liked it,1\ra fine day,0\r")) == [
        ("we liked it", "1"), ("a fine day", "0"),
    ]  # fmt: skip


def test_a_table_without_a_header(tmp_path: Path) -> None:
    """CoLA has its source, the label, the author's mark, and the sentence."""
    for name, between in (("cola.tsv", "\t"), ("cola.csv", ";")):
        rows = (("gj04", "1", "", "They drank the pub dry."), ("gj04", "0", "*", "They drank the pub."))
        path = write(tmp_path, name, "".join(between.join(row) + "\n" for row in rows).encode())
        assert labelled(path, columns=("source", "label", "mark", "text")) == [(row[3], row[1]) for row in rows]
        with pytest.raises(
            UserError, match="cola.*:1: .*; if this is a row, and the file has no header, name its columns"
        ):
            labelled(path)
        with pytest.raises(
            UserError, match=r":1: malformed CSV \(.* not the 2 of the setting columns .the delimiter is"
        ):
            labelled(path, columns=("label", "text"))
    # A comma in each text is no delimiter where tabs fit too.
    both = write(tmp_path, "both.csv", b"1\tHello, world\n0\tWell, then\n")
    with pytest.raises(UserError, match=r"2 columns with each of the delimiters ',' '\\t'; set delimiter to one"):
        labelled(both, columns=("label", "text"))
    some = write(tmp_path, "some.csv", b"1\tHello, world\n0\tWell\n1\tno\n")
    assert labelled(some, columns=("label", "text")) == [("Hello, world", "1"), ("Well", "0"), ("no", "1")]
    with pytest.raises(ConfigError, match="columns: got .*; allowed: each name once"):
        FilesSource(path="a.csv", columns=("a", "a"))
    with pytest.raises(ConfigError, match="columns: got .*; only csv files have them"):
        FilesSource(path="a.jsonl", columns=("a", "b"))


def test_quotation_marks_between_tabs(tmp_path: Path) -> None:
    """GLUE's files have them as part of the text; other tables are quoted."""
    glue = write(tmp_path, "glue.tsv", b'text\tlabel\n" I think so , " he said .\t1\n"no\t0\na "b" c\t1\n')
    literal = [('" I think so , " he said .', "1"), ('"no', "0"), ('a "b" c', "1")]
    assert labelled(glue) == labelled(glue, quotes=False) == literal
    with pytest.raises(UserError, match=r"glue\.tsv:2: malformed CSV .*set quotes: false if quotation marks are part"):
        labelled(glue, quotes=True)
    quoted = write(tmp_path, "quoted.tsv", b'text\tlabel\n"a\tb\n""c"""\tgood\n')
    assert labelled(quoted) == [('a\tb\n"c"', "good")]


def test_odd_tables(tmp_path: Path) -> None:
    assert labelled(write(tmp_path, "a.csv", b"text^label\na,b^good\n"), delimiter="^") == [("a,b", "good")]
    assert [one.text for one in found_in(write(tmp_path, "one.tsv", b"text\na, b\nc;d\n"))] == ["a, b", "c;d"]
    long = "x" * 200_000
    assert labelled(write(tmp_path, "long.csv", f"text,label\n{long},good\n".encode())) == [(long, "good")]
    for content, message in {
        b"text,label\na,good\nb\n": r"t\.csv:3: malformed CSV \(1 field, not the header's 2: \['b'\]\)",
        b'text,label\n"a\nb",good\nc,d,e\n': r"t\.csv:4: malformed CSV \(3 fields, not the header's 2",
        b'text,label\na,good\n"b,bad\nc,good\n': r"t\.csv:3: malformed CSV \(unexpected end of data\)",
        b'text,label\n"a"b,good\n': r"t\.csv:2: malformed CSV \(',' expected after '\"'\)",
        b"text,text,label\na,b,good\n": r"t\.csv:1: two columns have the name 'text'",
        b"text;label \na;good\n": r"t\.csv:1: no field 'label' \(there is text, 'label '\); set label_field",
        b"text,label\n\xfc,good\n": r"t\.csv:2: field 'text' is not valid text \(byte 0xfc at column 1\); set encoding",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            labelled(write(tmp_path, "t.csv", content))
        assert "\n" not in str(raised.value)
    # What follows a quotation mark that nothing closes is not lost.
    open_quote = write(tmp_path, "t.csv", b'text,label\na,good\n"b,bad\n\nc,good\n"d\ne",bad\n"f,bad\ng,good')
    rejects = Rejects("skip")
    source = FilesSource(path=str(open_quote), label_field="label", on_error="skip")
    assert [(one.id, one.text) for one in documents(source, rejects)] == [
        ("t.csv:2", "a"), ("t.csv:5", "c"), ("t.csv:6", "d\ne"), ("t.csv:9", "g"),
    ]  # fmt: skip
    assert rejects.count == 2 and "t.csv:3: malformed CSV" in rejects.first
    with pytest.raises(ConfigError, match="delimiter: got ';'; only csv files have it"):
        FilesSource(path="a.jsonl", delimiter=";")
    with pytest.raises(ConfigError, match="quotes: got False; only csv files have it"):
        FilesSource(path="a.txt", quotes=False)
    with pytest.raises(ConfigError, match="delimiter: .*allowed: one character"):
        FilesSource(path="a.csv", delimiter="::")


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([1.0, 0.0], "10"),
        ([1, -3], ("1", "-3")),
        ([True, False], ("true", "false")),
        (["good", "2.5"], ("good", "2.5")),
    ],
)
def test_labels_as_numbers(tmp_path: Path, values: list, classes) -> None:
    """A class has one name, whatever the format writes for it."""
    rows = [{"text": "a", "label": values[0]}, {"text": "b", "label": values[1]}]
    table = write(
        tmp_path, "rows.csv", "".join(["text,label\n", *(f"{r['text']},{r['label']}\n" for r in rows)]).encode()
    )
    lines = write(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = list(zip("ab", classes, strict=True))
    assert labelled(table) == labelled(lines) == labelled(tmp_path / "rows.parquet") == expected
    assert labelled(lines, labels=(str(values[0]),)) == expected[:1]


def test_labels_that_are_none(tmp_path: Path) -> None:
    for label, message in {
        "0.5": r"rows\.jsonl:1: field 'label' holds 0\.5, not a class; for numbers set label_kind: number",
        "NaN": r"rows\.jsonl:1: field 'label' is empty, and the document has no class",
        "[1]": r"rows\.jsonl:1: field 'label' holds list, not text: \[1\]",
        '" good"': r"rows\.jsonl:1: field 'label' holds ' good', with white space around it; set trim_labels: true to read "
        r"it as 'good'",
    }.items():
        path = write(tmp_path, "rows.jsonl", f'{{"text": "a", "label": {label}}}\n'.encode())
        with pytest.raises(UserError, match=message):
            labelled(path)
    assert labelled(path, trim_labels=True) == [("a", "good")]
    path = write(tmp_path, "rows.jsonl", b'{"text": "a", "label": ' + b"9" * 5000 + b"}\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: malformed JSON \(Exceeds the limit"):
        labelled(path)


def test_folders_are_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pos", "neg", "neg/deep"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(f"{name} one\n\n{name} two")
    (tmp_path / "pos" / "2.txt.gz").write_bytes(gzip.compress(b"pos three"))
    given = {"label_field": "folder", "separator": "\n\n"}
    found = found_in(tmp_path / "*/*", **given)
    assert [(one.id, one.text, one.label) for one in found] == [
        ("neg/1.txt#0", "neg one", "neg"), ("neg/1.txt#1", "neg two", "neg"), ("pos/1.txt#0", "pos one", "pos"),
        ("pos/1.txt#1", "pos two", "pos"), ("pos/2.txt.gz#0", "pos three", "pos"),
    ]  # fmt: skip
    assert {one.label for one in found_in(tmp_path / "*/*", labels=("pos",), **given)} == {"pos"}
    assert {one.label for one in found_in(tmp_path / "neg/**/*.txt", **given)} == {"neg", "deep"}
    monkeypatch.chdir(tmp_path / "pos")
    assert found_in("1.txt", label_field="folder", group_field="folder")[0].group == "pos"
    with pytest.raises(ConfigError, match="label_field: got 'label'; only records have it .*or 'folder'"):
        FilesSource(path="a.txt", label_field="label")
    with pytest.raises(ConfigError, match="target_field: got 'folder'; only records have it"):
        FilesSource(path="a.txt", target_field="folder")


UNIVERSAL = """\
# sent_id = 1
# text = vámonos al mar
1-2	vámonos	_	_	_	_	_	_	_	_
1	vamos	ir	VERB	V	_	0	root	_	_
2	nos	nosotros	PRON	P	_	1	obj	_	_
2.1	hoy	hoy	ADV	_	_	_	_	_	_
3	#	#	SYM	_	_	1	obl	_	SpaceAfter=No

# a comment in the next text, which has a form with a space
1	10 000	_	NUM	_	_	0	root	_	_
"""


def test_conll_u(tmp_path: Path) -> None:
    """Comments, ranges of words and empty nodes are not words."""
    given = {"text_field": "words", "label_kind": "tags"}
    for name in ("a.conllu", "a.conll"):
        path = write(tmp_path, name, encoded(UNIVERSAL, "utf-8-sig"))
        found = found_in(path, label_field="tags", **given)
        assert [(one.id, one.words, one.label) for one in found] == [
            (f"{name}:3", ("vamos", "nos", "#"), ("VERB", "PRON", "SYM")),
            (f"{name}:10", ("10 000",), ("NUM",)),
        ]  # fmt: skip
    assert found_in(path, label_field="deprel", **given)[0].label == ("root", "obj", "obl")
    path.write_text(UNIVERSAL.replace("2\tnos\t", "2 nos\t"))
    with pytest.raises(UserError, match=r"a\.conll:5: not the ten columns of CoNLL-U: '2 nos"):
        found_in(path, label_field="tags", **given)
    path.write_text("# id = 7 domain=en\n# newdoc\n#tag O\n# O\nb\xa0c B\n")
    assert found_in(path, label_field="tags", **given)[0].words == ("#tag", "#", "b\xa0c")


def test_classes_that_one_split_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train.data.prepared.config import DataConfig

    def source(name: str, *classes: str) -> FilesSource:
        rows = "".join(f"text {number},{one}\n" for number, one in enumerate(classes))
        return FilesSource(path=str(write(tmp_path, name, f"text,label\n{rows}".encode())), label_field="label")

    prepare(DataConfig(sources=(source("a.csv", *"abcd"),), validation=(source("b.csv", "a", "c"),)))
    assert "no held-out document is of 2 of 4 classes: b, d" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"held-out documents are of class 'x' and 1 more, training documents only of a, b; "
    ):
        prepare(DataConfig(sources=(source("c.csv", "a", "b"),), validation=(source("d.csv", "x", "y", "a"),)))


def test_damaged_and_unknown_compression(tmp_path: Path) -> None:
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        whole = write(tmp_path, "a.txt", b"some text\n" * 100, suffix)
        whole.write_bytes(whole.read_bytes()[:-9] if suffix != ".zst" else b"nothing")
        for read in (file_lines, found_in):
            with pytest.raises(UserError, match=rf"a\.txt\{suffix}: (damaged or cut short|cannot be read) ") as raised:
                read(str(whole))
            assert "\n" not in str(raised.value)
    for name in ("a.txt.lz4", "a.rar", "a.7z.gz"):
        path = write(tmp_path, name, b"")
        with pytest.raises(UserError, match=r"files are not read as text: (decompress|unpack) it"):
            found_in(path)
