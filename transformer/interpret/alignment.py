"""Word alignments from attention weights, and how well they agree with human ones.

L layers, B batch, N query heads, T target position, S source position.

Pure functions in NumPy. Row t of the weights is the query that predicts the decoder's output t, the token after its t-th
input, so the labels of rows are the outputs. An alignment is a set of pairs (source, target), in the order of the
"Pharaoh" format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from transformer.errors import is_number
from transformer.types import Float

Span = tuple[int, int]
"""First token of a word, and the one after its last."""
Alignment = set[tuple[int, int]]
"""Pairs (source, target) that belong together."""

MARKS = " \t\n\r\u00a0\u2581ĠĊĉč"
"""Spaces and line ends, as themselves, as SentencePiece writes a space (▁), and as byte-level vocabularies write them."""
CONTINUATION = "##"
"""The prefix of a WordPiece token that continues a word."""
_MARKS = tuple(MARKS)


class HeadScore(NamedTuple):
    """A head, and its alignment error rate."""

    layer: int
    head: int
    error_rate: float


def word_spans(pieces: Sequence[str], *, special: Collection[str] = ()) -> list[Span]:
    """Which tokens make which word, from the text of the tokens.

    If some piece starts with `##`, a word is a piece and the `##` pieces after it. Otherwise a word starts where a piece starts
    with a space, or where the one before ended with one; a piece of spaces alone belongs to the word after it. Every
    piece is in one word.

    Args:
        pieces: one text per token, as in the vocabulary (" the", "Ġthe", "▁the", "##ing").
        special: pieces that are words of their own, such as the end of text.

    >>> word_spans(["▁Das", "▁Haus", "chen", "</s>"], special={"</s>"})
    [(0, 1), (1, 3), (3, 4)]
    """
    by_continuation = any(piece.startswith(CONTINUATION) and piece != CONTINUATION for piece in pieces)
    starts: list[int] = []
    has_text = False
    for index, piece in enumerate(pieces):
        before = pieces[index - 1] if index else ""
        if index == 0 or piece in special or before in special:
            new = True
        elif by_continuation:
            new = not piece.startswith(CONTINUATION)
        else:
            new = has_text and (piece.startswith(_MARKS) or before.endswith(_MARKS))
        if new:
            starts.append(index)
            has_text = False
        has_text = has_text or bool(piece.strip(MARKS))
    return list(zip(starts, [*starts[1:], len(pieces)], strict=True)) if starts else []


def merge_subwords(
    weights: Float[np.ndarray, "*dims T S"], target_spans: Sequence[Span], source_spans: Sequence[Span]
) -> Float[np.ndarray, "*dims U R"]:
    """Attention between words: summed over the tokens of a source word, averaged over those of a target word.

    Clark et al. 2019, section 4.1. Rows that sum to 1 still do, if every source token is in a word.

    Args:
        target_spans, source_spans: of U and R words, as `word_spans` gives them.

    Raises:
        ValueError: a span that is empty or reaches beyond the tokens.
    """
    T, S = weights.shape[-2:]
    into_UT = _membership("target", target_spans, T, weights.dtype)
    into_UT /= into_UT.sum(-1, keepdims=True)
    into_RS = _membership("source", source_spans, S, weights.dtype)
    return into_UT @ weights @ into_RS.T


def alignment_matrix(
    weights_LBNTS: Float[np.ndarray, "L B N T S"],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Float[np.ndarray, "B T S"]:
    """The mean over the chosen layers and heads; all of them by default.

    Raises:
        ValueError: a layer or head that does not exist, or none chosen.
    """
    L, _, N = weights_LBNTS.shape[:3]
    for name, chosen, count in (("layers", layers, L), ("heads", heads, N)):
        if chosen is not None and not (chosen and all(0 <= index < count for index in chosen)):
            raise ValueError(f"alignment_matrix: {name}={list(chosen)}; expected some of 0 to {count - 1}")
    weights = weights_LBNTS if layers is None else weights_LBNTS[list(layers)]
    weights = weights if heads is None else weights[:, :, list(heads)]
    return weights.mean(axis=(0, 2))


def argmax_alignment(weights_TS: Float[np.ndarray, "T S"], *, least: float = 0.0) -> Alignment:
    """Each target position with the source position of its greatest weight (the first of equal ones).

    Args:
        least: a weight must be greater than this; a query that sees nothing is aligned with nothing.
    """
    best_T = weights_TS.argmax(-1) if weights_TS.shape[-1] else np.zeros(len(weights_TS), int)
    return {
        (int(source), target)
        for target, source in enumerate(best_T)
        if weights_TS.shape[-1] and weights_TS[target, source] > least
    }


def parse_alignment(line: str) -> tuple[Alignment, Alignment]:
    """Sure and possible pairs from a line as "0-0 1-2 2?3": source, then target, from 0; `?` makes a pair only possible.

    Sure pairs are possible ones too.

    Raises:
        ValueError: anything other than pairs of numbers.
    """
    sure, possible = set(), set()
    for word in line.split():
        mark = "?" if "?" in word else "-"
        source, _, target = word.partition(mark)
        if not (is_number(source) and is_number(target)):
            raise ValueError(f"alignment: {word!r} in {line.strip()!r} is not a pair; expected for example 0-1 or 0?1")
        pair = (int(source), int(target))
        possible.add(pair)
        if mark == "-":
            sure.add(pair)
    return sure, possible


def alignment_error_rate(
    predicted: Iterable[Alignment], sure: Iterable[Alignment], possible: Iterable[Alignment] | None = None
) -> float:
    """AER = 1 - (|A ∩ S| + |A ∩ P|) / (|A| + |S|) over all sentences (Och & Ney 2003).

    0: all sure pairs were found, and none that is not possible.

    Args:
        predicted, sure, possible: A, S and P, one sentence after the other. Sure pairs count as possible; without possible
            ones the rate is one minus the F-score of the sure ones.

    Raises:
        ValueError: different numbers of sentences, or no pair in any of them.
    """
    sure = list(sure)
    possible = sure if possible is None else possible
    found = total = 0
    for a, s, p in zip(predicted, sure, possible, strict=True):
        found += len(a & s) + len(a & (p | s))
        total += len(a) + len(s)
    if not total:
        raise ValueError("alignment_error_rate: no pair in any sentence, predicted or sure")
    return 1 - found / total


def head_error_rates(
    weights: Iterable[Float[np.ndarray, "L N _ _"]],
    sure: Sequence[Alignment],
    possible: Sequence[Alignment] | None = None,
) -> Float[np.ndarray, "L N"]:
    """The alignment error rate of each head's greatest weights.

    Args:
        weights: [L, N, T, S], one sentence after the other, between words and without padding.

    Raises:
        ValueError: as for `alignment_error_rate`, or no sentence at all.
    """
    sentences = list(weights)
    if not sentences:
        raise ValueError("head_error_rates: no sentence")
    L, N = sentences[0].shape[:2]
    rates_LN = np.empty((L, N))
    for layer, head in np.ndindex(L, N):
        predicted = [argmax_alignment(weights_LNTS[layer, head]) for weights_LNTS in sentences]
        rates_LN[layer, head] = alignment_error_rate(predicted, sure, possible)
    return rates_LN


def best_head(
    weights: Iterable[Float[np.ndarray, "L N _ _"]],
    sure: Sequence[Alignment],
    possible: Sequence[Alignment] | None = None,
) -> HeadScore:
    """The head that aligns best, the first of equal ones. Arguments and errors are as for `head_error_rates`."""
    rates_LN = head_error_rates(weights, sure, possible)
    layer, head = np.unravel_index(rates_LN.argmin(), rates_LN.shape)
    return HeadScore(int(layer), int(head), float(rates_LN[layer, head]))


def _membership(name: str, spans: Sequence[Span], length: int, dtype: np.dtype) -> np.ndarray:
    """[words, tokens]: 1 where a token is in a word."""
    matrix = np.zeros((len(spans), length), dtype)
    for row, (start, stop) in zip(matrix, spans, strict=True):
        if not 0 <= start < stop <= length:
            raise ValueError(f"merge_subwords: {name} span {(start, stop)}; expected one within {length} tokens")
        row[start:stop] = 1
    return matrix
