"""The formats of files, as their names tell."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from train.text_files import COMPRESSED
from transformer.errors import UserError

Format = Literal["text", "python", "json", "jsonl", "csv", "parquet", "sqlite", "conll"]

_FORMATS: dict[str, Format] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    **dict.fromkeys((".csv", ".tsv", ".tab"), "csv"),
    ".parquet": "parquet",
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "sqlite"),
    **dict.fromkeys((".conll", ".conllu"), "conll"),
}
_NOT_TEXT = {
    **dict.fromkeys(
        (".tar", ".tgz", ".tbz2", ".txz", ".zip"),
        "unpack it; a source reads the files in it",
    ),
    **dict.fromkeys((".7z", ".rar"), "unpack it"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx"), "write it as .parquet, .csv or .jsonl"),
    **dict.fromkeys(
        (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npy", ".npz", ".pkl", ".pickle", ".h5"), "it holds arrays"
    ),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub"), "convert it to plain text"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".wav", ".mp4"), "it holds no text"),
    **dict.fromkeys(
        (".lz4", ".lzma", ".z", ".br", ".sz"), "decompress it, or compress it with gzip, bzip2, xz or zstd"
    ),
}
"""Suffixes of files that are not plain text, with what to do. Whatever they are, `format: text` reads them as text."""


def format_of(path: Path) -> Format:
    """The format that a file's name implies: `pages.jsonl.gz` is `jsonl`, and an unknown one is `text`."""
    return _FORMATS.get(suffix_of(path), "text")


def check_is_text(path: Path) -> None:
    """Raise a `UserError` for a file whose name says that it is not plain text."""
    suffix = suffix_of(path)
    if advice := _NOT_TEXT.get(suffix):
        raise UserError(f"{path}: {suffix} files are not read as text: {advice}, or set format: text")


def suffix_of(path: Path) -> str:
    """The suffix below that of a compressed file, in small letters; empty if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
