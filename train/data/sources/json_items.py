"""The items of a JSON file that is one list, read one after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from train.data.sources.records import kind_of
from transformer.errors import first_line, shown

_CHUNK = 1 << 20
_REST = "; the rest of the file is not read"
_NEAR = 64
"""An error so near to the end of what was read may be that of a value which goes on."""
_SPACE = re.compile(r"[ \t\r\n]*")


def json_items(stream: TextIO) -> Iterator[tuple[int, dict[str, Any] | str]] | None:
    """The line and the object of each item, or what is wrong with it; None if the file is not a list."""
    items = _Items(stream)
    return items.read() if items.next_letter() == "[" else None


class _Items:
    """What has been read of the stream and not been used, from `place` on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text, self._place, self.line = stream, "", 0, 1
        self._decoder = json.JSONDecoder()

    def read(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """The items; what cannot be read ends them."""
        self._use(1)
        while (letter := self.next_letter()) != "]":
            line = self.line
            try:
                value, stop = self._value()
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                found = shown(self._text[self._place : self._place + 80])
                what = f"malformed JSON ({reason}): {found}" if letter else "the list does not end"
                yield line, f"{what}{_REST}"
                return
            self._use(stop - self._place)
            yield line, value if isinstance(value, dict) else f"expected a JSON object, got {kind_of(value)}"
            if (letter := self.next_letter()) == ",":
                self._use(1)
            elif letter != "]":
                found = shown(self._text[self._place : self._place + 80]) if letter else "the end of the file"
                yield self.line, f"malformed JSON: expected a comma or the end of the list, got {found}{_REST}"
                return
        self._use(1)
        if self.next_letter():
            yield (
                self.line,
                f"malformed JSON: after the list there is {shown(self._text[self._place : self._place + 80])}",
            )

    def next_letter(self) -> str:
        """The next one that is not white space, which is passed over; empty at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._place)
            assert found is not None
            self._use(found.end() - self._place)
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._fill():
                return ""

    def _value(self) -> tuple[Any, int]:
        while True:
            try:
                return self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                # It may go on in what has not been read.
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR
                if not is_cut or not self._fill():
                    raise

    def _use(self, count: int) -> None:
        self.line += self._text.count("\n", self._place, self._place + count)
        self._place += count

    def _fill(self) -> bool:
        chunk = self._stream.read(_CHUNK)
        self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)
