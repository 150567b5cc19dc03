"""The classes of documents, gathered while their tokens are written, and numbered once all of them are known."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from train.data.cache import sync
from train.data.store import Split, labels_path
from transformer.errors import UserError


class Classes:
    """The class of each document of each source and split."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # in the order in which they came
        self._documents: dict[tuple[Split, int], array[int]] = {}

    def add(self, split: Split, source: int, label: str) -> None:
        """Take the class of the next document of source number `source`."""
        number = self._numbers.setdefault(label, len(self._numbers))
        self._documents.setdefault((split, source), array("i")).append(number)

    def write(self, directory: Path) -> tuple[str, ...]:
        """Number the classes of the training documents by name, write those of all documents, and give the names.

        Raises `UserError` for a held-out document of a class that no training document has, and `OSError`.
        """
        found = list(self._numbers)
        known = {number for (split, _), own in self._documents.items() if split == "train" for number in set(own)}
        names = tuple(sorted(found[number] for number in known))
        if unseen := [name for number, name in enumerate(found) if number not in known]:
            raise UserError(
                f"data: held-out documents are of class {unseen[0]!r}, training documents only of {', '.join(names)}; hold "
                "out fewer, or set labels of the sources to the classes to read"
            )
        new_number = np.array([names.index(name) for name in found], np.int32)
        for (split, source), own in self._documents.items():
            path = labels_path(directory, split, source)
            np.save(path, new_number[np.frombuffer(own, np.int32)])
            sync(path)
        return names
