r"""Text files that users bring: decompressed by their suffix, decoded by their byte order mark, read by lines.

A line ends at \n, \r\n or \r and nowhere else: other characters that Unicode calls line ends are part of a text.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, TextIO, cast

from transformer.errors import UserError
from transformer.paths import check_file

DEFAULT_ENCODING = "utf-8"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_BYTE_ORDER_MARKS = (
    # UTF-32's begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_LITTLE_ENDIAN = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}
"""What an encoding whose name leaves the order of bytes to the mark is without one."""
_BEGINNING = 8192
"""Bytes of a file in which a zero shows that it is not text."""
_KEEP = "train.text_files.keep"
"""The name of the error handler that keeps bytes which are not valid."""
_KEPT = 0xDC00
"""Byte b is kept as character _KEPT + b, half of a surrogate pair: no valid text has one."""
_MOST_NAMED = 4
"""The most bytes that a message names."""


def open_text(
    path: Path, encoding: str = DEFAULT_ENCODING, *, newline: Literal[""] | None = "", plain: bool = False
) -> TextIO:
    r"""Open a file as text without its byte order mark. Bytes that are not valid are kept, and `invalid_bytes` finds them.

    Args:
        encoding: of a file without a byte order mark.
        newline: `""` leaves line ends as they are; None makes each of them \n. Lines end at the same places in both.
        plain: refuse a file with zero bytes at its beginning.

    Raises:
        UserError: an encoding that is not known, or zero bytes.
        OSError: the file cannot be opened.
    """
    if not is_encoding(encoding):
        raise UserError(f"encoding: got {encoding!r}; allowed: the name of a text encoding, such as utf-8 or cp1252")
    stream = open_bytes(path)
    try:
        beginning = stream.read(_BEGINNING)
        marks = ((mark, name) for mark, name in _BYTE_ORDER_MARKS if beginning.startswith(mark))
        mark, found = next(marks, (b"", _LITTLE_ENDIAN.get(codecs.lookup(encoding).name, encoding)))
        beginning = beginning[len(mark) :]
        if plain and "\0" in beginning.decode(found, "replace"):
            raise UserError(
                f"{path}: not a text file (it has zero bytes); set format to what it is, or format: text, or encoding if it is "
                "UTF-16 without a byte order mark"
            )
    except BaseException:
        stream.close()
        raise
    # What was read is put back: a pipe cannot be read twice.
    rest = io.BufferedReader(cast("Any", _Prepended(beginning, stream)), buffer_size=1 << 16)
    return io.TextIOWrapper(rest, found, _KEEP, newline)


def read_lines(path: Path, encoding: str = DEFAULT_ENCODING, *, name: str = "", plain: bool = False) -> Iterator[str]:
    """The lines of a file without their ends, blank ones too.

    Args:
        encoding, plain: as in `open_text`.
        name: of the file in messages; empty: its path.

    Raises:
        UserError: a file that cannot be read, or bytes that are not valid: it names line, column and bytes.
    """
    check_file(path)
    with reading(path, name), open_text(path, encoding, newline=None, plain=plain) as stream:
        for number, line in enumerate(stream, start=1):
            if fault := invalid_bytes(line):
                _, column, what = fault
                raise UserError(f"{name or path}:{number}: {not_valid(stream, column, what)}")
            yield line.removesuffix("\n")


def read_text(path: Path) -> str:
    r"""A whole file as text, with \n for line ends. Raises `OSError`, and `ValueError` for bytes that are not valid."""
    with open_text(path, newline=None) as stream:
        text = stream.read()
        if fault := invalid_bytes(text):
            line, column, what = fault
            raise ValueError(f"line {line} is not valid {encoding_name(stream)} ({what} at column {column})")
    return text


def is_encoding(name: str) -> bool:
    """Whether text can be decoded by an encoding of this name."""
    try:
        # An encoding whose faults cannot be found is refused too.
        b"a".decode(name, _KEEP)
    except (LookupError, ValueError):
        return False
    return True


def encoding_name(stream: TextIO) -> str:
    """The name of a stream's encoding in messages."""
    return codecs.lookup(stream.encoding).name.upper()


def not_valid(stream: TextIO, column: int, what: str) -> str:
    """The message about bytes that are not valid."""
    return f"not valid {encoding_name(stream)} ({what} at column {column}); set encoding if it has another"


def invalid_bytes(text: str) -> tuple[int, int, str] | None:
    """Line and column, from 1, of the first bytes that were not valid when `text` was read, and the bytes; None if all were."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[: error.start]
        line = unix_lines(before)
        kept = [ord(letter) - _KEPT for letter in text[error.start : error.start + _MOST_NAMED]]
        found = list(itertools.takewhile(lambda byte: 0 <= byte < 256, kept))
        what = " ".join(f"0x{byte:02x}" for byte in found) or f"half of a pair, U+{ord(text[error.start]):04X}"
        what = f"byte{'s' if len(found) > 1 else ''} {what}" if found else what
        return line.count("\n") + 1, len(line) - line.rfind("\n"), what
    return None


def unix_lines(text: str) -> str:
    r"""The text with \n for each line end."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_compressed(path: Path) -> bool:
    """Whether the file's size says nothing about the size of its text."""
    return path.suffix.lower() in COMPRESSED


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed by its suffix: .gz, .bz2, .xz, .zst. Raises `OSError`."""
    if "\0" in str(path):
        raise OSError("a name with a zero byte")
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(cast("Any", pa.input_stream(str(path), compression="zstd")))
    return path.open("rb")


@contextlib.contextmanager
def reading(path: Path, name: str = "") -> Iterator[None]:
    """Turns errors of the disk, and of damaged compressed files, into a `UserError`; `name` is the file's in messages."""
    name = name or str(path)
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{name}: damaged or cut short ({error}); fetch or compress it again") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error}); check path and disk") from error


class _Prepended(io.RawIOBase):
    """A stream after bytes that were read from it."""

    def __init__(self, beginning: bytes, rest: IO[bytes]) -> None:
        self._beginning, self._rest = beginning, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._beginning[: len(buffer)] or self._rest.read(len(buffer))
        self._beginning = self._beginning[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._rest.close()
        super().close()


def _keep(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(_KEPT + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_KEEP, _keep)
