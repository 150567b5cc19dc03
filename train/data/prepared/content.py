"""What prepared data holds, wherever it was read from: to compare the data of two runs, or of one run at two times."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from train.data.prepared.store import Counts, Prepared
from train.data.tokenization.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SourceContent:
    """One source in one split."""

    name: str
    """Its title, which has no part in the comparison: a file may be moved."""
    documents: int
    digest: str

    @classmethod
    def of(cls, counts: Counts) -> SourceContent:
        """That of a source, with both sides of pairs."""
        target = "" if counts.target is None else counts.target.digest
        return cls(counts.name, counts.documents, counts.digest + target)


@dataclasses.dataclass(frozen=True)
class Content:
    """The documents of all sources, in their order, and their labels, as one tokenizer, or two, has them."""

    train: tuple[SourceContent, ...]
    validation: tuple[SourceContent, ...]
    tokenizers: tuple[str, ...]
    """The fingerprint of each."""
    labels: str
    """A digest of all labels."""

    @classmethod
    def of(cls, prepared: Prepared) -> Content:
        """That of prepared data."""
        splits = [tuple(map(SourceContent.of, prepared.meta.counts(split))) for split in ("train", "validation")]
        tokenizers = [prepared.tokenizer, *([prepared.own_target_tokenizer] if prepared.own_target_tokenizer else [])]
        return cls(splits[0], splits[1], tuple(one.fingerprint() for one in tokenizers), prepared.meta.labels_digest)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Content:
        """The content whose `dataclasses.asdict` was stored as JSON."""
        splits = {split: tuple(SourceContent(**one) for one in data[split]) for split in ("train", "validation")}
        return cls(**splits, tokenizers=tuple(data["tokenizers"]), labels=data["labels"])

    @property
    def digest(self) -> str:
        """The same for the same documents in the same order, wherever they were read from."""
        sources = [[one.digest for one in split] for split in (self.train, self.validation)]
        content = json.dumps([*sources, self.tokenizers, self.labels])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def differences(self, other: Content) -> Iterator[str]:
        """A line for each source that is another in `other`, if both have the same tokenizers."""
        for split in ("train", "validation"):
            before, now = getattr(self, split), getattr(other, split)
            if len(before) != len(now):
                names = [", ".join(one.name for one in each) or "none" for each in (before, now)]
                yield f"{split}: {len(before)} sources ({names[0]}) → {len(now)} ({names[1]})"
                continue
            for one, another in zip(before, now, strict=True):
                if one.digest != another.digest:
                    yield f"{split}: {_difference(one, another)}"
        if self.labels != other.labels:
            yield "labels: those of some documents are others"


def ids_with_another_meaning(before: Tokenizer, now: Tokenizer) -> int:
    """The number of token ids that stand for another piece of text, or are in one of two vocabularies only."""
    old, new = before.pieces(), now.pieces()
    return sum(old.get(id) != new.get(id) for id in old.keys() | new.keys())


def _difference(one: SourceContent, another: SourceContent) -> str:
    name = one.name if one.name == another.name else f"{one.name} → {another.name}"
    if more := another.documents - one.documents:
        what = "document" if abs(more) == 1 else "documents"
        return f"{name} has {abs(more):,} {what} {'more' if more > 0 else 'fewer'} ({one.documents:,} → {another.documents:,})"
    return f"{name} has the same number of documents ({one.documents:,}), with other text or in another order"
