"""From sources to prepared data: train the tokenizer, tokenise once, and go on where a process was stopped.

Data is prepared in a folder next to the one that it will be in, which is renamed once all of it is on the disk. Until then the
folder `unfinished` in it has the journal, and what is not kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from train.data.prepared.baseline import LIMIT_BYTES, compressed_sizes
from train.data.prepared.config import DataConfig
from train.data.prepared.growing_file import digest_of
from train.data.prepared.held_out import HeldOut
from train.data.prepared.journal import Journal, Work
from train.data.prepared.label_arrays import Labels
from train.data.prepared.store import (
    FORMAT_VERSION,
    META_FILE,
    Counts,
    Meta,
    Split,
    read_tokenizers,
    write_meta,
    write_tokenizers,
)
from train.data.prepared.write_documents import complete
from train.data.prepared.write_source import PART_BYTES, SourceWriter, Stage, UnusableParts, held_out_path
from train.data.sources.records import MARKED
from train.data.sources.source import documents, text_size
from train.data.tokenization.chat import for_dialogues
from train.data.tokenization.tokenizer import Tokenizer, TokenizerConfig
from train.data.tokenization.vocabulary import is_trained, make_tokenizer
from train.files import Busy, locked, sync
from train.progress import say
from transformer.errors import UserError

LOCK = ".lock"
_PARTIAL = ".partial"
_UNFINISHED = "unfinished"
_JOURNAL = "journal.jsonl"
_KEPT_SECONDS = 7 * 24 * 3600
"""How long unfinished data that nobody continues is kept."""


def make(target: Path, config: DataConfig, work: Work, *, is_unchanged: Callable[[], bool], shown: bool) -> None:
    """Prepare a config's data in the folder `target`, which this process has locked, using a stopped process's finished parts.

    Args:
        is_unchanged: whether the sources are those that `work` is about.

    Raises:
        UserError: a source cannot be read, or changed while it was read, or a split is empty.
        OSError: a file cannot be written.
    """
    partial = target.with_suffix(_PARTIAL)
    if not _is_complete(partial):
        try:
            _write(partial, target, config, work, shown=shown)
        except UnusableParts as reason:
            say(f"{target}: {reason}; all parts are made again", shown=shown)
            shutil.rmtree(partial)
            _write(partial, target, config, work, shown=shown)
    if not is_unchanged():
        shutil.rmtree(partial, ignore_errors=True)
        titles = ", ".join(dict.fromkeys(source.title for source in (*config.sources, *config.validation)))
        raise UserError(f"{titles}: a file changed while it was read; run the same command again once no file changes")
    shutil.rmtree(partial / _UNFINISHED, ignore_errors=True)
    os.replace(partial, target)
    sync(target.parent)


def remove_abandoned(folder: Path, *, but: Path, settings: str) -> None:
    """Remove unfinished data that nobody will continue: of the same `settings` with other files, or of no use for a week.

    What another process has locked stays, and `but`, whose lock this process holds itself.
    """
    for partial in set(folder.glob(f"*{_PARTIAL}")) - {but.with_suffix(_PARTIAL)}:
        with contextlib.suppress(Busy, FileNotFoundError), locked(partial.with_suffix(LOCK)):
            journal = _journal_path(partial)
            found = Journal.read(journal)
            if (
                found is None
                or found.work.settings == settings
                or time.time() - journal.stat().st_mtime > _KEPT_SECONDS
            ):
                shutil.rmtree(partial, ignore_errors=True)


def _journal_path(partial: Path) -> Path:
    return partial / _UNFINISHED / _JOURNAL


def _is_complete(partial: Path) -> bool:
    """Whether only the renaming is left to do: the journal is removed after everything else is on the disk."""
    return (partial / META_FILE).exists() and not _journal_path(partial).exists()


def _write(partial: Path, target: Path, config: DataConfig, work: Work, *, shown: bool) -> None:
    """Write all of the data into `partial`, without what is finished there already."""
    journal = Journal.read(_journal_path(partial))
    if journal is None or journal.work != work:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        journal = Journal.create(_journal_path(partial), work)
    else:
        journal.repair()
    stages = _stages(config)
    if journal.parts:
        done, size = len(journal.parts), sum(part.text_bytes for part in journal.parts)
        what = "part is" if done == 1 else "parts are"
        say(f"continuing {target}: {done}{_of_all(stages, done)} {what} done, {size / 1e6:.1f} MB", shown=shown)
    try:
        tokenizers = _tokenizers(partial, config, journal, shown=shown)
        labels = None
        if config.label_kind is not None:
            labels = Labels(config.label_kind, [part.labels for part in journal.parts if part.labels is not None])
        sides = (tokenizers[0], tokenizers[-1]) if config.pairs else (tokenizers[0],)
        writer = SourceWriter(
            directory=partial, stored=partial / _UNFINISHED, journal=journal, tokenizers=sides, labels=labels,
            workers=config.workers, shown=shown,
        )  # fmt: skip
        for stage in stages:
            writer.write(stage)
    except UnusableParts:
        raise
    except BaseException:
        _keep_or_remove(partial, journal, config, shown=shown)
        raise
    try:
        meta = _finish(partial, config, work, journal, stages, tokenizers, labels, shown=shown)
    except UserError:
        # Nothing to continue: the data itself is refused.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    write_meta(partial, meta)
    _journal_path(partial).unlink()


def _keep_or_remove(partial: Path, journal: Journal, config: DataConfig, *, shown: bool) -> None:
    """Remove unfinished data, unless there is work in it that the next process can use."""
    trained = bool(journal.tokenizers) and any(
        is_trained(one) for one in (config.tokenizer, config.target_tokenizer) if one is not None
    )
    if not journal.parts and not trained:
        shutil.rmtree(partial, ignore_errors=True)
        return
    parts = "1 part" if len(journal.parts) == 1 else f"{len(journal.parts)} parts"
    what = parts if journal.parts else "the tokenizer"
    say(f"{what} finished: as long as no source changes, the same command continues from there", shown=shown)


def _stages(config: DataConfig) -> list[Stage]:
    held_out = _held_out(config)
    stages = [Stage(number, number, source, held_out) for number, source in enumerate(config.sources)]
    first = len(stages)
    return stages + [Stage(first + number, number, source, 1.0) for number, source in enumerate(config.validation)]


def _of_all(stages: Sequence[Stage], done: int) -> str:
    """How many parts there will be, if the sources show it before they are read."""
    sizes = [text_size(stage.source) for stage in stages]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return ""
    return f" of {max(done, sum(-(-size // PART_BYTES) for size in known))}"


def _tokenizers(partial: Path, config: DataConfig, journal: Journal, *, shown: bool) -> list[Tokenizer]:
    """The tokenizer, and that of the target side of pairs if it is separate; those of a stopped process if they are whole."""
    if (
        not journal.tokenizers
        or _digests(partial, [partial / name for name in journal.tokenizers]) != journal.tokenizers
    ):
        if journal.parts:
            # Another training could give other ids.
            raise UnusableParts("the finished tokenizer is damaged")
        made = _make_tokenizers(config, shown=shown)
        journal.add_tokenizers(_digests(partial, write_tokenizers(partial, made)))
    # As a continuing process reads them: scores of a vocabulary are stored with fewer digits.
    return read_tokenizers(partial)


def _digests(partial: Path, paths: Sequence[Path]) -> dict[str, str]:
    """The digests of those of the files that exist, by their paths below `partial`."""
    return {path.relative_to(partial).as_posix(): digest_of(path, 0).hexdigest() for path in paths if path.is_file()}


def _make_tokenizers(config: DataConfig, *, shown: bool) -> list[Tokenizer]:
    if config.label_kind in MARKED:
        made = _tokenizer(config.tokenizer, _training_texts(config, config.tokenizer, None), shown=shown)
        if not made.conventions.chat_templates:
            say("the vocabulary has no chat template: dialogues are written in the built-in one (ChatML)", shown=shown)
        return [for_dialogues(made)]
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
        left, held_out = tokenizer.training_bytes // len(config.sources), HeldOut(source, _held_out(config))
        for document in documents(source):
            if left <= 0:
                break
            if not held_out.holds_out(document):
                for text in document.sides if side is None else document.sides[side : side + 1]:
                    left -= len(text.encode())
                    yield text


def _finish(
    partial: Path, config: DataConfig, work: Work, journal: Journal, stages: Sequence[Stage], tokenizers: list[Tokenizer],
    labels: Labels | None, *, shown: bool,
) -> Meta:  # fmt: skip
    """Complete the files, whose documents are all written, and count what is in them."""
    own, other = tokenizers[0], tokenizers[-1]
    sides = (own, other) if config.pairs else (own,)
    counts: dict[Split, list[Counts]] = {"train": [], "validation": []}
    for stage in stages:
        parts = journal.of_stage(stage.number)
        # Documents left out are counted once, in the first of the source's splits.
        skipped = parts[-1].rejected + sum(part.refused for part in parts)
        first = parts[-1].first_rejected or next((part.first_refused for part in parts if part.refused), "")
        if skipped:
            say(f"{stage.source.title}: {skipped} documents skipped, the first: {first}", shown=shown)
        for split in stage.splits:
            sums = [part.counts[split] for part in parts]
            one = complete(partial, split, stage.index, stage.source.title, sides, sums)
            counts[split].append(dataclasses.replace(one, skipped=skipped))
            skipped = 0
    train, validation = tuple(counts["train"]), tuple(counts["validation"])
    _check_not_empty(train, validation, _held_out(config))
    held_out = sum(part.held_out_bytes for part in journal.parts)
    gzip_bytes, xz_bytes = None, None
    if 0 < held_out <= LIMIT_BYTES:
        texts = [held_out_path(partial / _UNFINISHED, stage.number) for stage in stages]
        gzip_bytes, xz_bytes = compressed_sizes(texts)
    names, digest = ((), "") if labels is None else labels.write(partial, partial / _UNFINISHED, shown=shown)
    return Meta(
        format_version=FORMAT_VERSION,
        fingerprint=work.fingerprint,
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
