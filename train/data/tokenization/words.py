"""Which tokens belong to one word, for whole-word masking."""

from __future__ import annotations

import numpy as np

from train.data.tokenization.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer
from transformer.errors import UserError


class WordPieces:
    """Decides whether two neighbouring tokens are pieces of one word. Axes: B rows, T positions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `UserError` for a tokenizer whose tokens do not mark words."""
        self._ends, self._begins = _tables(tokenizer)

    def joined(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Which tokens continue the word of the previous token: [B, T] bool."""
        joined = np.zeros(tokens_BT.shape, bool)
        joined[:, 1:] = self._ends[tokens_BT[:, :-1]] & self._begins[tokens_BT[:, 1:]]
        return joined


def _tables(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """For each token, two [V] bool arrays: whether a word may continue after it, and whether it continues a word."""
    ids = range(tokenizer.vocab_size)
    spelled = [tokenizer.token_bytes(id) for id in ids]
    if isinstance(tokenizer, ByteTokenizer) or any(piece for piece in spelled):
        # Letters, digits, underscores and non-ASCII characters make words; a token may begin with white space.
        ends = [bool(piece) and _in_word(piece[-1]) for piece in spelled]  # type: ignore[index]
        begins = [bool(piece) and _in_word(piece[0]) for piece in spelled]  # type: ignore[index]
        return np.array(ends), np.array(begins)
    assert isinstance(tokenizer, SubwordTokenizer)
    special = set(tokenizer.special_ids.values())
    names = ["" if id in special else tokenizer.model.id_to_token(id) or "" for id in ids]
    ordinary = np.array([bool(name) for name in names])
    kind = type(tokenizer.model.model).__name__
    if kind == "WordLevel":
        return ordinary, np.zeros_like(ordinary)
    if kind == "WordPiece":
        return ordinary, np.array([name.startswith("##") for name in names])
    if any(name.startswith("▁") for name in names):
        return ordinary, np.array([bool(name) and not name.startswith("▁") for name in names])
    raise UserError(
        "objective.whole_word: this tokenizer.json does not mark where words begin; set it to false, or use a tokenizer "
        "of kind bpe, unigram or wordpiece"
    )


def _in_word(byte: int) -> bool:
    return byte >= 0x80 or chr(byte).isalnum() or byte == ord("_")
