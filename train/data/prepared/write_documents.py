"""Writes the token arrays of one source and split, part by part, and completes them once all documents are written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import operator
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.prepared.growing_file import GrowingFile, Stretch, digest_of
from train.data.prepared.journal import SideCounts
from train.data.prepared.store import SIDES, Counts, Split, array_path
from train.data.sources.records import Document
from train.data.tokenization.tokenizer import Tokenizer
from train.files import sync

_OFFSETS = np.dtype("<i8")


class GrowingFiles(contextlib.ExitStack):
    """The files in a folder to which a source's documents are written. A context manager, which closes them."""

    def __init__(self, directory: Path, ends: dict[str, Stretch]) -> None:
        """`ends` has the last stretches of files that are written on, by their paths below `directory`."""
        super().__init__()
        self._directory, self._ends = directory, ends
        self.files: dict[str, GrowingFile] = {}

    def open(self, path: Path, begin: bytes = b"") -> GrowingFile:
        """Write on a file that begins with `begin`, or make it. Raises `OSError`."""
        name = path.relative_to(self._directory).as_posix()
        end = self._ends[name].end if name in self._ends else None
        self.files[name] = self.enter_context(GrowingFile(path, begin, end))
        return self.files[name]

    def move(self, places: dict[str, int]) -> None:
        """Go to a byte of each file."""
        for name, place in places.items():
            self.files[name].move(place)

    def end_part(self) -> dict[str, Stretch]:
        """What was written since the last part, which is on the disk now. Raises `OSError`."""
        return {name: file.end_part() for name, file in self.files.items()}


class _TokenWriter:
    """Writes one token array, a document at a time."""

    def __init__(self, files: GrowingFiles, path: Path, side: str, tokenizer: Tokenizer) -> None:
        self._end = _end_of_text(tokenizer)
        self._tokens = files.open(_tokens_path(path, side), self._end)
        # Offsets begin after the first end of text.
        self._offsets = files.open(_offsets_path(path, side), _offsets_header(0) + np.array([1], _OFFSETS).tobytes())
        self._documents = self._bytes = self._largest_id = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        self._tokens.write(ids.tobytes() + self._end)
        self._offsets.write((self._tokens.position // len(self._end)).to_bytes(_OFFSETS.itemsize, "little"))
        self._documents += 1
        self._bytes += text_bytes
        self._largest_id = max(self._largest_id, int(ids.max(initial=0)))

    def end_part(self) -> SideCounts:
        """What was added since the last part."""
        counts = SideCounts(self._documents, self._bytes, self._largest_id)
        self._documents = self._bytes = self._largest_id = 0
        return counts


class DocumentWriter:
    """Writes the token arrays of one source and split, one for each side, and the held-out documents themselves."""

    def __init__(
        self,
        files: GrowingFiles,
        path: Path,
        tokenizers: Sequence[Tokenizer],
        *,
        keeps_texts: bool = False,
    ) -> None:
        """Creates the files whose names begin with `path`, one tokenizer for each side. Raises `OSError`, as do the methods."""
        self._sides = [
            _TokenWriter(files, path, side, tokenizer) for side, tokenizer in zip(SIDES, tokenizers, strict=False)
        ]
        self._texts = files.open(Path(f"{path}.documents.jsonl")) if keeps_texts else None

    def add(self, document: Document, texts: Sequence[bytes], ids: Sequence[np.ndarray]) -> None:
        """Append one document, with its `texts` in UTF-8, and the ids [n] of each, without end of text."""
        for place, (side_ids, text) in enumerate(zip(ids, texts, strict=True)):
            self._sides[min(place, 1)].add(side_ids, len(text))
        if self._texts:
            self._texts.write(f"{document.to_json()}\n".encode())

    def end_part(self) -> list[SideCounts]:
        """What was added since the last part, for each side."""
        return [side.end_part() for side in self._sides]


def complete(
    directory: Path,
    split: Split,
    source: int,
    name: str,
    tokenizers: Sequence[Tokenizer],
    parts: Sequence[list[SideCounts]],
) -> Counts:
    """Complete the token arrays of a source and split whose documents are all written.

    Args:
        name: the source's title.
        parts: what each part added, for each side.

    Raises:
        OSError: a file cannot be read or written.
    """
    path, found = array_path(directory, split, source), []
    for side, tokenizer, counts in zip(SIDES, tokenizers, zip(*parts, strict=True), strict=False):
        total = functools.reduce(operator.add, counts, SideCounts())
        found.append(_complete_side(path, side, name, tokenizer, total))
    own, *other = found
    return dataclasses.replace(own, target=other[0] if other else None)


def _complete_side(path: Path, side: str, name: str, tokenizer: Tokenizer, counts: SideCounts) -> Counts:
    tokens, offsets = _tokens_path(path, side), _offsets_path(path, side)
    header = _offsets_header(counts.documents + 1)
    with offsets.open("r+b") as stream:
        stream.write(header)
    sync(offsets)
    end = _end_of_text(tokenizer)
    digest = digest_of(tokens, len(end))
    digest_of(offsets, len(header), running=digest)
    return Counts(
        name,
        counts.documents,
        tokens.stat().st_size // len(end) - 1,
        counts.bytes,
        skipped=0,
        largest_id=max(counts.largest_id, tokenizer.end_of_text),
        digest=digest.hexdigest(),
    )


def _tokens_path(path: Path, side: str) -> Path:
    return Path(f"{path}{side}.tokens")


def _offsets_path(path: Path, side: str) -> Path:
    return Path(f"{path}{side}.offsets.npy")


def _end_of_text(tokenizer: Tokenizer) -> bytes:
    return np.array([tokenizer.end_of_text], tokenizer.dtype).tobytes()


def _offsets_header(count: int) -> bytes:
    """The header of a `.npy` file of `count` offsets. numpy pads it with room for any number, so that its length is the same."""
    stream = io.BytesIO()
    header = {"descr": _OFFSETS.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()
