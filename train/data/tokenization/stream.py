"""Text from token ids as they are generated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from train.data.tokenization.framing import added_text
from train.data.tokenization.tokenizer import SubwordTokenizer, Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACEMENT = "\ufffd"


class StreamDecoder:
    """The text that goes on from a prompt, in pieces. All that is pushed and flushed, joined, is `Tokenizer.continuation`.

    What `push` returns is text that no later token can change: it ends before an unfinished character, and before a run of
    single bytes, which decode together.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = [int(token) for token in prompt]
        self._before = tokenizer.decode(self._ids)
        self._shown = 0

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is certain after `tokens`; often empty in the middle of a character."""
        self._ids += map(int, tokens)
        certain = len(self._ids)
        while certain and self._is_open(self._ids[certain - 1]):
            certain -= 1
        return self._fresh(self._tokenizer.decode(self._ids[:certain]).rstrip(_REPLACEMENT))

    def flush(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        return self._fresh(self._tokenizer.decode(self._ids))

    def _fresh(self, text: str) -> str:
        fresh = added_text(self._before, text)[self._shown :]
        self._shown += len(fresh)
        return fresh

    def _is_open(self, token: int) -> bool:
        """Whether the text of a token depends on the next one: a single byte's, or a special token's, which is none."""
        if not isinstance(self._tokenizer, SubwordTokenizer):
            return False
        piece = self._tokenizer.model.id_to_token(token)
        return piece is None or piece in self._tokenizer.special_ids or bool(_BYTE_PIECE.fullmatch(piece))
