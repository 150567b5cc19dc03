"""Bad files of documents, in every format that the readers know, given to `manyheads prepare`."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.mutations.edits import damaged, edited, put, value
from tests.mutations.mutant import Mutant, Setting, of_command

_BERT = {
    "family": "bert",
    "vocab_size": 300,
    "max_length": 32,
    "num_layers": 1,
    "embed_dim": 16,
    "attention": {"num_heads": 2},
}
_GPT = {"vocab_size": 300, "max_length": 16, "num_layers": 1, "embed_dim": 16, "attention": {"num_heads": 2}}
_SPECIAL = {"kind": "bytes", "special_tokens": ["[MASK]", "[CLS]", "[SEP]"]}


def _config(model: Any, objective: Any, source: Any, packing: str = "documents") -> dict[str, Any]:
    data = {"sources": [source], "packing": packing, "tokenizer": _SPECIAL, "validation_fraction": 0.2}
    return {"name": "mutant", "batch_size": 4, "steps": 1, "model": model, "objective": objective, "data": data}


def _head(kind: str, **options: Any) -> dict[str, Any]:
    return _BERT | {"head": {"kind": kind, **options}}


_VASWANI = {
    "family": "vaswani", "vocab_size": 300, "max_length": 32, "num_layers": 1, "embed_dim": 16, "attention": {"num_heads": 2},
}  # fmt: skip
TASKS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "text": (_config(_GPT, {"kind": "causal"}, {}, "chunk"), lambda n: {"text": f"document {n} of some"}),
    "group": (
        _config(_GPT, {"kind": "causal"}, {"group_field": "part"}, "chunk"), lambda n: {"text": f"text {n}", "part": n % 5},
    ),
    "pairs": (
        _config(_VASWANI, {"kind": "seq2seq"}, {"target_field": "other"}),
        lambda n: {"text": f"one {n}", "other": f"two {n}"},
    ),
    "inner": (
        _config(_VASWANI, {"kind": "seq2seq"}, {"text_field": "pair.en", "target_field": "pair.fr"}),
        lambda n: {"pair": {"en": f"one {n}", "fr": f"two {n}"}},
    ),
    "class": (
        _config(_head("classification"), {"kind": "classification"}, {"label_field": "label"}),
        lambda n: {"text": f"text {n}", "label": ("bad", "good")[n % 2]},
    ),
    "number": (
        _config(_head("classification", num_labels=1), {"kind": "regression"}, {"label_field": "label", "label_kind": "number"}),
        lambda n: {"text": f"text {n}", "label": n / 10},
    ),
    "tags": (
        _config(
            _head("tokens"), {"kind": "token_classification"},
            {"text_field": "words", "label_field": "tags", "label_kind": "tags"},
        ),
        lambda n: {"words": ["a", f"b{n}"], "tags": ["O", "B-X"]},
    ),
    "answers": (
        _config(_head("answer"), {"kind": "answer"}, {"target_field": "context", "label_field": "answers",
            "label_kind": "answers"}),
        lambda n: {"text": "where", "context": f"here it is {n}", "answers": {"text": ["it"], "answer_start": [5]}},
    ),
    "choice": (
        _config(
            _head("choice"), {"kind": "choice", "num_choices": 2},
            {"choice_fields": ["one", "two"], "label_field": "label"},
        ),
        lambda n: {"text": f"text {n}", "one": "goes on", "two": "stops", "label": n % 2},
    ),
}  # fmt: skip
"""A config for each form of document, and a row of such documents."""


def data(random: Random, setting: Setting) -> Mutant:
    """A source with a bad file."""
    task = random.choice(list(TASKS))
    config, row = TASKS[task]
    config = json.loads(json.dumps(config))
    form = random.choice(_FORMS.get(task, _FORMS["text"]))
    count = random.choice((1, 3, 30, 30, 30, 30))
    config["data"]["validation_fraction"] = 0.2 if count == 30 else 0.0
    rows: list[Any] = [row(number) for number in range(count)]
    about = [task, form]
    if random.random() < 0.5:
        for _ in range(random.choice((1, 1, 5))):
            rows, what = edited(rows, random)
            about.append(what)
        rows = rows if isinstance(rows, list) else [rows]
    source = config["data"]["sources"][0]
    source |= {"kind": "files"}
    if random.random() < 0.3:
        source["on_error"] = "skip"
    path = setting.place / f"data{_SUFFIX.get(form, '.jsonl')}"
    _WRITERS.get(form, _write_jsonl)(path, rows, random)
    if form == "sqlite":
        source["query"] = random.choice(("select * from rows", random.choice(_QUERIES)))
    if form == "text" and random.random() < 0.5:
        source["separator"] = random.choice(("\n", "\n\n", "é", "\0"))
    if random.random() < 0.25:
        path = _compressed(path, random.choice((".gz", ".bz2", ".xz", ".zst")))
    how = random.random()
    if how < 0.5:
        content, what = damaged(path.read_bytes(), random)
        path.write_bytes(content)
        about.append(what)
    elif how < 0.65:
        path, what = _not_a_file(path, random)
        about.append(what)
    source["path"] = str(path)
    if form == "wheel":
        _as_wheel(source, path, setting.place, random)
    file = setting.place / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return of_command("; ".join(about), "prepare", file)


_FORMS = {
    "text": ("jsonl", "csv", "parquet", "sqlite", "text", "text", "wheel"), "tags": ("jsonl", "parquet", "conll", "conll"),
    "inner": ("jsonl", "parquet"), "answers": ("jsonl", "parquet"), "class": ("jsonl", "csv", "parquet", "sqlite", "wheel"),
}  # fmt: skip
"""The formats that hold such rows."""
_FORMS |= dict.fromkeys(("group", "pairs", "number", "choice"), _FORMS["class"])
_SUFFIX = {"text": ".txt", "csv": ".csv", "parquet": ".parquet", "sqlite": ".db", "conll": ".conll"}
_QUERIES = (
    "select * from rows", "select text from rows", "select", "", "select 1", "select 1 / 0", "select null", "select 'a', 'b'",
    "select text, text from rows", "drop table rows", "insert into rows values (1)", "create table x (y)", "attach 'x.db' as x",
    "select * from nothing", "pragma journal_mode=wal", "select x'ff00'", "select 1; select 2", "select zeroblob(100)", "vacuum",
    "select * from rows --", "\0", "select 1e400", "select text from rows order by random()", "pragma user_version=5",
    "vacuum into 'copy.db'", "select load_extension('x')",
    "with recursive n(x) as (select 1 union all select x + 1 from n) select x from n limit 100",
)  # fmt: skip


def _write_jsonl(path: Path, rows: list[Any], random: Random) -> None:
    lines = [json.dumps(row, ensure_ascii=random.random() < 0.5) for row in rows]
    if random.random() < 0.2:
        lines.insert(random.randrange(len(lines) + 1), random.choice(_LINES))
    end = random.choice(("\n", "\n", "\r\n", "\r"))
    path.write_bytes((end.join(lines) + end).encode("utf-8", "surrogatepass"))


_LINES = (
    "", " ", "null", "1", "[]", "{}", '"a"', "NaN", '{"text": NaN}', '{"text": 1e999}', '{"text": "a", "text": 3}',
    '{"text": "\\ud800"}',
    '{"text": "\\ud83d\\ude00"}', '{"text": "\\u0000"}', "{" * 5_000, "[" * 100_000, '{"text": ' + "9" * 6_000 + "}",
    '{"text": "' + "a" * 10**6 + '"}',
    "\ufeff{}", "{'text': 'a'}", '{"text": "a"} {"text": "b"}', '{"": ""}', '{"text": {"text": {"text": "a"}}}',
    '{"label": -9e99}',
)  # fmt: skip


def _write_csv(path: Path, rows: list[Any], random: Random) -> None:
    flat = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(str(name) for row in flat for name in row))
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=random.choice((",", ",", ",", "\t", ";")))
    writer.writerow(names + (names[:1] if random.random() < 0.1 else []))
    for row in flat:
        cells = [_cell(row.get(name)) for name in names]
        writer.writerow(cells[: random.choice((len(cells), len(cells), 0, 1))] if random.random() < 0.1 else cells)
    path.write_bytes(stream.getvalue().encode("utf-8", "surrogatepass"))


def _cell(one: Any) -> Any:
    return str(one).encode("utf-8", "replace").decode() if isinstance(one, str | dict | list) else one


def _write_parquet(path: Path, rows: list[Any], random: Random) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        if random.random() < 0.2:
            kind = random.choice(
                (
                    pa.binary(),
                    pa.large_string(),
                    pa.float64(),
                    pa.date32(),
                    pa.null(),
                    pa.bool_(),
                    pa.list_(pa.string()),
                )
            )
            table = table.append_column(random.choice(("text", "label", "other")), pa.nulls(len(table), kind))
        pq.write_table(table, path)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
        # Arrow has no such table.
        pq.write_table(pa.table({"text": pa.array([b"\xff", None])}), path)


def _write_sqlite(path: Path, rows: list[Any], random: Random) -> None:
    flat = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(str(name) for row in flat for name in row)) or ["text"]
    names = [name.encode("utf-8", "replace").decode().replace("\0", "") for name in names]
    connection = sqlite3.connect(path)
    quoted = [f'"{name.replace(chr(34), "")}"' for name in names]
    # SQLite's names have no case.
    lower = [one.lower() for one in quoted]
    quoted = [one if lower.index(one.lower()) == number else f'"{number}"' for number, one in enumerate(quoted)]
    connection.execute(f"create table rows ({', '.join(quoted)})")
    for row in flat:
        cells = [_stored(row.get(name)) for name in names]
        connection.execute(f"insert into rows values ({', '.join('?' * len(cells))})", cells)
    connection.commit()
    connection.close()


def _stored(one: Any) -> Any:
    if isinstance(one, int) and abs(one) >= 2**63:
        return float(one)
    return one if isinstance(one, int | float | None) else _cell(one)


def _write_text(path: Path, rows: list[Any], random: Random) -> None:
    texts = [str(row.get("text", "")) if isinstance(row, dict) else str(row) for row in rows]
    path.write_bytes("\n".join(texts).encode(random.choice(("utf-8", "utf-8", "utf-16", "latin-1")), "replace"))


def _write_conll(path: Path, rows: list[Any], random: Random) -> None:
    texts = []
    for row in rows:
        words, tags = (row.get(name) for name in ("words", "tags")) if isinstance(row, dict) else (row, row)
        pairs = zip(
            words if isinstance(words, list) else [words], tags if isinstance(tags, list) else [tags], strict=False
        )
        texts.append("".join(f"{word} {tag}\n" for word, tag in pairs))
    if random.random() < 0.3:
        texts.insert(
            random.randrange(len(texts) + 1),
            random.choice(("word\n", "-DOCSTART- -X- O\n", "a b c d e\n", "\t\n", "-DOCSTART-\n")),
        )
    path.write_bytes("\n".join(texts).encode("utf-8", "replace"))


_WRITERS = {
    "jsonl": _write_jsonl, "csv": _write_csv, "parquet": _write_parquet, "sqlite": _write_sqlite, "text": _write_text,
    "conll": _write_conll,
}  # fmt: skip


def _compressed(path: Path, suffix: str) -> Path:
    new, content = path.with_name(path.name + suffix), path.read_bytes()
    if suffix == ".zst":
        import pyarrow as pa

        with pa.output_stream(str(new), compression="zstd") as stream:
            stream.write(content)
        return new
    pack: Callable[[bytes], bytes] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    new.write_bytes(pack(content))
    return new


def _not_a_file(path: Path, random: Random) -> tuple[Path, str]:
    """A path that leads to no file, or to one of an unusual kind or name."""
    how = random.choice(("missing", "folder", "dangling", "loop", "pipe", "name", "pattern", "device", "glob of pipes"))
    if how == "name":
        suffix = random.choice(
            (
                ".tsv",
                ".json",
                ".zip",
                ".bin",
                ".JSONL",
                ".gz",
                ".jsonl.gz",
                ".parquet",
                ".txt",
                "",
                ".tar.xz",
                ".db",
                ".conll",
            )
        )
        return path.rename(path.with_name(f"data{suffix}")), f"named {suffix}"
    if how == "pattern":
        pattern = random.choice(
            ("*", "**", "[", "[!", "**/*", "data.*", "~", "~nosuchuser/x", "a" * 300, "\x1b[31m", "x\ny", "../*/*", ".")
        )
        return path.parent / pattern if not pattern.startswith("~") else Path(pattern), f"pattern {pattern[:20]!r}"
    if how == "device":
        return Path("/dev/zero"), "a device without an end"
    path.unlink()
    if how == "glob of pipes":
        put(path, "pipe")
        return path.parent / f"*{path.suffix}", how
    if how in ("folder", "dangling", "loop", "pipe"):
        put(path, how)
    return path, how


def _as_wheel(source: dict[str, Any], path: Path, place: Path, random: Random) -> None:
    """The file inside a wheel that is in the cache already, as pip would have put it there."""
    from train.files import cache_dir

    content = path.read_bytes() if os.path.isfile(path) else b"text"
    name = random.choice(
        (
            f"tiny/{path.name}",
            f"tiny/{path.name}",
            f"../../{path.name}",
            f"/{path.name}",
            f"a\\{path.name}",
            "tiny/a" * 90,
        )
    )
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        archive.writestr(name, content)
        if random.random() < 0.2:
            archive.writestr(f"{name}/inside", content)
    packed = stream.getvalue()
    if random.random() < 0.5:
        packed, _ = damaged(packed, random)
    digest = hashlib.sha256(packed).hexdigest()
    folder = cache_dir() / "wheels" / f"tiny=={digest[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny-1.0-py3-none-any.whl").write_bytes(packed)
    source |= {
        "kind": "wheel",
        "package": folder.name,
        "sha256": digest,
        "path": random.choice(("*", "tiny/*", f"*{path.suffix}")),
    }
    if random.random() < 0.1:
        source["sha256"] = value(random)
