"""Alignment of tokens with words and characters. Axes: N tokens, W words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from train.data.prepared.label_arrays import NONE
from train.data.tokenization.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer


def encode_words(tokenizer: Tokenizer, texts: Sequence[Sequence[str]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The token ids [N] of each text, given as words, and the index of each word's first token [W]; -1 for a word without one.

    A word is tokenised with the space before it, as in running text, so that no token belongs to two words.
    """
    spelled = [[f" {word}" if place else word for place, word in enumerate(words)] for words in texts]
    different = list(dict.fromkeys(itertools.chain.from_iterable(spelled)))
    ids = dict(zip(different, tokenizer.encode_batch(different), strict=True))
    found = []
    for words in spelled:
        pieces = [ids[word] for word in words]
        sizes = np.array([len(piece) for piece in pieces], np.int64)
        found.append((np.concatenate(pieces), np.where(sizes > 0, np.cumsum(sizes) - sizes, NONE)))
    return found


def encode_with_places(
    tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The token ids [N] of each text, and the span of characters [N, 2] of each token: the first, and the one after the last.

    Args:
        special: special tokens that a text spells out are those tokens; by default they are ordinary text.
    """
    if isinstance(tokenizer, SubwordTokenizer):
        model = tokenizer.reading_special if special else tokenizer.model
        encodings = model.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(one.ids, tokenizer.dtype), np.array(one.offsets, np.int64).reshape(-1, 2)) for one in encodings
        ]
    if special:
        assert isinstance(tokenizer, ByteTokenizer)
        return [_bytes_and_special(tokenizer, text) for text in texts]
    return list(zip(tokenizer.encode_batch(texts), map(_places_of_bytes, texts), strict=True))


def tokens_of_answer(places: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The first and the last token [2] int32 with any of the characters from `start` to before `stop`; -1 if there is none."""
    inside = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < stop))
    return np.array([inside[0], inside[-1]] if len(inside) else [NONE, NONE], np.int32)


def _places_of_bytes(text: str) -> np.ndarray:
    sizes = [0 if letter == "\0" else len(letter.encode()) for letter in text]
    first = np.repeat(np.arange(len(text)), np.array(sizes, np.int64))
    return np.stack([first, first + 1], axis=1)


def _bytes_and_special(tokenizer: ByteTokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    ids, places, start = [np.zeros(0, tokenizer.dtype)], [np.zeros((0, 2), np.int64)], 0
    for part in tokenizer.cut_at_special(text):
        stop = start + len(part)
        if part in tokenizer.special_ids:
            ids.append(np.array([tokenizer.special_ids[part]], tokenizer.dtype))
            places.append(np.array([[start, stop]], np.int64))
        else:
            ids.append(tokenizer.encode(part))
            places.append(_places_of_bytes(part) + start)
        start = stop
    return np.concatenate(ids), np.concatenate(places)
