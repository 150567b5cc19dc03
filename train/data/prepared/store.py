"""Prepared data on disk: token arrays with document offsets, a tokenizer and the counts, written whole or not at all.

    <fingerprint>/
      meta.json                     counts, sizes, the largest id
      tokenizer/
      train/0.tokens                little-endian ids of source 0, uint16 or uint32
      train/0.offsets.npy           where each document begins, int64 [documents + 1]
      validation/0.tokens ...

For pairs, such as a text and its translation, there are also

      target_tokenizer/             if the target side has a vocabulary of its own
      train/0.target.tokens         the target side, document by document
      train/0.target.offsets.npy

if a text has choices, they are successive documents of the target side; for documents with labels

      train/0.labels.npy            as `train.data.prepared.label_arrays` describes them, classes by their number in meta.json

and for both

      validation/0.documents.jsonl  the held-out documents as they were read, one a line

An array begins with one end of text, and each document is followed by one. So every token of every document has a
preceding token to predict it from, and `offsets[d] - 1` is where the inputs of document d begin.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.data.sources.records import MARKED, Document, LabelKind
from train.data.tokenization.tokenizer import Tokenizer
from train.files import sync
from transformer.errors import UserError

Split = Literal["train", "validation"]

FORMAT_VERSION = 7
META_FILE = "meta.json"
SIDES = ("", ".target")
"""What the names of the files of each side have before their suffix."""
_TOKENIZER_FOLDERS = ("tokenizer", "target_tokenizer")


@dataclass(frozen=True)
class Counts:
    """What one source contributed to one split; for pairs, the source side."""

    name: str
    """The source's title."""
    documents: int
    tokens: int
    """Token ids to predict: each document's own and one end of text per document."""
    bytes: int
    """The text in UTF-8, in bytes."""
    skipped: int
    """Documents skipped as unreadable. With a split by document id they are counted under `train`."""
    largest_id: int
    """The largest token id, the end of text included."""
    digest: str
    """BLAKE2b of the token ids and of where documents begin."""
    target: Counts | None = None
    """For pairs, the counts of the target side."""

    @property
    def predicted(self) -> Counts:
        """The counts of the side that a model predicts."""
        return self.target or self


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The contents of `meta.json`."""

    format_version: int
    fingerprint: str
    python: str
    """The version of the Python that prepared the data; the `stdlib` source is its library."""
    dtype: str
    vocab_size: int
    end_of_text: int
    train: tuple[Counts, ...]
    validation: tuple[Counts, ...]
    gzip_bytes: int | None
    """Bytes of the joined validation documents after `gzip -9`; None if they are too large."""
    xz_bytes: int | None
    """Bytes after `xz`."""
    target_vocab_size: int | None = None
    """For pairs: the vocabulary size of the target side, whether separate or shared; None without pairs."""
    labels: tuple[str, ...] = ()
    """The classes of the training documents, or the tags of their words, sorted; empty if there are none."""
    label_kind: LabelKind | None = None
    """What the documents' labels are; None if they have none."""
    labels_digest: str = ""
    """BLAKE2b of all labels; empty if there are none."""

    def counts(self, split: Split) -> tuple[Counts, ...]:
        """The counts of a split, one for each source."""
        return self.train if split == "train" else self.validation

    @property
    def pairs(self) -> bool:
        """Whether the documents have two sides."""
        return self.target_vocab_size is not None

    @property
    def largest_id(self) -> int:
        """The largest token id of all input: a model's vocabulary must be larger."""
        return max(counts.largest_id for counts in (*self.train, *self.validation))

    @property
    def largest_target_id(self) -> int:
        """The largest token id of the targets; for pairs, of the target side."""
        return max(counts.predicted.largest_id for counts in (*self.train, *self.validation))

    def tokens(self, split: Split) -> int:
        """Predicted tokens of a split; for pairs, of the target side."""
        return sum(counts.predicted.tokens for counts in self.counts(split))

    def bytes(self, split: Split) -> int:
        """UTF-8 bytes of a split's text; for pairs, of the target side."""
        return sum(counts.predicted.bytes for counts in self.counts(split))

    def bytes_per_token(self, split: Split) -> float:
        """UTF-8 bytes of text per predicted token: a loss of x nats a token is x / ln 2 / this in bits per byte."""
        return self.bytes(split) / max(1, self.tokens(split))

    def bits_per_byte(self, compressor: Literal["gzip", "xz"]) -> float | None:
        """Bits per byte that a compressor reaches on the validation text; None if it was not tried."""
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
    """Prefix of the names of files that store an index over this array; None to store none."""
    target: TokenArray | None = None
    """For pairs, the target side, document by document; None for single texts."""
    labels: np.ndarray | None = None
    """The label of each document, or token, as `train.data.prepared.label_arrays` describes them; None without labels."""
    reference: np.ndarray | None = None
    """[examples, 2] float32: what the reference model says of both answers of each pair; None where that is not known."""

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def others(self) -> int:
        """How many texts of the target side belong to each document: 0, 1 in pairs, or the number of its choices."""
        return 0 if self.target is None or not self.documents else self.target.documents // self.documents


@dataclass(frozen=True, eq=False)
class Prepared:
    """Prepared data, ready to be packed and sampled."""

    directory: Path
    meta: Meta
    tokenizer: Tokenizer
    train: tuple[TokenArray, ...]
    """One per source of the config, in its order."""
    validation: tuple[TokenArray, ...]
    """Only sources that have validation documents."""

    own_target_tokenizer: Tokenizer | None = None
    """The tokenizer of the target side of pairs, if that has a vocabulary of its own."""

    @classmethod
    def load(cls, directory: Path) -> Prepared:
        """Open a folder of prepared data. Raises `UserError` if it is missing or damaged."""
        tokenizer, *others = read_tokenizers(directory)
        target_tokenizer = others[0] if others else None
        dtypes = (tokenizer.dtype, (target_tokenizer or tokenizer).dtype)
        try:
            meta = _read_meta(directory)
            train = tuple(_open(directory, "train", i, meta, dtypes) for i in range(len(meta.train)))
            held_out = [i for i, counts in enumerate(meta.validation) if counts.documents]
            validation = tuple(_open(directory, "validation", i, meta, dtypes) for i in held_out)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory}: damaged ({error}); delete this folder and prepare the data again") from error
        return cls(directory, meta, tokenizer, train, validation, target_tokenizer)

    @property
    def pairs(self) -> bool:
        """Whether every array has a target side."""
        return bool(self.train) and self.train[0].target is not None

    @property
    def target_tokenizer(self) -> Tokenizer:
        """The tokenizer of the targets; for pairs, of the target side."""
        return self.own_target_tokenizer or self.tokenizer

    def held_out(self, array: TokenArray) -> list[Document]:
        """The documents of an array of `validation` as they were read; stored for pairs and for documents with labels.

        Raises `UserError` if the file is missing or damaged.
        """
        path = Path(f"{array.index_path}.documents.jsonl")
        try:
            with path.open(encoding="utf-8") as stream:
                return [Document.from_json(line) for line in stream]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"damaged ({error}); delete its folder and prepare the data again"
            raise UserError(f"{path}: {reason}") from error

    def validation_pairs(self) -> list[tuple[str, str]]:
        """The held-out pairs as they were written, in the order of the `validation` arrays; none for single texts.

        Raises `UserError` if a file is missing or damaged.
        """
        arrays = self.validation if self.pairs else ()
        return [(document.text, document.sides[1]) for array in arrays for document in self.held_out(array)]


def write_tokenizers(directory: Path, tokenizers: Sequence[Tokenizer]) -> list[Path]:
    """Save the tokenizer, and that of the target side if there is one; the files. Raises `OSError`."""
    paths = []
    for folder, tokenizer in zip(_TOKENIZER_FOLDERS, tokenizers, strict=False):
        tokenizer.save(directory / folder)
        paths += sorted((directory / folder).iterdir())
        for path in (*paths, directory / folder):
            sync(path)
    return paths


def read_tokenizers(directory: Path) -> list[Tokenizer]:
    """What `write_tokenizers` wrote. Raises `UserError` if it is missing or damaged."""
    own, other = (directory / folder for folder in _TOKENIZER_FOLDERS)
    return [Tokenizer.load(own), *([Tokenizer.load(other)] if other.is_dir() else [])]


def write_meta(directory: Path, meta: Meta) -> None:
    """Write the counts and sync them to disk. Raises `OSError`."""
    path = directory / META_FILE
    path.write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n", "utf-8")
    for written in (path, *(folder for folder in directory.iterdir() if folder.is_dir()), directory):
        sync(written)


def _read_meta(directory: Path) -> Meta:
    fields = json.loads((directory / META_FILE).read_text("utf-8"))
    for split in ("train", "validation"):
        fields[split] = tuple(_read_counts(counts) for counts in fields[split])
    return Meta(**fields | {"labels": tuple(fields["labels"])})


def _read_counts(fields: dict[str, Any]) -> Counts:
    target = fields.pop("target")
    return Counts(**fields, target=None if target is None else _read_counts(target))


def _open(directory: Path, split: Split, source: int, meta: Meta, dtypes: tuple[np.dtype, np.dtype]) -> TokenArray:
    path = array_path(directory, split, source)
    counts = meta.counts(split)[source]
    target = None if counts.target is None else _open_side(path, SIDES[1], counts.target, dtypes[1])
    labels = None
    if meta.label_kind is not None and counts.documents:
        labels = np.load(labels_path(directory, split, source), mmap_mode="r")
        of_tokens = meta.label_kind in ("tags", *MARKED)
        wanted, what = (counts.tokens + 1, "tokens") if of_tokens else (counts.documents, "documents")
        if len(labels) != wanted:
            raise ValueError(f"{path.name}: {len(labels)} labels where meta.json counts {wanted} {what}")
    return dataclasses.replace(_open_side(path, SIDES[0], counts, dtypes[0]), target=target, labels=labels)


def _open_side(path: Path, side: str, counts: Counts, dtype: np.dtype) -> TokenArray:
    tokens = np.memmap(f"{path}{side}.tokens", dtype, "r")
    offsets = np.load(f"{path}{side}.offsets.npy", mmap_mode="r")
    if len(tokens) != counts.tokens + 1 or len(offsets) != counts.documents + 1:
        raise ValueError(f"{path.name}{side}: {len(tokens)} tokens where meta.json counts {counts.tokens + 1}")
    return TokenArray(counts.name, tokens, offsets, Path(f"{path}{side}"))


def labels_path(directory: Path, split: Split, source: int) -> Path:
    """The file of the classes of one source's documents."""
    return Path(f"{array_path(directory, split, source)}.labels.npy")


def array_path(directory: Path, split: Split, source: int) -> Path:
    """The beginning of the names of one source's files."""
    return directory / split / str(source)
