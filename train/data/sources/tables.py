"""Tables as text (CSV, TSV): their delimiter and quotation marks, which are found if they are not given, and their rows."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from train.data.sources.records import Fields
from transformer.errors import UserError, shown

if TYPE_CHECKING:
    from _csv import Reader

_DELIMITERS = (",", ";", "\t", "|")
_BEGINNING = 1 << 20
"""Characters of a table that decide whether quotation marks enclose fields."""


@dataclass(frozen=True, kw_only=True)
class TableFormat:
    """How a table is written."""

    delimiter: str = ""
    """Between fields; empty: the first of the usual ones with which the header has the fields that are read."""
    quotes: bool | None = None
    """Whether quotation marks enclose fields, which may then hold delimiters and line ends. None: they do; between tabs only
    if the beginning of the table can be read so: GLUE's files have quotation marks as part of the text."""
    columns: tuple[str, ...] = ()
    """The names of the columns of a table without a header; empty: the first row has them."""

    def rows(self, lines: Iterable[str], fields: Fields, place: str) -> Iterator[tuple[int, list[str] | str]]:
        """The names of the columns, then each row that is not blank, with the number of its first line.

        In the place of a row that is not well-formed, the reason. Rows have as many fields as there are columns.

        Args:
            lines: with their ends.
            fields: what is read of a row.
            place: of the header, in messages.

        Raises:
            UserError: a malformed header, or one that names a field to be read twice.
        """
        csv.field_size_limit(sys.maxsize)  # a document may be longer than the module's limit of 128 KiB
        lines = iter(lines)
        beginning = list(_beginning(lines))
        delimiter = self.delimiter
        if not delimiter and self.columns:
            delimiter = _delimiter_of_columns(beginning, len(self.columns), place)
        delimiter = delimiter or _delimiter(beginning, fields)
        quotes = self.quotes
        if quotes is None and delimiter == "\t":
            following = next(lines, None)
            is_whole = following is None
            lines = lines if following is None else itertools.chain([following], lines)
            enclosed, plain = (_rows_that_fit(beginning, delimiter, quoted, is_whole) for quoted in (True, False))
            # Where both readings fit, quotation marks that would join lines are more likely part of the text, unless those within
            # a field are doubled.
            doubled = any('""' in line for line in beginning)
            quotes = plain is None or (enclosed is not None and (enclosed >= plain or doubled))
        quotes = quotes is not False
        advice = "; set quotes: false if quotation marks are part of the text" if quotes and delimiter == "\t" else ""
        given = _Lines(itertools.chain(beginning, lines))
        reader = _reader(given, delimiter, quotes)
        header: list[str] | None = None
        number = 1
        if self.columns:
            header = list(self.columns)
            yield 1, header
        while True:
            number += len(given.taken)
            given.taken.clear()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if header is None:
                    raise UserError(f"{place}: malformed CSV ({error}); fix its header") from None
                yield number, f"malformed CSV ({error}){advice}"
                # A quotation mark that nothing closes took the rows after it: they are read again.
                given = _Lines(itertools.chain(given.taken[1:], given.rest))
                reader = _reader(given, delimiter, quotes)
                number += 1
                continue
            if not row:
                continue
            if header is None:
                header = row
                _check_header(header, fields, place)
            if len(row) != len(header):
                whose = f"header's {len(header)}"
                if self.columns:
                    whose = f"{len(header)} of the setting columns (the delimiter is {delimiter!r})"
                fault = f"{len(row)} field{'s' * (len(row) != 1)}, not the {whose}: {shown(row)}"
                yield number, f"malformed CSV ({fault}){advice}"
            else:
                yield number, row


class _Lines:
    """Lines, of which those that were taken last are kept."""

    def __init__(self, rest: Iterator[str]) -> None:
        self.rest = rest
        self.taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.rest)
        self.taken.append(line)
        return line


def _beginning(lines: Iterator[str]) -> Iterator[str]:
    size = 0
    for line in lines:
        yield line
        size += len(line)
        if size >= _BEGINNING:
            return


def _reader(lines: Iterable[str], delimiter: str, quotes: bool) -> Reader:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    # Strict: a quotation mark that nothing closes would take the rest of the file into its field.
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)


def _delimiter_of_columns(lines: Sequence[str], columns: int, place: str) -> str:
    """The delimiter with which rows without a header have this number of columns; empty if there is none.

    Raises:
        UserError: there are several.
    """
    found = [
        delimiter
        for delimiter in _DELIMITERS
        if any(_rows_that_fit(lines, delimiter, quotes, is_whole=False, width=columns) for quotes in (True, False))
    ]
    if len(found) > 1:
        raise UserError(
            f"{place}: rows have {columns} columns with each of the delimiters {' '.join(map(repr, found))}; set delimiter to one"
        )
    return found[0] if found else ""


def _delimiter(lines: Sequence[str], fields: Fields) -> str:
    """The first delimiter with which the header has the fields; if none has, the one that gives most columns."""
    headers: dict[str, list[str]] = {}
    for delimiter in _DELIMITERS:
        try:
            headers[delimiter] = next(filter(None, _reader(lines, delimiter, True)), [])
        except csv.Error:
            headers[delimiter] = []
        try:
            fields.columns(headers[delimiter])
        except KeyError:
            continue
        return delimiter
    return max(headers, key=lambda delimiter: len(headers[delimiter]))


def _rows_that_fit(
    lines: Sequence[str], delimiter: str, quotes: bool, is_whole: bool, width: int = 0
) -> int | None:  # fmt: skip
    """How many rows there are, if all are well-formed; else None. If there are more lines than these, the last row may be cut.

    Args:
        width: number of fields of a row; 0: that of the first one.
    """
    reader = _reader(lines, delimiter, quotes)
    count = 0
    try:
        for row in reader:
            width = width or len(row)
            if row and len(row) != width:
                return None
            count += 1
    except csv.Error:
        return None if is_whole or reader.line_num != len(lines) else count + 1
    return count


def _check_header(header: Sequence[str], fields: Fields, place: str) -> None:
    twice = [field for _, field in fields.by_setting() if header.count(field) > 1]
    if twice:
        raise UserError(f"{place}: two columns have the name {twice[0]!r}; rename one")
