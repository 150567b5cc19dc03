"""Which documents of a source are held out for validation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction

from train.data.sources.records import Document
from train.data.sources.source_config import RecordSource, SourceConfig

_MOST_PARTS = 10**6


class HeldOut:
    """Chooses a fixed share of the documents of a source, in their order.

    Of documents with classes it is the share of each class: one, chosen by a hash, of every 1 / `fraction` in a row, and never
    the first. Others are chosen by a hash of their id, or of their group, which is held out as a whole.

    Args:
        fraction: of the documents.
        before: for documents that have been chosen among already, how many there were of each class.
    """

    def __init__(self, source: SourceConfig, fraction: float, before: Mapping[str, int] | None = None) -> None:
        self._fraction = fraction
        self._share = max(Fraction(fraction).limit_denominator(_MOST_PARTS), Fraction(1, _MOST_PARTS))
        self._by_class = 0 < fraction < 1 and isinstance(source, RecordSource) and _has_classes(source)
        self.counts: dict[str, int] = dict(before or {})
        """How many documents there were of each class; empty where they are chosen by id."""

    def holds_out(self, document: Document) -> bool:
        """Whether the next document is held out."""
        if not self._by_class:
            return position_of(document.split_by) < self._fraction
        name, share = str(document.label), self._share
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        block = math.floor(number * share)
        # The first of a class is for training: a class with a single document would have none.
        first, after = max(math.ceil(block / share), 1), math.ceil((block + 1) / share)
        return after > first and number == first + math.floor(position_of(f"{name}\0{block}") * (after - first))


def _has_classes(source: RecordSource) -> bool:
    """Whether its documents have classes, and are not held out in groups."""
    return source.document_labels == "class" and not source.group_field and not source.choice_fields


def position_of(text: str) -> float:
    """A hash of a document's id, or of its group, in [0, 1)."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
