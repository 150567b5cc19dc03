"""Corrupting sequences for a model to restore: masking tokens, and cutting spans out. Pure functions of their random numbers.

Axes: B rows, T positions of a masked sequence, L raw tokens, S positions of a corrupted source, K spans. Uniform numbers
are in [0, 1).

Masking: Devlin et al. 2018 (section 3.1), Joshi et al. 2020 (SpanBERT, section 3.1). Spans: Raffel et al. 2020 (T5,
section 3.1.4), with lengths chosen as in the code released with it. UL2: Tay et al. 2022 (section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

_GEOMETRIC = 0.2  # SpanBERT's p


class SpanLengths(NamedTuple):
    """The lengths of a corrupted sequence, in tokens. Those of source and target include the end of text."""

    tokens: int
    noise: int
    spans: int

    @property
    def source(self) -> int:
        """The remaining text, a sentinel for each span, and an end of text."""
        return self.tokens - self.noise + self.spans + 1

    @property
    def target(self) -> int:
        """Each span after its sentinel, and an end of text."""
        return self.noise + self.spans + 1


class Denoiser(NamedTuple):
    """One way to corrupt a sequence in UL2's mixture."""

    mode: Literal[0, 1, 2]
    """R, S or X."""
    density: float
    mean_span: float | None
    """Mean length of a span; None: one span, at the end of the sequence."""

    def lengths(self, tokens: int) -> SpanLengths:
        """The lengths for a sequence of `tokens` raw tokens."""
        if self.mean_span is None:
            return SpanLengths(tokens, min(max(1, round(tokens * self.density)), tokens - 1), 1)
        return span_lengths(tokens, self.density, self.mean_span)


UL2_DENOISERS = (
    Denoiser(0, 0.15, 3.0),
    Denoiser(0, 0.15, 8.0),
    Denoiser(1, 0.25, None),
    Denoiser(2, 0.5, 3.0),
    Denoiser(2, 0.5, 8.0),
    Denoiser(2, 0.15, 64.0),
    Denoiser(2, 0.5, 64.0),
)
"""UL2's seven denoisers (table 1)."""


def span_lengths(tokens: int, density: float, mean_span: float) -> SpanLengths:
    """How many of `tokens` raw tokens (at least 2) are cut out, and in how many spans.

    noise = round(tokens · density), at most half of them, so that text remains before every span, and spans =
    round(noise / mean_span); each is at least 1.
    """
    noise = min(max(round(tokens * density), 1), tokens // 2)
    return SpanLengths(tokens, noise, max(round(noise / mean_span), 1))


def lengths_filling(source: int, density: float, mean_span: float) -> SpanLengths:
    """The longest sequence whose corrupted source has exactly `source` tokens (at least 3).

    One raw token more makes the source longer by one or not at all, so that every length is reached.
    """
    return longest(lambda tokens: span_lengths(tokens, density, mean_span), lambda lengths: lengths.source <= source)


def longest(lengths_of: Callable[[int], SpanLengths], fits: Callable[[SpanLengths], bool]) -> SpanLengths:
    """The lengths for the most raw tokens that fit, or for 2 if nothing fits. `fits` must be monotone."""
    low, high = 2, 4
    while fits(lengths_of(high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(lengths_of(middle)) else (low, middle)
    return lengths_of(low)


def random_partition(uniform_BN: np.ndarray, parts: int) -> np.ndarray:
    """Split a sequence of N + 1 items into `parts` non-empty parts, uniformly at random: sizes [B, parts].

    `parts` - 1 of the N gaps are cut: those with the smallest numbers.
    """
    rows, gaps = uniform_BN.shape
    edges = np.zeros((rows, parts + 1), np.int64)
    edges[:, -1] = gaps + 1
    if parts > 1:
        cuts = np.argpartition(uniform_BN, parts - 2, axis=1)[:, : parts - 1] if parts - 1 < gaps else np.arange(gaps)
        edges[:, 1:-1] = np.sort(cuts, axis=-1) + 1
    return np.diff(edges, axis=1)


def span_mask(lengths: SpanLengths, uniform_BN: np.ndarray) -> np.ndarray:
    """Which tokens are cut out: [B, L] bool, text and spans alternating, text first.

    `uniform_BN` has L - 2 numbers: one for each gap between tokens that are cut out, and between those that remain.
    """
    between = lengths.noise - 1
    noise = random_partition(uniform_BN[:, :between], lengths.spans)
    kept = random_partition(uniform_BN[:, between:], lengths.spans)
    starts = np.cumsum(np.stack([kept, noise], axis=2).reshape(len(noise), -1), axis=1)[:, :-1]
    turns = np.zeros((len(noise), lengths.tokens), np.int64)
    np.put_along_axis(turns, starts, 1, axis=1)
    return np.cumsum(turns, axis=1) % 2 == 1


def cut_spans(
    tokens_BL: np.ndarray, mask_BL: np.ndarray, sentinels_K: np.ndarray, end_of_text: int
) -> tuple[np.ndarray, np.ndarray]:
    """Source and target: text with a sentinel for each span, and each span after its sentinel; both end with an end of text.

    Every row of `mask_BL` must cut equally many tokens in equally many spans, and begin with text. Returns [B, S] and
    [B, T] int32 with the lengths of `SpanLengths`.
    """
    rows = len(tokens_BL)
    starts = mask_BL.copy()
    starts[:, 1:] &= ~mask_BL[:, :-1]
    number = np.cumsum(starts, axis=1)
    # At the beginning of a span, its sentinel replaces the span's first token in the source, and in the target the last
    # token of text before the span.
    before = np.zeros_like(starts)
    before[:, :-1] = starts[:, 1:]
    sentinel = sentinels_K[np.minimum(number - starts, len(sentinels_K) - 1)]
    end = np.full((rows, 1), end_of_text)
    source = np.where(starts, sentinel, tokens_BL)[~mask_BL | starts].reshape(rows, -1)
    target = np.where(before, sentinel, tokens_BL)[mask_BL | before].reshape(rows, -1)
    return np.hstack([source, end]).astype(np.int32), np.hstack([target, end]).astype(np.int32)


def ngram_lengths(uniform_BT: np.ndarray, longest: int) -> np.ndarray:
    """Lengths 1 to `longest`: P(n) in proportion to 0.2 · 0.8ⁿ⁻¹ (SpanBERT: the mean of up to 10 is 3.8)."""
    chances = _GEOMETRIC * (1 - _GEOMETRIC) ** np.arange(longest)
    return 1 + np.searchsorted(np.cumsum(chances / chances.sum())[:-1], uniform_BT, side="right")


def number_runs(maskable_BT: np.ndarray, joined_BT: np.ndarray, lengths_BT: np.ndarray) -> np.ndarray:
    """The run of tokens to which each token belongs: [B, T], from 0 in each row; -1 where nothing may be masked.

    A token with `joined` belongs to the same unit as the one before it, like the pieces of a word. Successive runs have
    `lengths_BT` units, and end wherever a token may not be masked.
    """
    follows = np.zeros_like(maskable_BT)
    follows[:, 1:] = maskable_BT[:, :-1]
    unit_starts = maskable_BT & ~(joined_BT & follows)
    unit = np.maximum(np.cumsum(unit_starts, axis=1) - 1, 0)
    begins = np.zeros((len(unit), unit.shape[1] + 1), bool)
    ends = np.minimum(np.cumsum(lengths_BT, axis=1), unit.shape[1])
    np.put_along_axis(begins, ends, True, axis=1)
    run_starts = maskable_BT & ((unit_starts & np.take_along_axis(begins, unit, axis=1)) | ~follows)
    return np.where(maskable_BT, np.cumsum(run_starts, axis=1) - 1, -1)


def choose_runs(
    run_BT: np.ndarray, rate: float, priority_BT: np.ndarray, coin_B: np.ndarray, *, most: int | None = None
) -> np.ndarray:
    """Which tokens to predict: [B, T] bool, whole runs in a random order until the `rate` of all tokens is reached.

    The run that would exceed the rate is taken with the probability that makes the expected number exact, unless the row
    would then have more than `most` such tokens.
    """
    maskable = run_BT >= 0
    rows = len(run_BT)
    slots = max(1, int(run_BT.max(initial=-1)) + 1)
    flat = (np.arange(rows)[:, None] * slots + run_BT)[maskable]
    sizes = np.bincount(flat, minlength=rows * slots).reshape(rows, slots)
    order = np.argsort(np.where(sizes > 0, priority_BT[:, :slots], 2.0), axis=1)
    ordered = np.take_along_axis(sizes, order, axis=1)
    total = np.cumsum(ordered, axis=1)
    room = rate * maskable.sum(axis=1, keepdims=True) - (total - ordered)
    chosen = coin_B[:, None] * ordered < room
    if most is not None:
        chosen &= total <= most
    taken = np.zeros_like(order, bool)
    np.put_along_axis(taken, order, chosen, axis=1)
    return np.take_along_axis(taken, np.maximum(run_BT, 0), axis=1) & maskable


def replace_tokens(
    tokens_BT: np.ndarray,
    chosen_BT: np.ndarray,
    action_BT: np.ndarray,
    pick_BT: np.ndarray,
    *,
    mask: int,
    ordinary_V: np.ndarray,
    mask_share: float,
    random_share: float,
) -> np.ndarray:
    """The model's input: `mask` in place of a share of the chosen tokens, a token from `ordinary_V` for another, the rest as is.

    `action_BT` and `pick_BT` are uniform numbers: what to do, and which random token to take.
    """
    seen = tokens_BT.copy()
    seen[chosen_BT & (action_BT < mask_share)] = mask
    random = chosen_BT & (action_BT >= mask_share) & (action_BT < mask_share + random_share)
    seen[random] = ordinary_V[(pick_BT[random] * len(ordinary_V)).astype(np.int64)]
    return seen
