"""The labels of documents, gathered while their tokens are written, and written once all of them are known."""

from __future__ import annotations

import hashlib
import json
import string
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from train.data.prepared.store import Split, labels_path
from train.data.sources.records import Document, LabelKind
from train.files import sync
from train.progress import say
from transformer.errors import UserError

NONE = -1
"""The number of a missing class."""


class Labels:
    """The labels of each source and split, in the order of the documents; classes and tags as numbers.

    Written for D documents of N tokens (all ends of text included): int32 [D] (class), float32 [D] (number), int32 [D, 2]
    (answers: the first and the last token of the first answer in its context), int32 [N] (tags: a word's tag at its first
    token); -1 if there is none.
    """

    def __init__(self, kind: LabelKind) -> None:
        self._kind = kind
        self._numbers: dict[str, int] = {}  # in the order in which they came
        self._found: dict[tuple[Split, int], array] = {}
        self._lost = 0
        self._choices = 0
        """For documents whose label is the number of a choice: how many choices there are."""

    def add(self, split: Split, source: int, document: Document, tokens: int, marks: np.ndarray | None) -> None:
        """Take the label of the next document of source number `source`.

        Args:
            tokens: how many its first side has, without end of text.
            marks: for tags, each word's first token; for answers, the first and the last token.
        """
        label, kind = document.label, self._kind
        assert label is not None
        found = self._found.get((split, source))
        if found is None:
            # A token array begins with an end of text.
            before = [NONE] if kind == "tags" else []
            found = self._found[split, source] = array("f" if kind == "number" else "i", before)
        if isinstance(label, float):
            found.append(label)
        elif isinstance(label, str):
            self._choices = len(document.choices)
            found.append(self._number(label))
        elif kind == "answers":
            assert marks is not None
            self._lost += bool(label.texts) and marks[0] == NONE  # type: ignore[union-attr]
            found.extend(marks.tolist())
        else:
            assert marks is not None
            numbers = np.full(tokens + 1, NONE, np.int32)
            places = marks >= 0
            numbers[marks[places]] = np.array([self._number(str(tag)) for tag in label], np.int32)[places]
            found.frombytes(numbers.tobytes())
            self._lost += int(np.sum(~places))

    def write(self, directory: Path, *, shown: bool) -> tuple[tuple[str, ...], str]:
        """Number the training documents' classes, or tags, by name, write all labels; their names, and a digest of all labels.

        Raises `UserError` for a held-out document of a class that no training document has, and `OSError`.
        """
        if self._lost:
            what = "words have a tag and" if self._kind == "tags" else "answers have"
            say(f"{self._lost} {what} no token in this vocabulary", shown=shown)
        names: tuple[str, ...] = ()
        if self._choices:
            names = _names_of_choices(self._numbers, self._choices)
        elif self._kind in ("class", "tags"):
            names = self._names()
        new_number = np.array([*(names.index(name) for name in self._numbers), NONE], np.int32)
        digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=16)
        for (split, source), own in self._found.items():
            values = np.frombuffer(own, np.float32 if self._kind == "number" else np.int32)
            if names:
                values = new_number[values]
            path = labels_path(directory, split, source)
            np.save(path, values.reshape(-1, 2) if self._kind == "answers" else values)
            sync(path)
            digest.update(values.tobytes())
        return names, digest.hexdigest()

    def _number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers))

    def _names(self) -> tuple[str, ...]:
        """The names of the training documents' classes, or tags, sorted. Raises `UserError` for a held-out one that is not."""
        found = list(self._numbers)
        known = {number for (split, _), own in self._found.items() if split == "train" for number in set(own)} - {NONE}
        names = tuple(sorted(found[number] for number in known))
        if unseen := [name for number, name in enumerate(found) if number not in known]:
            what = ("of class", "set labels of the sources to the classes to read")
            if self._kind == "tags":
                what = ("with the tag", "fix the tag")
            raise UserError(
                f"data: held-out documents are {what[0]} {unseen[0]!r}, training documents only of {', '.join(names)}; hold "
                f"out fewer, or {what[1]}"
            )
        return names


def _names_of_choices(labels: Iterable[str], count: int) -> tuple[str, ...]:
    """The data's names of the choices, in order: numbers from 0 or from 1, or letters.

    Raises `UserError` if a label is none of these names.
    """
    ways = [[str(number) for number in range(count)], [str(number + 1) for number in range(count)]]
    ways += [list(letters[:count]) for letters in (string.ascii_uppercase, string.ascii_lowercase)]
    for names in ways:
        if set(labels) <= set(names):
            return tuple(names)
    shown = ", ".join(sorted(labels)[:_SHOWN])
    raise UserError(
        f"data: labels of {count} choices are {shown}; allowed: the number of the correct one, from 0 or from 1, or its letter"
    )


_SHOWN = 10
"""The most labels that a message names."""
