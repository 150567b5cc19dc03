"""Tokenises sources in parts, each recorded once it is on the disk, and continues after those of a process that was stopped.

What is written does not depend on where parts begin, or on whether and where a process was stopped.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from train.data.prepared.baseline import LIMIT_BYTES
from train.data.prepared.growing_file import GrowingFile, is_intact
from train.data.prepared.held_out import HeldOut
from train.data.prepared.journal import Journal, Part
from train.data.prepared.label_arrays import Labels, stored_path
from train.data.prepared.store import Split, array_path
from train.data.prepared.write_documents import DocumentWriter, GrowingFiles
from train.data.sources.records import Document, Rejects
from train.data.sources.source import FileStart, documents, text_size
from train.data.sources.source_config import SourceConfig, SyntheticSource
from train.data.tokenization.tokenise import Tokenised, tokenised
from train.data.tokenization.tokenizer import Tokenizer
from train.progress import Advance, report, say
from transformer.errors import UserError

PART_BYTES = 64 << 20
"""Bytes of text after which a part ends."""
_CHANGED = "{}: it has changed since its first parts were made"


class UnusableParts(Exception):
    """The reason why finished parts cannot be continued."""


@dataclass(frozen=True)
class Stage:
    """One source of a config."""

    number: int
    """Among the sources of training and of validation."""
    index: int
    """Among those of its own kind."""
    source: SourceConfig
    held_out: float
    """The fraction of its documents for validation."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that its documents go to."""
        return (*(("train",) if self.held_out < 1 else ()), *(("validation",) if self.held_out > 0 else ()))


@dataclass(frozen=True, kw_only=True)
class SourceWriter:
    """What writing every source needs."""

    directory: Path
    stored: Path
    """The folder of what is not kept once all is written."""
    journal: Journal
    tokenizers: Sequence[Tokenizer]
    """One for each side of a document."""
    labels: Labels | None
    """None if the documents have none."""
    workers: int
    shown: bool

    def write(self, stage: Stage) -> None:
        """Tokenise the documents of a source that no finished part has, and those of damaged parts.

        Raises:
            UserError: a document cannot be read, or has another number of choices than the first.
            UnusableParts: the source has changed since finished parts were made.
            OSError: a file cannot be written.
        """
        parts = self.journal.of_stage(stage.number)
        damaged = [number for number, part in enumerate(parts) if not self._is_intact(part)]
        is_over = bool(parts) and parts[-1].is_last
        if damaged:
            what = "part is" if len(damaged) == 1 else "parts are"
            say(f"{stage.source.title}: {len(damaged)} finished {what} damaged, and made again", shown=self.shown)
        if is_over and not damaged:
            with GrowingFiles(self.directory, parts[-1].files) as files:
                _Writing(self, stage, files, lambda _: None, parts)  # the beginnings of files are of no part
            return
        source = _Source(stage, parts, damaged)
        with (
            GrowingFiles(self.directory, parts[-1].files if parts else {}) as files,
            report(f"tokenising {stage.source.title}", text_size(stage.source), shown=self.shown) as advance,
        ):
            writing = _Writing(self, stage, files, advance, parts)
            advance(sum(part.text_bytes for number, part in enumerate(parts) if number not in damaged))
            found = tokenised(self.tokenizers, source.read(), self.workers)
            for number in damaged:
                part = parts[number]
                files.move({name: stretch.begin for name, stretch in part.files.items()})
                writing.add(itertools.islice(found, part.end - part.begin), part.begin)
                if writing.end_part(source, known=True).files != part.files:
                    raise UnusableParts(_CHANGED.format(stage.source.title))
            if damaged:
                files.move({name: stretch.end for name, stretch in parts[-1].files.items()})
            begin = parts[-1].end if parts else 0
            while not is_over:
                is_over = writing.add(found, begin, enough=PART_BYTES)
                part = writing.end_part(source, is_last=is_over)
                self.journal.add_part(part)
                begin = part.end

    def _is_intact(self, part: Part) -> bool:
        return all(is_intact(self.directory / name, stretch) for name, stretch in part.files.items())


class _Source:
    """Reads the documents of a source that are not finished."""

    def __init__(self, stage: Stage, parts: Sequence[Part], damaged: Collection[int]) -> None:
        self._stage, self._parts, self._damaged = stage, parts, damaged
        first = min(damaged, default=len(parts))
        self._begin = parts[first - 1].following if first else FileStart()
        self._starts = deque([self._begin])
        self.rejects = Rejects(on_error_of(stage.source))

    def read(self) -> Iterator[Document]:
        """The documents of damaged parts, and all that follow the last part. Raises `UnusableParts`, and as `documents`."""
        found = documents(self._stage.source, self.rejects, begin=self._begin, starts=self._starts)
        place = self._begin.document
        is_over = bool(self._parts) and self._parts[-1].is_last
        parts = self._parts[: max(self._damaged) + 1] if is_over else self._parts
        for number, part in enumerate(parts):
            if part.end <= place:
                continue
            some = itertools.islice(found, part.end - place)
            if number in self._damaged:
                yield from some
            elif _digest(some) != part.documents and place == part.begin:
                raise UnusableParts(_CHANGED.format(self._stage.source.title))
            place = part.end
        if not is_over:
            yield from found

    def file_of(self, document: int) -> FileStart:
        """The beginning of the last file that begins at or before a document. Later calls are for later documents."""
        while len(self._starts) > 1 and self._starts[1].document <= document:
            self._starts.popleft()
        return self._starts[0]


class _Writing:
    """Writes the documents of one source, and counts what is in the part."""

    def __init__(
        self, run: SourceWriter, stage: Stage, files: GrowingFiles, advance: Advance, parts: Sequence[Part]
    ) -> None:
        self._run, self._stage, self._files, self._advance = run, stage, files, advance
        self._on_error = on_error_of(stage.source)
        self._first = parts[0].first if parts else None
        self._writers: dict[Split, DocumentWriter] = {}
        keeps_texts = run.labels is not None or len(run.tokenizers) == 2
        for split in stage.splits:
            path = array_path(run.directory, split, stage.index)
            self._writers[split] = DocumentWriter(
                files, path, run.tokenizers, keeps_texts=keeps_texts and split == "validation"
            )
        self._labels: dict[Split, GrowingFile] = {}
        if run.labels is not None:
            for split in stage.splits:
                self._labels[split] = files.open(stored_path(run.stored, split, stage.index), run.labels.begin)
        self._held_out = files.open(held_out_path(run.stored, stage.number))
        # Plain text alone: the rows of pairs and of labelled documents have tokens of their own around each text.
        is_plain = run.labels is None and len(run.tokenizers) == 1
        self._before = np.array(run.tokenizers[0].begin if is_plain else (), run.tokenizers[0].dtype)
        self._begin_part(0)

    def _begin_part(self, begin: int) -> None:
        self._begin = self._end = begin
        self._held_out_bytes = 0
        self._refused = Rejects(self._on_error)
        self._hash = hashlib.blake2b(digest_size=16)
        before = [part for part in self._run.journal.parts if (part.stage, part.end) <= (self._stage.number, begin)]
        known = {part.end: part.classes for part in before if part.stage == self._stage.number}
        self._chooser = HeldOut(self._stage.source, self._stage.held_out, known.get(begin))
        self._left = LIMIT_BYTES - sum(part.held_out_bytes for part in before)

    def add(self, found: Iterable[Tokenised], begin: int, *, enough: int | None = None) -> bool:
        """Write a part's documents, of which `begin` is the first: all, or until there are `enough` bytes of text.

        Returns:
            Whether all are written.
        """
        self._begin_part(begin)
        size = 0
        for one in found:
            texts = [text.encode() for text in one.document.sides]
            if one.refused:
                self._refused.add(one.document.id, one.refused)
            else:
                self._write(one, texts)
            _update(self._hash, one.document, texts)
            self._end += 1
            added = sum(map(len, texts))
            self._advance(added)
            size += added
            if enough is not None and size >= enough:
                return False
        return True

    def _write(self, found: Tokenised, texts: Sequence[bytes]) -> None:
        document, ids = found.document, found.sides
        self._check_choices(document)
        split: Split = "validation" if self._chooser.holds_out(document) else "train"
        self._writers[split].add(document, texts, self._framed(ids))
        if self._run.labels is not None:
            label = self._run.labels.add(split, self._stage.index, document, len(ids[0]), found.marks)
            self._labels[split].write(label)
        if split == "validation":
            self._hold_out(texts[-1])

    def end_part(self, source: _Source, *, is_last: bool = False, known: bool = False) -> Part:
        """What was written since the part began, which is on the disk now; `known`: it was made again."""
        labels = self._run.labels
        return Part(
            stage=self._stage.number,
            begin=self._begin,
            end=self._end,
            is_last=is_last,
            following=source.file_of(self._end),
            documents=self._hash.hexdigest(),
            files=self._files.end_part(),
            counts={split: writer.end_part() for split, writer in self._writers.items()},
            first=self._first or ("", 0),
            held_out_bytes=self._held_out_bytes,
            labels=None if labels is None else labels.end_part(known=known),
            classes=dict(self._chooser.counts),
            rejected=source.rejects.count,
            first_rejected=source.rejects.first,
            refused=self._refused.count,
            first_refused=self._refused.first,
        )

    def _framed(self, ids: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return [np.concatenate([self._before, side]) for side in ids] if self._before.size else ids

    def _check_choices(self, document: Document) -> None:
        if not self._first:
            self._first = (document.id, len(document.choices))
        name, choices = self._first
        if len(document.choices) != choices:
            raise UserError(
                f"{document.id}: {len(document.choices)} choices, where {name} has {choices}; every "
                "document needs the same number"
            )

    def _hold_out(self, text: bytes) -> None:
        self._held_out_bytes += len(text)
        if self._held_out_bytes <= self._left:
            self._held_out.write(text)


def on_error_of(source: SourceConfig) -> Literal["stop", "skip"]:
    return "stop" if isinstance(source, SyntheticSource) else source.on_error


def held_out_path(stored: Path, stage: int) -> Path:
    """The file of the held-out texts of a source, for the compressors."""
    return stored / f"{stage}.held_out"


def _digest(some: Iterable[Document]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for document in some:
        _update(digest, document, [text.encode() for text in document.sides])
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, document: Document, texts: Sequence[bytes]) -> None:
    names = (document.id, document.group)
    digest.update(b"\0".join([*(name.encode("utf-8", "surrogateescape") for name in names), *texts]))
    if document.messages:
        digest.update(document.to_json().encode("utf-8", "surrogateescape"))
