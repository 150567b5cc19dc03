"""The labels of documents, stored while their tokens are written, and numbered once all of them are known."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.data.prepared.store import Split, labels_path
from train.data.sources.records import MARKED, Document, LabelKind
from train.files import sync
from train.progress import say
from transformer.errors import UserError

NONE = -1
"""The number of a missing class."""


@dataclass
class LabelsPart:
    """What a part of the documents adds to what is known of the labels."""

    names: list[str] = field(default_factory=list)
    """The new classes, or tags, in the order in which they came."""
    arrays: list[tuple[Split, int]] = field(default_factory=list)
    """The new splits and sources, in the same order."""
    lost: int = 0
    """Words with a tag, or answers, that have no token."""
    choices: int = 0
    """For documents whose label is the number of a choice: how many choices there are."""

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> LabelsPart:
        """What `dataclasses.asdict` gave, read back from JSON."""
        return cls(**data | {"arrays": [tuple(one) for one in data["arrays"]]})


class Labels:
    """The labels of each source and split, in the order of the documents; classes and tags as numbers.

    Written for D documents of N tokens (all ends of text included): int32 [D] (class), int8 [D, C] (classes: 1 for each that a
    document has), float32 [D] (number), int32 [D, 2] (answers: the first and the last token of the first answer in its context),
    int32 [N] (tags: a word's tag at its first token); -1 if there is none. Until all are known, classes and tags are numbered in
    the order in which they came.
    """

    def __init__(self, kind: LabelKind, parts: Iterable[LabelsPart] = ()) -> None:
        """Continues after `parts`, which `end_part` gave."""
        self._kind = kind
        self._numbers: dict[str, int] = {}
        self._arrays: list[tuple[Split, int]] = []
        self._lost = self._choices = 0
        self._part = LabelsPart()
        for part in parts:
            for name in part.names:
                self._number(name)
            self._arrays += part.arrays
            self._lost += part.lost
            self._choices = part.choices or self._choices
        self._part = LabelsPart()

    @property
    def begin(self) -> bytes:
        """What the labels of each source and split begin with: a token array begins with an end of text."""
        if self._kind in MARKED:
            return np.zeros(1, np.uint8).tobytes()
        return np.array([NONE] if self._kind == "tags" else [], np.int32).tobytes()

    def add(self, split: Split, source: int, document: Document, tokens: int, marks: np.ndarray | None) -> bytes:
        """The label of the next document of source number `source`, to be stored until `write`.

        Args:
            tokens: how many its first side has, without end of text.
            marks: for tags, each word's first token; for answers, the first and the last token; for dialogues, all tokens.
        """
        label, kind = document.label, self._kind
        if (split, source) not in self._arrays:
            self._arrays.append((split, source))
            self._part.arrays.append((split, source))
        if kind in MARKED:
            assert marks is not None
            return np.append(marks, 0).astype(np.uint8).tobytes()
        assert label is not None
        if isinstance(label, float):
            return np.float32(label).tobytes()
        if isinstance(label, str):
            self._choices = self._part.choices = len(document.choices)
            return np.int32(self._number(label)).tobytes()
        if kind == "classes":
            return np.array([*(self._number(str(name)) for name in label), NONE], np.int32).tobytes()
        assert marks is not None
        if kind == "answers":
            self._part.lost += bool(label.texts) and int(marks[0]) == NONE  # type: ignore[union-attr]
            return marks.astype(np.int32).tobytes()
        numbers = np.full(tokens + 1, NONE, np.int32)
        places = marks >= 0
        numbers[marks[places]] = np.array([self._number(str(tag)) for tag in label], np.int32)[places]
        self._part.lost += int(np.sum(~places))
        return numbers.tobytes()

    def end_part(self, *, known: bool = False) -> LabelsPart:
        """What was added since the last part; `known`: it was made again, and is counted already."""
        part, self._part = self._part, LabelsPart()
        self._lost += 0 if known else part.lost
        return part

    def write(self, directory: Path, stored: Path, *, shown: bool) -> tuple[tuple[str, ...], str]:
        """Number the training documents' classes, or tags, by name, write all labels; their names, and a digest of all labels.

        Args:
            stored: the folder with what `add` gave, by `stored_path`.

        Raises:
            UserError: a held-out document is of a class that no training document has.
            OSError: a file cannot be read or written.
        """
        if self._lost:
            what = "words have a tag and" if self._kind == "tags" else "answers have"
            say(f"{self._lost} {what} no token in this vocabulary", shown=shown)
        names: tuple[str, ...] = ()
        if self._choices:
            names = _names_of_choices(self._numbers, self._choices)
        elif self._kind in ("class", "classes", "tags"):
            names = self._names(stored, shown=shown)
        new_number = np.array([*(names.index(name) for name in self._numbers), NONE], np.int32)
        digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=16)
        for split, source in self._arrays:
            values = self._stored(stored, split, source)
            if names:
                values = new_number[values]
            if self._kind == "classes":
                values = _hot(values, len(names))
            path = labels_path(directory, split, source)
            np.save(path, values.reshape(-1, 2) if self._kind == "answers" else values)
            sync(path)
            digest.update(values.tobytes())
        return names, digest.hexdigest()

    def _stored(self, stored: Path, split: Split, source: int) -> np.ndarray:
        dtype = np.uint8 if self._kind in MARKED else np.float32 if self._kind == "number" else np.int32
        return np.fromfile(stored_path(stored, split, source), dtype)

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._numbers)
            self._part.names.append(name)
        return self._numbers[name]

    def _names(self, stored: Path, *, shown: bool) -> tuple[str, ...]:
        """The names of the training documents' classes, or tags, sorted; says which of them no held-out document has.

        Raises `UserError` for held-out ones that no training document has.
        """
        found = list(self._numbers)
        known, held_out = (self._numbers_of(stored, split) for split in ("train", "validation"))
        names = tuple(sorted(found[number] for number in known))
        if unseen := [name for number, name in enumerate(found) if number not in known]:
            what = ("of class", "set labels of the sources to the classes to read")
            if self._kind == "tags":
                what = ("with the tag", "fix the tag")
            more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
            raise UserError(
                f"data: held-out documents are {what[0]} {unseen[0]!r}{more}, training documents only of {', '.join(names)}; "
                f"hold out fewer, or {what[1]}"
            )
        if held_out and (missing := [name for name in names if self._numbers[name] not in held_out]):
            what_is = "has" if self._kind == "tags" else "is of"
            of = f"{len(missing)} of {len(names)} {'tags' if self._kind == 'tags' else 'classes'}"
            say(f"no held-out document {what_is} {of}: {listed(missing)}", shown=shown)
        return names

    def _numbers_of(self, stored: Path, split: Split) -> set[int]:
        """The classes or tags of a split."""
        used = [np.unique(self._stored(stored, *array)) for array in self._arrays if array[0] == split]
        return {int(number) for numbers in used for number in numbers} - {NONE}


def _hot(values: np.ndarray, num_classes: int) -> np.ndarray:
    """Which classes each document has, int8 [D, C], from the classes of one document after the other, each ended by `NONE`."""
    is_end = values == NONE
    document = np.cumsum(is_end) - is_end
    found = np.zeros((int(is_end.sum()), num_classes), np.int8)
    found[document[~is_end], values[~is_end]] = 1
    return found


def listed(names: Sequence[str]) -> str:
    """The first names for a message, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def stored_path(stored: Path, split: Split, source: int) -> Path:
    """The file of one source's labels until all of them are known."""
    return stored / f"{split}-{source}.labels"


def _names_of_choices(labels: Iterable[str], count: int) -> tuple[str, ...]:
    """The data's names of the choices, in order: numbers from 0 or from 1, or letters.

    Raises `UserError` if a label is none of these names.
    """
    ways = [[str(number) for number in range(count)], [str(number + 1) for number in range(count)]]
    ways += [list(letters[:count]) for letters in (string.ascii_uppercase, string.ascii_lowercase)]
    for names in ways:
        if set(labels) <= set(names):
            return tuple(names)
    raise UserError(
        f"data: labels of {count} choices are {listed(sorted(labels))}; allowed: the number of the correct one, from 0 or "
        "from 1, or its letter"
    )


_SHOWN = 10
"""The most labels that a message names."""
