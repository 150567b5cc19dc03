"""The run that the weights of a config begin from: one that exists, or a Hugging Face checkpoint, which is imported once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from train.checkpoints.stored import FOLDER
from train.config import RunConfig, parse_stored, to_data
from train.config.complete import Base
from train.config.yaml_files import read_yaml
from train.data.tokenization.tokenizer import Tokenizer
from train.data.tokenization.vocabulary import as_setting
from train.files import locked, writing
from train.huggingface.import_checkpoint import files_digest, record_of
from train.huggingface.source import WHEEL, name_of
from train.progress import say
from train.remote import is_remote, local_path, local_run
from transformer.errors import UserError, shown
from transformer.huggingface.checkpoint import published_head
from transformer.paths import expanded

_CONFIG = "config.yaml"
_RUNS = "runs"
_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def find_base(given: str, data: dict[str, Any]) -> Base | None:
    """What a config takes from the run, or the checkpoint, that its `init_from` names.

    A run that has begun needs its own folder alone: model and tokenizer are those that it began with.

    Args:
        data: the config's plain data.

    Returns:
        None if there is no such run.

    Raises:
        UserError: a checkpoint that cannot be imported, or a run that cannot be read.
    """
    own = _own_folder(data)
    if own is not None and (own / FOLDER).is_dir() and (config := _config_of(own)) is not None:
        return _base(config.init_from if _is_import(given, config.init_from) else given, own, config)
    run = run_of(given)
    if run is None:
        return None
    folder = local_run(run)
    config = _config_of(folder)
    return None if config is None else _base(run, folder, config)


def run_of(given: str) -> str | None:
    """The folder or address of the run that `given` names; a Hugging Face checkpoint is imported to runs/NAME. None if there is
    neither.

    Raises:
        UserError: it cannot be imported, or its place is taken.
    """
    if is_remote(given):
        return given
    folder = local_path(given)
    if (folder / _CONFIG).is_file() or (folder / FOLDER).is_dir():
        return given
    on_hub = not folder.exists() and Path(given).parts[:1] != (_RUNS,) and _ON_HUB.fullmatch(given)
    if given.startswith(WHEEL) or (folder / "config.json").is_file() or on_hub:
        return str(_imported(given))
    return None


def _is_import(given: str, before: str | None) -> bool:
    """Whether a run that has begun from `before` did so since `given` was imported to it."""
    return before is not None and before != given and Path(before) == Path(_RUNS, name_of(given))


def _imported(source: str) -> Path:
    directory = Path(_RUNS, name_of(source))
    with writing(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"waiting for another process that imports {source}"
    with locked(directory.with_name(f".{directory.name}.lock"), waiting=lambda: say(waiting, shown=True)):
        if not directory.exists():
            _import(source, directory)
            return directory
        record = record_of(directory)
        here = expanded(source)
        if record.get("source") != source or (here.is_dir() and record.get("files") != files_digest(here)):
            raise UserError(
                f"init_from: {source} would be imported to {directory}, which holds something else; import it to another folder, "
                f"manyheads import {source} --run-dir FOLDER, and name that folder in init_from"
            )
    return directory


def _import(source: str, directory: Path) -> None:
    # A process of its own: here JAX has yet to be told about its devices and the other processes.
    command = [sys.executable, "-P", "-m", "train.commands.cli", "import", source, "--run-dir", str(directory)]
    done = subprocess.run([*command, "--platform", "cpu"], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        *_, last = done.stderr.strip().splitlines() or [f"the import ended with status {done.returncode}"]
        raise UserError(f"init_from: {last.removeprefix('manyheads: ')}")


def _own_folder(data: dict[str, Any]) -> Path | None:
    directory, name = data.get("run_dir"), data.get("name")
    if isinstance(directory, str):
        return local_path(directory)
    return Path(_RUNS, name) if isinstance(name, str) else None


def _config_of(folder: Path) -> RunConfig | None:
    path = folder / _CONFIG
    return parse_stored(read_yaml(path), str(path)) if path.is_file() else None


def _base(run: str | None, folder: Path, config: RunConfig) -> Base:
    tokenizer, target = folder / "tokenizer", folder / "tokenizer" / "target"
    objective = to_data(config.objective)
    published = record_of(folder).get("config")
    return Base(
        folder=str(run), model=to_data(config.model), objective=None if objective["kind"] == "none" else objective,
        tokenizer=_setting(tokenizer), target_tokenizer=_setting(target),
        head=lambda kind: None if published is None else _head(published, kind, folder),
    )  # fmt: skip


def _setting(folder: Path) -> dict[str, Any] | None:
    return as_setting(Tokenizer.load(folder), folder) if folder.is_dir() else None


def _head(published: dict[str, Any], kind: str, folder: Path) -> dict[str, Any] | None:
    try:
        head = published_head(published, kind)
    except UserError as error:
        raise UserError(f"{folder}: head {shown(kind)}: {error}") from None
    return None if head is None else {name: one for name, one in to_data(head).items() if name != "num_labels"}
