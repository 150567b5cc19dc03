"""The config of a run's data: its sources, its tokenizers, and how documents become examples."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from train.data.sources.records import LabelKind
from train.data.sources.source_config import SourceConfig, StdlibSource
from train.data.tokenization.tokenizer import TokenizerConfig
from transformer.errors import Config, ConfigError, require
from transformer.resume import Ask, ByContent, Free


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What a run reads, and how it is cut into examples."""

    sources: ByContent[tuple[SourceConfig, ...]] = (StdlibSource(),)
    """Sources of training text; examples are drawn from them in proportion to their weights."""
    validation: ByContent[tuple[SourceConfig, ...]] = ()
    """Sources of validation text; empty: documents held out from `sources`."""
    validation_fraction: ByContent[float] = 0.05
    """The fraction of documents that is held out: of each class, if they have classes; otherwise chosen by document id, or by
    group if the source has a `group_field`. Not used if `validation` is given."""
    tokenizer: ByContent[TokenizerConfig] = field(default_factory=TokenizerConfig)
    """How text becomes token ids."""
    target_tokenizer: ByContent[TokenizerConfig | None] = None
    """How the target side of pairs becomes token ids; null: by the same vocabulary, trained on both sides."""
    packing: Ask[Literal["chunk", "documents", "pad"]] = "chunk"
    """`chunk`: all documents joined, then cut into sequences; `documents`: whole documents, or pairs, packed into sequences
    without attending to each other (with contrastive and the tasks of labelled documents one document, or pair, per row);
    `pad`: one pair per row, in batches of pairs of similar length."""
    num_workers: Free[int] = 0
    """Threads that tokenise, and threads that fetch batches; 0: one per core."""
    prefetch: Free[int] = 4
    """Number of batches to prefetch into memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "sources", len(self.sources) > 0, "allowed: at least one source")
        for part in ("sources", "validation"):
            other = [source.title for source in getattr(self, part) if source.gives_pairs != self.pairs]
            if other:
                wanted = f"it {'gives no pairs' if self.pairs else 'gives pairs'}; allowed: all sources give pairs, or none does"
                raise ConfigError(DataConfig, part, other[0], wanted)
            first = self.label_kind
            other = [
                source.title for source in getattr(self, part) if (source.document_labels is None) != (first is None)
            ]
            if other:
                wanted = (
                    f"it has {'a' if first is None else 'no'} label_field; allowed: all sources have one, or none has"
                )
                raise ConfigError(DataConfig, part, other[0], wanted)
            other = [source.title for source in getattr(self, part) if source.document_labels != first]
            if other:
                raise ConfigError(
                    DataConfig, part, other[0], f"its label_kind differs from the first source's; allowed: {first!r}"
                )
        require(
            self,
            "target_tokenizer",
            self.pairs or self.target_tokenizer is None,
            "the sources do not give pairs; allowed: null",
        )
        if self.pairs:
            wanted = "chunks of the two sides of pairs would not correspond; allowed: 'documents', 'pad'"
            require(self, "packing", self.packing != "chunk", wanted)
        else:
            require(self, "packing", self.packing != "pad", "'pad' is for pairs; allowed: 'chunk', 'documents'")
        require(self, "validation_fraction", 0 <= self.validation_fraction < 1, "allowed: 0 or more, below 1")
        require(self, "num_workers", self.num_workers >= 0, "allowed: 1 or more, or 0 (one per core)")
        require(self, "prefetch", self.prefetch >= 1, "allowed: 1 or more")

    @property
    def pairs(self) -> bool:
        """Whether the sources give pairs, such as a text and its translation."""
        return self.sources[0].gives_pairs

    @property
    def labelled(self) -> bool:
        """Whether the documents have labels."""
        return self.label_kind is not None

    @property
    def label_kind(self) -> LabelKind | None:
        """What the documents' labels are; None if they have none."""
        return self.sources[0].document_labels

    @property
    def workers(self) -> int:
        """How many threads `num_workers` means on this machine."""
        if self.num_workers:
            return self.num_workers
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
