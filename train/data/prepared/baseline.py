"""Compression of the validation text by general compressors: a baseline for language models."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIMIT_BYTES = 64 << 20
"""The most text that is compressed, to save time."""
_GZIP_FORMAT = 31
_CHUNK_BYTES = 1 << 20


def compressed_sizes(files: Iterable[Path]) -> tuple[int, int]:
    """The sizes in bytes after `gzip -9` and after `xz` of the files' joined content. Raises `OSError`."""
    compressors: tuple[Any, Any] = (zlib.compressobj(9, wbits=_GZIP_FORMAT), lzma.LZMACompressor())
    sizes = [0, 0]
    for path in files:
        with path.open("rb") as stream:
            while data := stream.read(_CHUNK_BYTES):
                for number, compressor in enumerate(compressors):
                    sizes[number] += len(compressor.compress(data))
    return sizes[0] + len(compressors[0].flush()), sizes[1] + len(compressors[1].flush())
