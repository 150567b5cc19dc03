"""What a run is: its config, data, vocabulary and classes. All of it is in its checkpoints, and compared on resume."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.config import RunConfig, difference, parse_stored, to_data
from train.config.changes import DATA, check_changes
from train.data.prepared.content import Content, ids_with_another_meaning
from train.data.prepared.store import Prepared
from train.data.tokenization.tokenizer import Tokenizer
from train.versions import versions
from transformer.errors import UserError, shown
from transformer.paths import path_inside

_TARGET = "target/"
"""Prefix of the files of a separate target tokenizer."""


def tokenizer_files(prepared: Prepared) -> dict[str, str]:
    """The files of the tokenizers as text, by name, so that a checkpoint is enough to use a model."""
    tokenizers = {"": prepared.tokenizer}
    if prepared.own_target_tokenizer is not None:
        tokenizers[_TARGET] = prepared.own_target_tokenizer
    files: dict[str, str] = {}
    for prefix, tokenizer in tokenizers.items():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            files |= {
                f"{prefix}{path.name}": path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())
            }
    return files


def identity_of(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """What a run's checkpoints hold of what it is."""
    return {
        "config": to_data(config),
        "tokenizer": tokenizer_files(prepared),
        "labels": list(prepared.meta.labels),
        "data": describe_data(prepared),
        "versions": versions(),
    }


def load_tokenizers(files: Mapping[str, str], source: str) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers whose files a checkpoint holds: that of the text, and that of the target, which may be the same.

    Raises:
        UserError: a file's name leads out of its folder, or there is no tokenizer.
    """
    if not files:
        raise UserError(
            f"{source}: it has no tokenizer, since none could be read where it was imported from; put the tokenizer's files, "
            "such as tokenizer.json, next to the checkpoint's config.json, and import it again"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = path_inside(Path(folder), name, source=source)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except (OSError, ValueError, TypeError):
                raise UserError(f"{source}: its tokenizer has no file {shown(name)} with a text in it") from None
        tokenizer = Tokenizer.load(Path(folder))
        target = Path(folder, _TARGET)
        return tokenizer, Tokenizer.load(target) if target.is_dir() else tokenizer


def check_same_run(
    meta: Mapping[str, Any], config: RunConfig, prepared: Prepared, allowed: Sequence[str], owner: str
) -> list[str]:
    """Compare a checkpoint with the run that resumes from it.

    Args:
        meta: of the checkpoint.
        allowed: fields of the config that may change, and `data` for other data.
        owner: the checkpoint, for messages.

    Returns:
        What has changed, each with a line to show.

    Raises:
        UserError: it is another run, or a change that has to be allowed; what differs is named.
    """
    if "source" in meta:
        raise UserError(
            f"{owner} holds imported weights ({meta['source']}), not a resumable run; name it in init_from and train in "
            "another folder"
        )
    # A field that an older version lacks takes its default, which is the behaviour of that version.
    stored = parse_stored(meta["config"], f"the config of {owner}")
    changed = list(map(str, check_changes(stored, config, allowed, owner)))
    _check_vocabulary(meta, prepared, owner)
    _check_classes(meta["labels"], prepared.meta.labels, owner)
    before = Content.from_data(meta["data"])
    if others := list(before.differences(Content.of(prepared))):
        if DATA not in allowed:
            raise UserError(
                f"{owner} was trained on other data: {'; '.join(others)}. Restore the data, allow it with --allow-changed "
                f"{DATA}, or start a new run with --run-dir FOLDER"
            )
        changed += [f"data: {line}" for line in others]
    if newer := difference(meta["versions"], versions()):
        changed.append(f"versions: {'; '.join(newer)}; results may differ in their last bits")
    return changed


def _check_vocabulary(meta: Mapping[str, Any], prepared: Prepared, owner: str) -> None:
    before = load_tokenizers(meta["tokenizer"], owner)
    for old, new, field in zip(
        before, (prepared.tokenizer, prepared.target_tokenizer), ("tokenizer", "target_tokenizer"), strict=True
    ):
        if old.fingerprint() != new.fingerprint():
            count = ids_with_another_meaning(old, new)
            how = (
                f"{count:,} of {new.vocab_size:,} token ids have another meaning"
                if count
                else "it splits text elsewhere"
            )
            raise UserError(
                f"{owner} was trained with another data.{field}: {how}. This makes it another run: restore the vocabulary, "
                "or start a new run with --run-dir FOLDER"
            )


def _check_classes(before: Sequence[str], now: Sequence[str], owner: str) -> None:
    if list(before) == list(now):
        return
    new, gone = [name for name in now if name not in before], [name for name in before if name not in now]
    parts = [f"{what} {', '.join(map(repr, names))}" for what, names in (("new", new), ("missing", gone)) if names]
    raise UserError(
        f"{owner} was trained with other classes: {'; '.join(parts) or 'the same in another order'}. This makes it another run: "
        "restore the labels, or start a new run with --run-dir FOLDER and this one as init_from"
    )


def describe_data(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint stores of its data."""
    return dataclasses.asdict(Content.of(prepared))
