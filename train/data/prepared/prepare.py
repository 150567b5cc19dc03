"""Prepared data of a config: what it depends on, and where it is kept, under its fingerprint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.data.prepared.config import DataConfig
from train.data.prepared.journal import Work
from train.data.prepared.make import LOCK, make, remove_abandoned
from train.data.prepared.store import FORMAT_VERSION, Prepared
from train.data.sources.source import identity
from train.data.sources.source_config import SourceConfig
from train.data.tokenization.conventions import saved_about
from train.data.tokenization.tokenizer import Tokenizer, TokenizerConfig
from train.files import cache_dir, locked, writing
from train.progress import say
from transformer.errors import UserError
from transformer.paths import check_file, expanded


def prepare(config: DataConfig, *, progress: bool = True) -> Prepared:
    """The config's data as token arrays: opened if already prepared, else prepared now.

    Two processes may prepare the same data at once: one does it, the other waits. One that is stopped leaves nothing
    that a later run takes for whole; the next one continues from the parts that it finished. Raises `UserError` for a source
    that cannot be read, for an empty training or validation split, and for a disk that is full or read-only.
    """
    name = fingerprint(config)
    folder = cache_dir() / "prepared"
    target = folder / name
    if not target.is_dir():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            waiting = functools.partial(say, f"waiting for another process that is preparing {target}", shown=progress)
            with locked(target.with_suffix(LOCK), waiting=waiting):
                if not target.is_dir():  # no other process made it while this one waited
                    remove_abandoned(folder, but=target, settings=settings_digest(config))
                    work = Work(fingerprint=name, settings=settings_digest(config))
                    make(target, config, work, is_unchanged=lambda: fingerprint(config) == name, shown=progress)
    return Prepared.load(target)


def prepared_before(config: DataConfig) -> Prepared | None:
    """The config's data if it is prepared already. Raises `UserError` if it is damaged."""
    try:
        target = cache_dir() / "prepared" / fingerprint(config)
    except UserError:  # a source that is not there yet
        return None
    return Prepared.load(target) if target.is_dir() else None


def fingerprint(config: DataConfig) -> str:
    """32 hexadecimal digits that depend on everything that affects the prepared tokens.

    Raises `UserError` for a source or tokenizer file that is missing.
    """
    return _digest(config, identity, _tokenizer_identity)


def settings_digest(config: DataConfig) -> str:
    """32 hexadecimal digits that depend on the settings, and the working folder, which paths may start from: a corrected file
    changes the fingerprint, but not this."""
    return _digest(config, lambda source: {"cwd": str(Path.cwd()), **dataclasses.asdict(source)}, dataclasses.asdict)


def _digest(
    config: DataConfig,
    of_source: Callable[[SourceConfig], dict[str, Any]],
    of_tokenizer: Callable[[TokenizerConfig], dict[str, Any]],
) -> str:
    content = {
        "format": FORMAT_VERSION,
        "sources": [of_source(source) for source in config.sources],
        "validation": [of_source(source) for source in config.validation] or config.validation_fraction,
        "tokenizer": of_tokenizer(config.tokenizer),
        "target_tokenizer": config.target_tokenizer and of_tokenizer(config.target_tokenizer),
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


def _tokenizer_identity(config: TokenizerConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    if config.chat_template:
        settings["chat_template"] = _content_hash(expanded(config.chat_template), "chat_template")
    if not config.path:
        return settings
    path = expanded(config.path)
    # Two imports may have the same vocabulary, and put other tokens around a text.
    _, conventions = saved_about(path)
    kept = conventions.to_data()
    return settings | {"content": _content_hash(path)} | ({"conventions": kept} if kept else {})


def _content_hash(path: Path, field: str = "path") -> str:
    check_file(path)
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "blake2b").hexdigest()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); correct data.tokenizer.{field}") from error
