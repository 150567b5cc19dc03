"""Examples for masked language models: text with some of its tokens hidden, and pairs of stretches of text.

Axes: B examples asked for at once, T positions, K of them that may be predicted. Every example holds

    tokens, targets    [B, T] int32    the corrupted input, and the original tokens
    weights            [B, T] float32  1 where a token is predicted, else 0
    predicted          [B, K] int32    the positions of those tokens, in order, then of others; only these are scored
    segments           [B, T] int32    which piece a position belongs to: 1, 2, ...; 0 at padding
    positions          [B, T] int32    the position within its piece, from 0

and, in examples of two stretches of text,

    token_types        [B, T] int32    0 in the first stretch, 1 in the second
    labels             [B] int32       1 if the second follows the first, or they are in order; else 0

Which tokens are hidden, and where stretches are cut, is drawn anew each time an example occurs.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import numpy as np

from train.data.examples.corrupt import choose_runs, ngram_lengths, number_runs, replace_tokens
from train.data.examples.draws import Draws
from train.data.examples.pack import Examples, Placed, fit_pieces, kept_index, place_in_group
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import CLS, MASK, SEP, Tokenizer
from train.data.tokenization.words import WordPieces

_RANDOM_PER_TOKEN = 4
_LONG_WORD = 8  # tokens per word by which a run of words may exceed the mask rate
_FIT_TRIES = 8  # attempts to draw a stretch from another document


@dataclass(frozen=True, kw_only=True)
class MaskingRule:
    """Which tokens are hidden, and what replaces them."""

    rate: float
    """The fraction of tokens to predict."""
    mask_share: float
    """The fraction of those that `[MASK]` replaces."""
    random_share: float
    """The fraction of those that a random token replaces; the rest are unchanged."""
    whole_word: bool
    """Predict all tokens of a word, or none."""
    ngram: int
    """The most tokens (or words) in a row that are predicted together."""

    def most_predicted(self, length: int) -> int:
        """The most tokens of a row of `length` that are predicted."""
        single = self.ngram == 1 and not self.whole_word
        return min(length, math.ceil(self.rate * length) + (0 if single else _LONG_WORD * self.ngram))


class Masking:
    """Hides tokens of whole batches. Special tokens are neither hidden nor drawn as random ones, and added ones are not drawn."""

    def __init__(self, tokenizer: Tokenizer, rule: MaskingRule) -> None:
        """Raises `UserError` if whole words are to be masked and the tokenizer does not mark words."""
        is_special = np.zeros(tokenizer.vocab_size, bool)
        is_special[list(tokenizer.special_ids.values())] = True
        self._is_special = is_special
        self._ordinary = np.setdiff1d(np.flatnonzero(~is_special), list(tokenizer.added_ids))
        self._mask = tokenizer.special_ids[MASK]
        self._words = WordPieces(tokenizer) if rule.whole_word else None
        self._rule = rule

    def apply(self, batch: dict[str, np.ndarray], draws: Draws) -> dict[str, np.ndarray]:
        """The batch with `tokens` corrupted, and `targets` and `weights` added; `segments` 0 is never predicted."""
        tokens, rule = batch["tokens"], self._rule
        rows, width = tokens.shape
        drawn = draws.uniform(_RANDOM_PER_TOKEN * width + 1)
        length, priority, action, pick = drawn[:, :-1].reshape(rows, _RANDOM_PER_TOKEN, width).transpose(1, 0, 2)
        maskable = (batch["segments"] > 0) & ~self._is_special[tokens]
        joined = self._words.joined(tokens) if self._words else np.zeros_like(maskable)
        run = number_runs(maskable, joined, ngram_lengths(length, rule.ngram))
        most = rule.most_predicted(width)
        chosen = choose_runs(run, rule.rate, priority, drawn[:, -1], most=most)
        if rule.ngram > 1:  # a span is masked, replaced or left unchanged as a whole (SpanBERT, section 3.1)
            action = np.take_along_axis(action, np.maximum(run, 0), axis=1)
        seen = replace_tokens(
            tokens,
            chosen,
            action,
            pick,
            mask=self._mask,
            ordinary_V=self._ordinary,
            mask_share=rule.mask_share,
            random_share=rule.random_share,
        )
        places = np.argsort(~chosen, axis=1, kind="stable")[:, :most].astype(np.int32)
        return batch | {
            "tokens": seen, "targets": tokens, "weights": chosen.astype(np.float32), "predicted": places
        }  # fmt: skip


class _Text(Examples):
    """Text with `[CLS]` before and `[SEP]` after each piece, and its tokens hidden by `masking`."""

    def __init__(self, array: TokenArray, tokenizer: Tokenizer, length: int, rule: MaskingRule) -> None:
        super().__init__(array, length)
        self._cls, self._sep = tokenizer.special_ids[CLS], tokenizer.special_ids[SEP]
        self._end_of_text = tokenizer.end_of_text
        self._masking = Masking(tokenizer, rule)

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        assert draws is not None, "masking takes random numbers"
        return self._masking.apply(self.laid_out(indices), draws)

    @abc.abstractmethod
    def laid_out(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """`tokens`, `segments` and `positions` of the examples, with nothing hidden."""


class MaskedChunks(_Text):
    """Example i is `length` - 2 tokens of the text from i * (`length` - 2) on; documents end with `[SEP]` (RoBERTa's
    FULL-SENTENCES: Liu et al. 2019)."""

    def __init__(
        self,
        array: TokenArray,
        tokenizer: Tokenizer,
        length: int,
        rule: MaskingRule,
        *,
        keep_rest: bool = False,
    ) -> None:
        super().__init__(array, tokenizer, length, rule)
        self._room, self._total = length - 2, len(self._tokens) - 1
        self._len = -(-self._total // self._room) if keep_rest else self._total // self._room

    def __len__(self) -> int:
        return self._len

    def laid_out(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows, room = len(indices), self._room
        count = np.minimum(room, self._total - indices * room)
        places = 1 + indices[:, None] * room + np.arange(room)
        text = self._tokens[np.minimum(places, self._total)].astype(np.int32)
        text = np.where(text == self._end_of_text, self._sep, text)
        # A chunk that ends where a document does has its separator already.
        size = count + 1 + (text[np.arange(rows), count - 1] != self._sep)
        tokens = np.full((rows, self.length), self._sep, np.int32)
        tokens[:, 0] = self._cls
        tokens[:, 1:-1] = np.where(np.arange(room) < count[:, None], text, self._sep)
        places = np.arange(self.length)
        inside = places < size[:, None]
        return {
            "tokens": np.where(inside, tokens, 0),
            "segments": inside.astype(np.int32),
            "positions": np.where(inside, places, 0).astype(np.int32),
        }

    @property
    def efficiency(self) -> float:
        return min(1.0, self._total / max(1, len(self) * self._room))


class MaskedDocuments(_Text):
    """Whole documents packed into examples, longer ones cut into pieces; each piece has its own `[CLS]` and `[SEP]`."""

    def __init__(self, array: TokenArray, tokenizer: Tokenizer, length: int, rule: MaskingRule) -> None:
        super().__init__(array, tokenizer, length, rule)
        sizes = np.diff(array.offsets) - 1  # without the end of text
        index = kept_index(
            array, f"fit-masked1-{length}", lambda: fit_pieces(array.offsets[:-1], sizes, length, extra=2)
        )
        self._starts, self._sizes = index[:, 0], index[:, 1] + 2
        count = int(index[-1, 2]) + 1 if len(index) else 0
        self._bounds = np.searchsorted(index[:, 2], np.arange(count + 1))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def laid_out(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        placed = Placed.at(self._bounds, self._sizes, indices, self.length)
        return framed(self._tokens, self._starts, placed, self._cls, self._sep)

    @property
    def efficiency(self) -> float:
        return int(self._sizes.sum()) / max(1, len(self) * self.length)


class SentencePairs(_Text):
    """`[CLS] A [SEP] B [SEP]`, where A and B are stretches of text.

    B follows A in its document, or in half of the cases is a stretch of another one (Devlin et al. 2018); with `swaps` B
    follows A, and in half of the cases they are swapped (Lan et al. 2020). A document is cut into
    stretches that fill an example; the end of A is drawn from a quarter to three quarters of the stretch.
    """

    def __init__(self, array: TokenArray, tokenizer: Tokenizer, length: int, rule: MaskingRule, *, swaps: bool) -> None:
        """`swaps`: in half of the cases the two are swapped, instead of the second coming from another document."""
        super().__init__(array, tokenizer, length, rule)
        self._swaps = swaps
        room, sizes = length - 3, np.diff(array.offsets) - 1
        count = -(-sizes // room)
        self._document = np.repeat(np.arange(len(sizes)), count)
        begin = room * place_in_group(count)
        self._starts = array.offsets[:-1][self._document] + begin
        self._sizes = np.minimum(room, sizes[self._document] - begin)
        whole = self._sizes >= 2  # one token cannot be cut in two
        self._document, self._starts, self._sizes = self._document[whole], self._starts[whole], self._sizes[whole]
        self._by_size = np.argsort(self._sizes, kind="stable")
        self._sorted_sizes = self._sizes[self._by_size]

    def __len__(self) -> int:
        return len(self._sizes)

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        assert draws is not None, "pairs of stretches are drawn"
        drawn = draws.uniform(_FIT_TRIES + 3)
        sizes = self._sizes[indices]
        first = np.maximum(1, (sizes * (0.25 + 0.5 * drawn[:, 0])).astype(np.int64))
        second = sizes - first
        starts = np.stack([self._starts[indices], self._starts[indices] + first], axis=1)
        counts = np.stack([first, second], axis=1)
        changed = drawn[:, 1] < 0.5
        if self._swaps:
            starts[changed], counts[changed] = starts[changed, ::-1], counts[changed, ::-1]
        else:
            other = self._others(indices, second, drawn[:, 3:])
            changed &= other >= 0
            offset = (drawn[:, 2] * (self._sizes[other] - second + 1)).astype(np.int64)
            starts[changed, 1] = (self._starts[other] + offset)[changed]
        return self._masking.apply(self._stretches(starts, counts), draws) | {"labels": (~changed).astype(np.int32)}

    def laid_out(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        half = self._sizes[indices] // 2
        starts = np.stack([self._starts[indices], self._starts[indices] + half], axis=1)
        return self._stretches(starts, np.stack([half, self._sizes[indices] - half], axis=1))

    def _others(self, indices: np.ndarray, least: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """For each of B examples, a stretch of another document with at least this many tokens; -1 if none was found."""
        low = np.searchsorted(self._sorted_sizes, least)
        found = np.full(len(indices), -1)
        for tried in drawn.T:
            candidate = self._by_size[low + (tried * (len(self) - low)).astype(np.int64)]
            found = np.where((found < 0) & (self._document[candidate] != self._document[indices]), candidate, found)
        return found

    def _stretches(self, starts: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of two stretches each: `starts` and `counts` [B, 2]."""
        places = np.arange(self.length)
        middle = 1 + counts[:, :1]  # where the first stretch ends
        end = middle + 1 + counts[:, 1:]
        second = places > middle
        source = np.where(second, starts[:, 1:] + places - middle - 1, starts[:, :1] + places - 1)
        tokens = self._tokens[np.clip(source, 0, len(self._tokens) - 1)].astype(np.int32)
        tokens[:, 0] = self._cls
        tokens = np.where((places == middle) | (places == end), self._sep, tokens)
        inside = places <= end
        return {
            "tokens": np.where(inside, tokens, 0).astype(np.int32),
            "segments": inside.astype(np.int32),
            "positions": np.where(inside, places, 0).astype(np.int32),
            "token_types": (inside & second).astype(np.int32),
        }

    @property
    def efficiency(self) -> float:
        return float((self._sizes + 3).mean()) / self.length if len(self) else 0.0


def framed(tokens: np.ndarray, starts: np.ndarray, placed: Placed, cls: int, sep: int) -> dict[str, np.ndarray]:
    """`tokens`, `segments` and `positions` of rows whose pieces begin with `cls` and end with `sep`.

    `starts` has the first token of each piece in `tokens`; the sizes of `placed` count both ends.
    """
    text = tokens[np.repeat(starts[placed.pieces], placed.sizes) + placed.positions - 1].astype(np.int32)
    text[placed.positions == 0] = cls
    text[np.cumsum(placed.sizes) - 1] = sep
    return {"tokens": placed.spread(text), **placed.places()}
