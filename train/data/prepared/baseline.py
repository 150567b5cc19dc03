"""Compression of the validation text by general compressors: a baseline for language models."""

from __future__ import annotations

import lzma
import zlib

_LIMIT_BYTES = 64 << 20
_GZIP_FORMAT = 31


class Baseline:
    """Sizes after `gzip -9` and `xz` of texts joined as they come, without keeping them."""

    def __init__(self) -> None:
        self._left = _LIMIT_BYTES
        self._gzip = zlib.compressobj(9, wbits=_GZIP_FORMAT)
        self._xz = lzma.LZMACompressor()
        self._gzip_bytes = self._xz_bytes = 0

    def add(self, text: bytes) -> None:
        """Compress one more text. It gives up after 64 MiB in all, to save time."""
        self._left -= len(text)
        if self._left >= 0:
            self._gzip_bytes += len(self._gzip.compress(text))
            self._xz_bytes += len(self._xz.compress(text))

    def finish(self) -> tuple[int | None, int | None]:
        """The sizes in bytes after `gzip -9` and after `xz`, None where there was too much text or none."""
        if self._left < 0 or self._left == _LIMIT_BYTES:
            return None, None
        return self._gzip_bytes + len(self._gzip.flush()), self._xz_bytes + len(self._xz.flush())
