"""From sources to prepared data: train the tokenizer, tokenise once, keep the result under its fingerprint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train.data.prepared.baseline import Baseline
from train.data.prepared.label_arrays import Labels
from train.data.prepared.store import (
    FORMAT_VERSION,
    Counts,
    DocumentWriter,
    Meta,
    Prepared,
    Split,
    write_meta,
    write_tokenizers,
)
from train.data.sources.records import Document, LabelKind, Rejects
from train.data.sources.source import documents, identity, text_size, validation_position
from train.data.sources.source_config import SourceConfig, StdlibSource, SyntheticSource
from train.data.tokenization.tokenise import tokenised
from train.data.tokenization.tokenizer import Tokenizer, TokenizerConfig
from train.data.tokenization.vocabulary import is_trained, make_tokenizer
from train.files import Busy, cache_dir, locked, sync, writing
from train.progress import report, say
from transformer.errors import Config, ConfigError, UserError, require
from transformer.resume import Ask, ByContent, Free

_PARTIAL = ".partial"
_LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What a run reads, and how it is cut into examples."""

    sources: ByContent[tuple[SourceConfig, ...]] = (StdlibSource(),)
    """Sources of training text; examples are drawn from them in proportion to their weights."""
    validation: ByContent[tuple[SourceConfig, ...]] = ()
    """Sources of validation text; empty: documents held out from `sources`."""
    validation_fraction: ByContent[float] = 0.05
    """The fraction of documents that is held out, chosen by document id, or by group if the source has a
    `group_field`; not used if `validation` is given."""
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


def prepare(config: DataConfig, *, progress: bool = True) -> Prepared:
    """The config's data as token arrays: opened if already prepared, else prepared now.

    Two processes may prepare the same data at once: one does it, the other waits. One that is killed leaves nothing
    that a later run takes for whole. Raises `UserError` for a source that cannot be read, for an empty training or
    validation split, and for a disk that is full or read-only.
    """
    name = fingerprint(config)
    folder = cache_dir() / "prepared"
    target = folder / name
    if not target.is_dir():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            waiting = functools.partial(say, f"waiting for another process that is preparing {target}", shown=progress)
            with locked(target.with_suffix(_LOCK), waiting=waiting):
                if not target.is_dir():  # no other process made it while this one waited
                    _remove_abandoned(folder, but=target)
                    _make(target, config, shown=progress)
    return Prepared.load(target)


def fingerprint(config: DataConfig) -> str:
    """32 hexadecimal digits that depend on everything that affects the prepared tokens.

    Raises `UserError` for a source or tokenizer file that is missing.
    """
    content = {
        "format": FORMAT_VERSION,
        "sources": [identity(source) for source in config.sources],
        "validation": [identity(source) for source in config.validation] or config.validation_fraction,
        "tokenizer": _tokenizer_identity(config.tokenizer),
        "target_tokenizer": config.target_tokenizer and _tokenizer_identity(config.target_tokenizer),
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_vocabulary(
    prepared: Prepared,
    vocab_size: int,
    *,
    target_vocab_size: int | None = None,
    inserted: int = 0,
) -> None:
    """Raise a `UserError` unless every token id that a model meets is below its `vocab_size`.

    With `target_vocab_size` the target side of pairs has a vocabulary of its own. `inserted` is the
    largest id of the special tokens that an objective puts into sequences.
    """
    meta = prepared.meta
    one_for_all = meta.largest_target_id if target_vocab_size is None else 0
    own = "model.vocab_size" if target_vocab_size is None else "model.source_vocab_size"
    _check_ids(prepared, own, max(meta.largest_id, inserted, one_for_all), vocab_size, prepared.tokenizer)
    if target_vocab_size is not None:
        target = prepared.target_tokenizer
        _check_ids(prepared, "model.vocab_size", meta.largest_target_id, target_vocab_size, target)


def _check_ids(prepared: Prepared, field: str, largest: int, vocab_size: int, tokenizer: Tokenizer) -> None:
    if largest >= vocab_size:
        raise UserError(
            f"{prepared.directory}: token id {largest} is outside the model's vocabulary of "
            f"{vocab_size}; set {field} to at least {max(tokenizer.vocab_size, largest + 1)}"
        )


def _make(target: Path, config: DataConfig, *, shown: bool) -> None:
    """Prepare into a folder next to `target`, and rename it when all of it is on the disk."""
    partial = target.with_suffix(_PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        tokenizers = _tokenizers(config, shown=shown)
        write_tokenizers(partial, tokenizers)
        write_meta(partial, _write_tokens(partial, config, tokenizers, target.name, shown=shown))
        os.replace(partial, target)
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tokenizers(config: DataConfig, *, shown: bool) -> list[Tokenizer]:
    """The tokenizer, and that of the target side of pairs if it is separate."""
    if config.target_tokenizer is None:
        return [_tokenizer(config.tokenizer, _training_texts(config, config.tokenizer, None), shown=shown)]
    both = (config.tokenizer, config.target_tokenizer)
    return [_tokenizer(one, _training_texts(config, one, side), shown=shown) for side, one in enumerate(both)]


def _tokenizer(config: TokenizerConfig, texts: Iterator[str], *, shown: bool) -> Tokenizer:
    if is_trained(config):
        say(f"training a {config.kind} tokenizer of {config.vocab_size} tokens", shown=shown)
    return make_tokenizer(config, texts)


def _training_texts(config: DataConfig, tokenizer: TokenizerConfig, side: int | None) -> Iterator[str]:
    """Text to train a vocabulary on: training documents only, up to the same number of bytes of each source.

    `side` chooses one side of pairs; None: all sides.
    """
    for source in config.sources:
        left = tokenizer.training_bytes // len(config.sources)
        for document in documents(source):
            if left <= 0:
                break
            if validation_position(document.split_by) >= _held_out(config):
                for text in document.sides if side is None else document.sides[side : side + 1]:
                    left -= len(text.encode())
                    yield text


def _write_tokens(directory: Path, config: DataConfig, tokenizers: list[Tokenizer], name: str, *, shown: bool) -> Meta:
    """Tokenise every source into `directory`, and count."""
    own, other = tokenizers[0], tokenizers[-1]
    labels = None if config.label_kind is None else Labels(config.label_kind)
    run = _Run(directory, (own, other) if config.pairs else (own,), Baseline(), labels, config.workers, shown)
    counts = [run.write(number, source, _held_out(config)) for number, source in enumerate(config.sources)]
    counts += [run.write(number, source, 1.0) for number, source in enumerate(config.validation)]
    train = tuple(split["train"] for split in counts if "train" in split)
    validation = tuple(split["validation"] for split in counts if "validation" in split)
    _check_not_empty(train, validation, _held_out(config))
    gzip_bytes, xz_bytes = run.baseline.finish()
    names, digest = ((), "") if labels is None else labels.write(directory, shown=shown)
    return Meta(
        format_version=FORMAT_VERSION,
        fingerprint=name,
        python=platform.python_version(),
        dtype=own.dtype.str,
        vocab_size=own.vocab_size,
        end_of_text=own.end_of_text,
        train=train,
        validation=validation,
        gzip_bytes=gzip_bytes,
        xz_bytes=xz_bytes,
        target_vocab_size=other.vocab_size if config.pairs else None,
        labels=names,
        labels_digest=digest,
        label_kind=config.label_kind,
    )


@dataclass(frozen=True)
class _Run:
    """What tokenising every source needs."""

    directory: Path
    tokenizers: tuple[Tokenizer, ...]
    """One for each side of a document."""
    baseline: Baseline
    labels: Labels | None
    """None if the documents have none."""
    workers: int
    shown: bool

    def write(self, number: int, source: SourceConfig, held_out: float) -> dict[Split, Counts]:
        """Tokenise source `number`, the fraction `held_out` of its documents for validation; count what was written."""
        rejects = Rejects("stop" if isinstance(source, SyntheticSource) else source.on_error)
        writers: dict[Split, DocumentWriter] = {}
        with contextlib.ExitStack() as stack:
            if held_out < 1:
                writers["train"] = stack.enter_context(self._writer("train", number, source))
            if held_out > 0:
                writers["validation"] = stack.enter_context(self._writer("validation", number, source))
            advance = stack.enter_context(report(f"tokenising {source.title}", text_size(source), shown=self.shown))
            example: Document | None = None
            for document, ids, marks in tokenised(self.tokenizers, documents(source, rejects), self.workers):
                example = example or document
                if len(document.choices) != len(example.choices):
                    raise UserError(
                        f"{document.id}: {len(document.choices)} choices, where {example.id} has {len(example.choices)}; every "
                        "document needs the same number"
                    )
                is_held_out = validation_position(document.split_by) < held_out
                split: Split = "validation" if is_held_out else "train"
                writers[split].add(document, ids)
                if self.labels is not None:
                    self.labels.add(split, number, document, len(ids[0]), marks)
                if is_held_out:
                    self.baseline.add(document.sides[-1].encode())
                advance(sum(len(text.encode()) for text in document.sides))
            counts: dict[Split, Counts] = {split: writer.finish() for split, writer in writers.items()}
        if rejects.count:
            first = next(iter(counts))
            counts[first] = dataclasses.replace(counts[first], skipped=rejects.count)
            say(f"{source.title}: {rejects.count} documents skipped, the first: {rejects.first}", shown=self.shown)
        return counts

    def _writer(self, split: Split, number: int, source: SourceConfig) -> DocumentWriter:
        labelled = self.labels is not None
        return DocumentWriter(self.directory, split, number, source.title, self.tokenizers, labelled=labelled)


def _held_out(config: DataConfig) -> float:
    """The fraction of the documents of `sources` that is used for validation."""
    return 0.0 if config.validation else config.validation_fraction


def _check_not_empty(train: tuple[Counts, ...], validation: tuple[Counts, ...], held_out: float) -> None:
    for source in train:
        if not source.documents:
            skipped = f" ({source.skipped} were left out as unreadable)" if source.skipped else ""
            raise UserError(f"{source.name}: no document with text to train on{skipped}; give the source some text")
    if validation and not any(source.documents for source in validation):
        names = ", ".join(source.name for source in validation)
        hint = (
            f"validation_fraction {held_out} holds out none of these few documents: raise it, cut a long text into documents "
            "with the source's separator (such as a blank line), set it to 0 to train without, or "
            if held_out
            else ""
        )
        raise UserError(f"{names}: no document with text to validate on; {hint}give data.validation a source with text")


def _remove_abandoned(folder: Path, *, but: Path) -> None:
    """Remove the unfinished folders of killed processes: those that no process has locked.

    `but` is the folder whose lock this process holds itself; `_make` recreates it.
    """
    for partial in set(folder.glob(f"*{_PARTIAL}")) - {but.with_suffix(_PARTIAL)}:
        with contextlib.suppress(Busy), locked(partial.with_suffix(_LOCK)):
            shutil.rmtree(partial, ignore_errors=True)


def _tokenizer_identity(config: TokenizerConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    return settings | ({"content": _content_hash(Path(config.path).expanduser())} if config.path else {})


def _content_hash(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "blake2b").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct data.tokenizer.path") from error
