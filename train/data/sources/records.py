"""From a record, a row of a table or a JSON object, to a document: its texts, what it belongs to, and its label."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from train.text_files import invalid_bytes
from transformer.errors import UserError, nearest, shown

_LARGEST = 3.4e38
"""The largest absolute value of a label that is stored in 32 bits."""
_FIELDS = 40
"""The most fields that a message lists."""

_INTEGER = re.compile(r"[-+]?[0-9]{1,18}\.0+")
"""An integer that was written as a float."""
_TRUTH = re.compile("true|True|TRUE|false|False|FALSE")

GivenLabels = Literal["class", "classes", "number", "tags", "answers"]
"""The labels that a record has in a field."""
LabelKind = Literal[GivenLabels, "turns", "preferences"]
"""What is stored of a document in addition to its tokens: its label, or which tokens of a dialogue the assistant writes, in one
answer or in two of which one is preferred."""
MARKED: tuple[LabelKind, ...] = ("turns", "preferences")
"""Those that are a mark at each token."""
Message = Mapping[str, Any]
"""A turn of a dialogue: `role`, `content`, and whatever else a chat template reads."""

Tool = Mapping[str, Any]
"""A function that the assistant may call, as a JSON schema."""


class Answers(NamedTuple):
    """The annotators' answers to a question, as they occur in its context; empty if there is none."""

    texts: tuple[str, ...]
    starts: tuple[int, ...]
    """The index in the context of each answer's first character."""


Label = str | float | tuple[str, ...] | Answers
"""A class, a number, several classes or a tag for each word, or answers."""


class Document(NamedTuple):
    """One text of a corpus, or several that belong together. Its id is stable from run to run."""

    id: str
    text: str
    target: str | None = None
    """The target side of a pair."""
    group: str = ""
    """What this document belongs to, such as a chapter; empty: nothing but itself."""
    label: Label | None = None
    """The document's label, which a task predicts."""
    words: tuple[str, ...] | None = None
    """The text's words, if each has a tag."""
    choices: tuple[str, ...] = ()
    """The choices, one of which continues the text."""
    messages: tuple[Message, ...] = ()
    """The turns of a dialogue, whose contents are the text."""
    answers: tuple[tuple[Message, ...], ...] = ()
    """Two ways in which the dialogue goes on, of which the first is preferred."""
    tools: tuple[Tool, ...] = ()
    """The functions that the assistant of the dialogue may call."""

    @property
    def sides(self) -> tuple[str, ...]:
        """The text, and the target of a pair or all choices."""
        return (self.text, *self.choices) if self.target is None else (self.text, self.target)

    @property
    def split_by(self) -> str:
        """The key of the validation split: documents of one group are held out together."""
        return self.group or self.id

    def to_json(self) -> str:
        """One line, which `from_json` reads back to an equal document."""
        given = {name: value for name, value in self._asdict().items() if value != self._field_defaults.get(name, ...)}
        return json.dumps(given, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Document:
        """What `to_json` wrote. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        given = json.loads(line)
        label = given.get("label")
        if isinstance(label, list):
            # Two lists are answers, a list of texts is classes or tags.
            nested = bool(label) and isinstance(label[0], list)
            given["label"] = Answers(*map(tuple, label)) if nested else tuple(label)
        for name in given.keys() & {"words", "choices", "messages", "tools"}:
            given[name] = tuple(given[name])
        if "answers" in given:
            given["answers"] = tuple(map(tuple, given["answers"]))
        return cls(**given)


class Fields(NamedTuple):
    """The fields of a record that make up a document; a dotted path such as `translation.fr` reaches inside."""

    text: str
    target: str = ""
    group: str = ""
    label: str = ""
    choices: tuple[str, ...] = ()

    def by_setting(self) -> list[tuple[str, str]]:
        """The required fields, each with the setting that names it."""
        named = [
            ("text_field", self.text),
            ("target_field", self.target),
            ("group_field", self.group),
            ("label_field", self.label),
            *(("choice_fields", field) for field in self.choices),
        ]
        return [(setting, field) for setting, field in named if field]

    def columns(self, known: list[str]) -> list[str]:
        """The columns among `known` to read, each once. Raises `KeyError` with a reason for one that is missing."""
        found = []
        for setting, field in self.by_setting():
            root = field if field in known else field.partition(".")[0]
            if root not in known:
                raise KeyError(missing_field(setting, field, known))
            found.append(root)
        return list(dict.fromkeys(found))


@dataclass
class Rejects:
    """What happens to a document that cannot be read: the first one raises an error, or all are counted."""

    on_error: Literal["stop", "skip"] = "stop"
    count: int = 0
    first: str = ""
    advice: str = ", or set on_error: skip"

    def add(self, place: str, reason: str) -> None:
        """Count the document at `place` (`FILE:LINE`), or raise a `UserError` that gives the reason."""
        if self.on_error == "stop":
            raise UserError(f"{place}: {reason}; fix it{self.advice}")
        self.skip(place, reason)

    def skip(self, place: str, reason: str) -> None:
        """Count the document at `place` without stopping."""
        self.count += 1
        self.first = self.first or f"{place}: {reason}"


class Faulty(Exception):
    """The reason why a record is not a document."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """How to turn records into documents."""

    fields: Fields
    rejects: Rejects
    labels: tuple[str, ...] = ()
    """Documents of other classes are skipped; empty: none are."""
    label_kind: GivenLabels = "class"
    """What `fields.label` holds. With `tags` the text is a list of words."""
    label_separator: str = ";"
    """What is between the classes of a document in a field of text."""
    trim_labels: bool = False
    """Whether white space around a class or a tag is removed; else it is an error."""
    needs_text: bool = False
    """Whether a record with an empty text is an error; else it is skipped."""

    def columns(self, known: list[str], place: str) -> list[str]:
        """The columns of a table to read. Raises `UserError` for one that the table lacks."""
        try:
            return self.fields.columns(known)
        except KeyError as error:
            raise UserError(f"{place}: {error.args[0]}") from None

    def of_arrow(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row of an Arrow table as a record."""
        return row

    def document(self, row: Mapping[str, Any], id: str, place: str) -> Document | None:
        """The document that a record holds; None for one to skip, and for an error, which goes to `rejects`."""
        try:
            return self._document(row, id)
        except Faulty as fault:
            self.rejects.add(place, str(fault))
            return None

    def _document(self, row: Mapping[str, Any], id: str) -> Document | None:
        values: dict[str, list[Any]] = {}
        for setting, field in self.fields.by_setting():
            try:
                values.setdefault(setting, []).append(value_at(row, field))
            except KeyError:
                raise Faulty(missing_field(setting, field, list(row))) from None
        label: Label | None = None
        if self.fields.label and self.label_kind == "class":
            # Before the text: errors in a document that is skipped do not matter.
            label = self._class(values["label_field"][0])
            if self.labels and label not in self.labels:
                return None
        words = self._words(values["text_field"][0]) if self.label_kind == "tags" else None
        text = valid_text(values["text_field"][0], self.fields.text) if words is None else " ".join(words)
        if self.needs_text and not text.strip():
            raise Faulty(f"field {self.fields.text!r} is empty")
        target = valid_text(values["target_field"][0], self.fields.target) if self.fields.target else None
        if target is not None and not self.fields.choices:
            for field, side in ((self.fields.text, text), (self.fields.target, target)):
                if not side.strip():
                    raise Faulty(f"field {field!r} is empty, and so is one side of the pair")
        group = values.get("group_field", [""])[0]
        if group is None:
            raise Faulty(f"field {self.fields.group!r} is empty")
        choices: tuple[str, ...] = ()
        if self.fields.choices:
            choices, target = self._choices(values["choice_fields"], target), None
        if self.fields.label and self.label_kind != "class":
            label = self._label(values["label_field"][0], words, target)
        group = str(group).encode("utf-8", "replace").decode()
        return Document(id, text, target, group, label, words, choices) if text else None

    def _class(self, value: Any) -> str:
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            raise Faulty(f"field {self.fields.label!r} is empty, and the document has no class")
        return self._class_name(value)

    def _class_name(self, value: Any) -> str:
        """The name of a class, or a tag."""
        field = self.fields.label
        if isinstance(value, float) and not value.is_integer():
            raise Faulty(f"field {field!r} holds {shown(value)}, not a class; for numbers set label_kind: number")
        name = class_name(value) if isinstance(value, int | float) else valid_text(value, field)
        trimmed = name.strip() or name
        if trimmed != name and not self.trim_labels:
            raise Faulty(
                f"field {field!r} holds {shown(name)}, with white space around it; set trim_labels: true to read it as "
                f"{shown(trimmed)}"
            )
        return class_name(trimmed)

    def _label(self, value: Any, words: Sequence[str] | None, target: str | None) -> Label:
        if self.label_kind == "number":
            return self._number(value)
        if self.label_kind == "classes":
            return self._classes(value)
        if self.label_kind == "answers":
            return self._answers(value, target or "")
        assert words is not None
        return self._tags(value, words)

    def _classes(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            value = value.split(self.label_separator) if value.strip() else []
        if not isinstance(value, list | tuple):
            raise Faulty(
                f"field {self.fields.label!r} holds {kind_of(value)}, not a list of classes; [] is a document without any"
            )
        return tuple(dict.fromkeys(map(self._class, value)))

    def _number(self, value: Any) -> float:
        try:
            number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= _LARGEST:
            raise Faulty(f"field {self.fields.label!r} holds {shown(value)}, not a number")
        return number

    def _words(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise Faulty(f"field {self.fields.text!r} holds {kind_of(value)}, not a list of words")
        return tuple(valid_text(word, self.fields.text) for word in value)

    def _tags(self, value: Any, words: Sequence[str]) -> tuple[str, ...]:
        field = self.fields.label
        if not isinstance(value, list | tuple) or len(value) != len(words):
            given = f"{len(value)} tags" if isinstance(value, list | tuple) else kind_of(value)
            raise Faulty(f"field {field!r} holds {given}, not a tag for each of {len(words)} words")
        return tuple(self._class_name(tag) for tag in value)

    def _answers(self, value: Any, context: str) -> Answers:
        """SQuAD's answers: one list for each field, or a list of answers."""
        field = self.fields.label
        if isinstance(value, list):
            value = {name: [_item(answer, name, field) for answer in value] for name in ("text", "answer_start")}
        texts, starts = (_item(value, name, field) for name in ("text", "answer_start"))
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            raise Faulty(f"field {field!r} does not hold lists text and answer_start of the same length")
        for text, start in zip(texts, starts, strict=True):
            valid_text(text, field)
            if not (text and isinstance(start, int) and start >= 0 and context.startswith(text, start)):
                raise Faulty(f"field {field!r}: {shown(text)} is not at character {shown(start)} of the context")
        return Answers(tuple(texts), tuple(starts))

    def _choices(self, values: list[Any], beginning: str | None) -> tuple[str, ...]:
        if len(values) == 1 and isinstance(values[0], list | tuple):
            values = list(values[0])
        texts = [valid_text(value, ", ".join(self.fields.choices)) for value in values]
        return tuple(texts if beginning is None else [f"{beginning} {text}" for text in texts])


def class_name(value: str | float) -> str:
    """The name of a class, the same in every format: CSV has no types, and writes 1.0, True or true for what others know as 1.0
    and true. A number that is an integer has the integer's name; true and false have these names."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if _TRUTH.fullmatch(value):
            return value.lower()
        return str(int(value.partition(".")[0])) if _INTEGER.fullmatch(value) else value
    return str(int(value))


def value_at(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field of a record, which a dotted path finds inside others. Raises `KeyError` if it is missing."""
    if field in row:
        return row[field]
    root, _, rest = field.partition(".")
    inner = row.get(root)
    if not rest or not isinstance(inner, Mapping):
        raise KeyError(field)
    return value_at(inner, rest)


def missing_field(setting: str, field: str, fields: list[str]) -> str:
    """The message about a missing field that `setting` names: the field, and the fields that exist."""
    known = ", ".join(map(named, map(str, fields[:_FIELDS]))) or "none"
    more = f", and {len(fields) - _FIELDS} more" if len(fields) > _FIELDS else ""
    near = nearest(field, map(str, fields[:_FIELDS]))
    return f"no field {field!r} (there is {known}{more}); set {setting}{near and f'.{near}'}"


def named(name: str) -> str:
    """A name for a message: in quotes if nobody would see where it begins and ends."""
    return name if name == name.strip() and name.isprintable() and name else repr(name)


def kind_of(value: Any) -> str:
    """The type of a value of a record, as its file calls it."""
    return "null" if value is None else type(value).__name__


def _item(value: Any, name: str, field: str) -> Any:
    if not isinstance(value, Mapping) or name not in value:
        raise Faulty(f"field {field!r} holds {kind_of(value)}, not answers with text and answer_start")
    return value[name]


def valid_text(value: Any, field: str) -> str:
    """`value` if it is text that UTF-8 can hold. Raises `Faulty`."""
    if not isinstance(value, str):
        what = kind_of(value)
        raise Faulty(f"field {field!r} holds {what}, not text" + (f": {shown(value)}" if value is not None else ""))
    if fault := invalid_bytes(value):
        line, column, what = fault
        where = f"column {column}" if line == 1 else f"line {line}, column {column} of the value"
        raise Faulty(f"field {field!r} is not valid text ({what} at {where}); set encoding if the file has another")
    return value
