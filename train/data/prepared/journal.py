"""The journal of unfinished prepared data: which parts are on the disk, and what they were made from.

A line is a checksum and a JSON object. A line that was not written whole, or is damaged, ends the journal.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.prepared.growing_file import Stretch
from train.data.prepared.label_arrays import LabelsPart
from train.data.sources.source import FileStart
from train.files import sync, whole_file

JOURNAL_VERSION = 2
_CHECKSUM_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """What unfinished data is going to be."""

    fingerprint: str
    settings: str
    """The digest of the settings alone: the same if the content of a source has changed since."""
    version: int = JOURNAL_VERSION


@dataclass(frozen=True)
class SideCounts:
    """What a part adds to one side of one split."""

    documents: int = 0
    bytes: int = 0
    """Of text in UTF-8."""
    largest_id: int = 0

    def __add__(self, other: SideCounts) -> SideCounts:
        return SideCounts(
            self.documents + other.documents, self.bytes + other.bytes, max(self.largest_id, other.largest_id)
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive documents of one source, whose tokens are on the disk."""

    stage: int
    """The number of the source among those of training and of validation."""
    begin: int
    """The number of its first document in the source."""
    end: int
    """The number of the document after its last."""
    is_last: bool
    """Whether it ends with the source."""
    following: FileStart
    """The beginning of the file of the source that document `end` is in, or after it."""
    documents: str
    """BLAKE2b of its documents, to notice that the source is another one."""
    files: dict[str, Stretch]
    """What it wrote into the files of unfinished data, by their paths."""
    counts: dict[str, list[SideCounts]]
    """By split, for each side."""
    first: tuple[str, int]
    """The id of the source's first document, and the number of its choices."""
    held_out_bytes: int
    """Of the held-out texts that a model predicts, in UTF-8."""
    labels: LabelsPart | None
    classes: dict[str, int]
    """How many documents of each class the source has up to its end, where that decides what is held out."""
    rejected: int
    """How many documents of the source were left out as unreadable, if this is its last part."""
    first_rejected: str
    refused: int
    """How many of its documents were left out since the chat template refuses them."""
    first_refused: str

    @property
    def text_bytes(self) -> int:
        """Of all its text."""
        return sum(side.bytes for sides in self.counts.values() for side in sides)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Part:
        """What `dataclasses.asdict` gave, read back from JSON. Raises `KeyError` or `TypeError` for anything else."""
        return cls(**data | {
            "following": FileStart(*data["following"]),
            "files": {name: Stretch(*stretch) for name, stretch in data["files"].items()},
            "counts": {split: [SideCounts(**side) for side in sides] for split, sides in data["counts"].items()},
            "first": tuple(data["first"]),
            "labels": None if data["labels"] is None else LabelsPart.from_data(data["labels"]),
        })  # fmt: skip


@dataclass
class Journal:
    """What is recorded, in the order in which it was written."""

    path: Path
    work: Work
    tokenizers: dict[str, str] = field(default_factory=dict)
    """The digests of the files of the finished tokenizers, by their paths; empty if they are not finished."""
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def create(cls, path: Path, work: Work) -> Journal:
        """Begin a journal. Raises `OSError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = cls(path, work)
        journal.repair()
        for folder in (path.parent, path.parent.parent):
            sync(folder)
        return journal

    @classmethod
    def read(cls, path: Path) -> Journal | None:
        """The journal at `path`; None if there is none of this version that can be read."""
        try:
            lines = path.read_bytes().splitlines(keepends=True)
            size = 0
            found: list[dict[str, Any]] = []
            for line in lines:
                if (record := _record(line)) is None:
                    break
                found.append(record)
                size += len(line)
            work = Work(**found[0]["work"])
            journal = cls(path, work)
            for record in found[1:]:
                journal.tokenizers |= record.get("tokenizers", {})
                journal.parts += [Part.from_data(record["part"])] if "part" in record else []
            return journal if work.version == JOURNAL_VERSION else None
        except (OSError, IndexError, KeyError, TypeError, ValueError):
            return None

    def repair(self) -> None:
        """Write what was read, without what followed the last whole line, so that more can be appended. Raises `OSError`."""
        whole = [{"work": dataclasses.asdict(self.work)}]
        whole += [{"tokenizers": self.tokenizers}] if self.tokenizers else []
        whole += [{"part": dataclasses.asdict(part)} for part in self.parts]
        with whole_file(self.path) as partial:
            partial.write_bytes(b"".join(map(_line, whole)))

    def add_tokenizers(self, digests: dict[str, str]) -> None:
        """Record that the tokenizers are on the disk. Raises `OSError`."""
        self.tokenizers = digests
        self._append({"tokenizers": digests})

    def add_part(self, part: Part) -> None:
        """Record that a part is on the disk. Raises `OSError`."""
        self.parts.append(part)
        self._append({"part": dataclasses.asdict(part)})

    def of_stage(self, stage: int) -> list[Part]:
        """The parts of one source."""
        return [part for part in self.parts if part.stage == stage]

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("ab") as stream:
            stream.write(_line(record))
            stream.flush()
            os.fsync(stream.fileno())


def _line(record: dict[str, Any]) -> bytes:
    content = json.dumps(record).encode()
    return _checksum(content) + b" " + content + b"\n"


def _record(line: bytes) -> dict[str, Any] | None:
    checksum, _, content = line.partition(b" ")
    if not line.endswith(b"\n") or checksum != _checksum(content[:-1]):
        return None
    return json.loads(content)


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_DIGITS // 2).hexdigest().encode()
