"""Prepared data on disk: token arrays with document offsets, a tokenizer and the counts, written whole or not at all.

    <fingerprint>/
      meta.json                     counts, sizes, the largest id
      tokenizer/
      train/0.tokens                little-endian ids of source 0, uint16 or uint32
      train/0.offsets.npy           where each document begins, int64 [documents + 1]
      validation/0.tokens ...

An array begins with one end of text, and each document is followed by one. So every token of every document has a
token before it to be predicted from, and `offsets[d] - 1` is where the inputs of document d begin.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from train.data.cache import sync
from train.data.tokenizer import Tokenizer
from transformer.errors import UserError

Split = Literal["train", "validation"]

FORMAT_VERSION = 1
_META_FILE = "meta.json"
_TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Counts:
    """What one source put into one split."""

    name: str
    """The source's title."""
    documents: int
    tokens: int
    """Token ids that are predicted: each document's own and one end of text a document."""
    bytes: int
    """The text in UTF-8, in bytes."""
    skipped: int
    """Documents left out as unreadable. With a split by document id they are counted under `train`."""
    largest_id: int
    """The largest token id, the end of text included."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What `meta.json` holds."""

    format_version: int
    fingerprint: str
    python: str
    """The Python that prepared the data: the `stdlib` source is its library."""
    dtype: str
    vocab_size: int
    end_of_text: int
    train: tuple[Counts, ...]
    validation: tuple[Counts, ...]
    gzip_bytes: int | None
    """The validation documents, joined, after `gzip -9`; None where there is too much of them."""
    xz_bytes: int | None
    """The same after `xz`."""

    def counts(self, split: Split) -> tuple[Counts, ...]:
        """The counts of a split, one per source."""
        return self.train if split == "train" else self.validation

    @property
    def largest_id(self) -> int:
        """The largest token id of all: a model's vocabulary must be larger."""
        return max(counts.largest_id for counts in (*self.train, *self.validation))

    def tokens(self, split: Split) -> int:
        """Predicted tokens of a split."""
        return sum(counts.tokens for counts in self.counts(split))

    def bytes(self, split: Split) -> int:
        """UTF-8 bytes of a split's text."""
        return sum(counts.bytes for counts in self.counts(split))

    def bytes_per_token(self, split: Split) -> float:
        """UTF-8 bytes of text per predicted token: a loss of x nats a token is x / ln 2 / this in bits per byte."""
        return self.bytes(split) / max(1, self.tokens(split))

    def bits_per_byte(self, compressor: Literal["gzip", "xz"]) -> float | None:
        """What a compressor makes of the validation text; None where it was not tried."""
        size = self.gzip_bytes if compressor == "gzip" else self.xz_bytes
        return None if size is None else 8 * size / max(1, self.bytes("validation"))


@dataclass(frozen=True, eq=False)
class TokenArray:
    """The tokens of one source in one split, memory-mapped."""

    name: str
    tokens: np.ndarray
    """[1 + tokens], uint16 or uint32: an end of text, then each document with its own."""
    offsets: np.ndarray
    """[documents + 1], int64: document d is `tokens[offsets[d]:offsets[d + 1]]`, its end of text included."""
    index_path: Path | None = None
    """Beginning of the names of files in which an index over this array may be kept; None to keep none."""

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class Prepared:
    """Data that is ready to be packed and drawn."""

    directory: Path
    meta: Meta
    tokenizer: Tokenizer
    train: tuple[TokenArray, ...]
    """One per source of the config, in its order."""
    validation: tuple[TokenArray, ...]
    """Only sources that have validation documents."""

    @classmethod
    def load(cls, directory: Path) -> Prepared:
        """Open what `finish` wrote. Raises `UserError` if it is missing or damaged."""
        try:
            meta = _read_meta(directory)
            train = tuple(_open(directory, "train", i, meta) for i in range(len(meta.train)))
            held_out = [i for i, counts in enumerate(meta.validation) if counts.documents]
            validation = tuple(_open(directory, "validation", i, meta) for i in held_out)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory}: damaged ({error}); delete this folder and prepare the data again") from error
        return cls(directory, meta, Tokenizer.load(directory / _TOKENIZER_FOLDER), train, validation)


class TokenWriter:
    """Writes the token array of one source and split, a document at a time. A context manager, which closes it."""

    def __init__(self, directory: Path, split: Split, source: int, name: str, tokenizer: Tokenizer) -> None:
        """Creates the files under `directory`. Raises `OSError`, as do the methods."""
        self._path = _array_path(directory, split, source)
        self._path.parent.mkdir(exist_ok=True)
        self._end = np.array([tokenizer.end_of_text], tokenizer.dtype).tobytes()
        self._offsets = array("q", [1])
        self._name = name
        self._bytes = 0
        self._largest_id = tokenizer.end_of_text
        self._file = self._path.with_suffix(".tokens").open("wb")
        self._file.write(self._end)

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document: its ids [n] without end of text, and how many bytes its text has in UTF-8."""
        self._file.write(ids.tobytes())
        self._file.write(self._end)
        self._offsets.append(self._offsets[-1] + len(ids) + 1)
        self._bytes += text_bytes
        self._largest_id = max(self._largest_id, int(ids.max(initial=0)))

    def finish(self) -> Counts:
        """Write what is left and wait for the disk."""
        self._file.close()
        offsets = self._path.with_suffix(".offsets.npy")
        np.save(offsets, np.frombuffer(self._offsets, np.int64))
        sync(self._path.with_suffix(".tokens"))
        sync(offsets)
        documents, tokens = len(self._offsets) - 1, self._offsets[-1] - 1
        return Counts(self._name, documents, tokens, self._bytes, skipped=0, largest_id=self._largest_id)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Save the tokenizer where `Prepared.load` looks for it. Raises `OSError`."""
    tokenizer.save(directory / _TOKENIZER_FOLDER)
    for path in (directory / _TOKENIZER_FOLDER).iterdir():
        sync(path)


def write_meta(directory: Path, meta: Meta) -> None:
    """Write the counts, on the disk when this returns. Raises `OSError`."""
    path = directory / _META_FILE
    path.write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n", "utf-8")
    for written in (path, *(folder for folder in directory.iterdir() if folder.is_dir()), directory):
        sync(written)


def _read_meta(directory: Path) -> Meta:
    fields = json.loads((directory / _META_FILE).read_text("utf-8"))
    for split in ("train", "validation"):
        fields[split] = tuple(Counts(**counts) for counts in fields[split])
    return Meta(**fields)


def _open(directory: Path, split: Split, source: int, meta: Meta) -> TokenArray:
    path = _array_path(directory, split, source)
    counts = meta.counts(split)[source]
    tokens = np.memmap(path.with_suffix(".tokens"), np.dtype(meta.dtype), "r")
    offsets = np.load(path.with_suffix(".offsets.npy"), mmap_mode="r")
    if len(tokens) != counts.tokens + 1 or len(offsets) != counts.documents + 1:
        raise ValueError(f"{path.name}: {len(tokens)} tokens where meta.json counts {counts.tokens + 1}")
    return TokenArray(counts.name, tokens, offsets, path)


def _array_path(directory: Path, split: Split, source: int) -> Path:
    return directory / split / str(source)
