"""Examples for encoder-decoders and prefix models over running text: spans cut out of it, or its continuation.

Axes: B examples asked for at once, S positions of the source, T positions of what is predicted. With a source, every
example holds

    source_tokens, source_segments, source_positions  [B, S] int32
    tokens, targets, segments, positions              [B, T] int32
    weights                                           [B, T] float32

where `targets` ends with an end of text, and `tokens` is `targets` shifted right, with an end of text in front.
Segments are 1, 2, ... and 0 at padding; positions count from 0 in each piece.
"""

from __future__ import annotations

import numpy as np

from train.data.examples.corrupt import UL2_DENOISERS, SpanLengths, cut_spans, longest, span_mask
from train.data.examples.draws import Draws
from train.data.examples.pack import Chunked, Examples
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer, sentinel

MODES = ("[R]", "[S]", "[X]")
"""UL2's names of its three kinds of denoising."""


class Prefix(Chunked):
    """Running text with a prefix that is fully visible; the rest is predicted (Raffel et al. 2020, section 3.2.3).

    As `Chunked`, and `prefix` [B] int32: how many leading tokens are visible to all, 1 or more, drawn uniformly. Weights
    are 1 from the last of those on, which is the first whose target is not visible.
    """

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        assert draws is not None, "the prefix is drawn"
        batch = super().gather(indices)
        seen = 1 + (draws.uniform(1)[:, 0] * (batch["weights"].sum(axis=1) - 1)).astype(np.int32)
        batch["weights"] *= np.arange(self.length) >= seen[:, None] - 1
        return batch | {"prefix": seen}


class SpanCorruption(Examples):
    """T5's objective: source and target are filled exactly; the target's length follows from the source's."""

    def __init__(self, array: TokenArray, tokenizer: Tokenizer, lengths: SpanLengths) -> None:
        """`lengths` are those of every example."""
        self.lengths = lengths
        super().__init__(array, self.lengths.target)
        self._end_of_text = tokenizer.end_of_text
        self._sentinels = np.array(sentinels(tokenizer)[: self.lengths.spans])

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.lengths.tokens

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        assert draws is not None, "spans are drawn"
        places = 1 + indices[:, None] * self.lengths.tokens + np.arange(self.lengths.tokens)
        mask = span_mask(self.lengths, draws.uniform(self.lengths.tokens - 2))
        source, target = cut_spans(self._tokens[places].astype(np.int32), mask, self._sentinels, self._end_of_text)
        return two_sides(source, target, self._end_of_text)

    @property
    def efficiency(self) -> float:
        return 1.0

    @property
    def source_efficiency(self) -> float:
        return 1.0


class Ul2(Examples):
    """UL2's mixture of denoisers, each with as much text as fits on both sides; the rest of a row is padding."""

    def __init__(
        self,
        array: TokenArray,
        tokenizer: Tokenizer,
        length: int,
        source_length: int,
        *,
        weights: tuple[float, float, float],
        mode_tokens: bool,
    ) -> None:
        """`weights` are those of R, S and X; with `mode_tokens` the source begins with the token of its mode."""
        super().__init__(array, length)
        self._source_length = source_length
        self._lengths = ul2_lengths(source_length - mode_tokens, length)
        self._stride = max(lengths.tokens for lengths in self._lengths)
        self._end_of_text = tokenizer.end_of_text
        self._sentinels = np.array(sentinels(tokenizer))
        self._modes = [tokenizer.special_ids[name] for name in MODES] if mode_tokens else None
        self._chances = denoiser_chances(weights)

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._stride

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        assert draws is not None, "denoisers are drawn"
        drawn = draws.uniform(2 + self._stride)
        chosen = np.searchsorted(np.cumsum(self._chances)[:-1], drawn[:, 0], side="right")
        source = np.zeros((len(indices), self._source_length), np.int32)
        target = np.zeros((len(indices), self.length), np.int32)
        filled = np.zeros((len(indices), 2), np.int64)
        for number in np.unique(chosen):
            rows, denoiser, lengths = np.flatnonzero(chosen == number), UL2_DENOISERS[number], self._lengths[number]
            # A denoiser that uses less text than others takes it from a random place in the example.
            begin = (drawn[rows, 1] * (self._stride - lengths.tokens + 1)).astype(np.int64)
            places = 1 + (indices[rows] * self._stride + begin)[:, None] + np.arange(lengths.tokens)
            if denoiser.mean_span is None:
                mask = np.tile(np.arange(lengths.tokens) >= lengths.tokens - lengths.noise, (len(rows), 1))
            else:
                mask = span_mask(lengths, drawn[rows, 2 : lengths.tokens])
            sides = cut_spans(self._tokens[places].astype(np.int32), mask, self._sentinels, self._end_of_text)
            shift = 0
            if self._modes:
                source[rows, 0], shift = self._modes[denoiser.mode], 1
            source[rows, shift : lengths.source + shift], target[rows, : lengths.target] = sides
            filled[rows] = lengths.source + shift, lengths.target
        return two_sides(source, target, self._end_of_text, filled[:, 0], filled[:, 1])

    @property
    def efficiency(self) -> float:
        return float(self._chances @ [lengths.target for lengths in self._lengths]) / self.length

    @property
    def source_efficiency(self) -> float:
        filled = [lengths.source + (self._modes is not None) for lengths in self._lengths]
        return float(self._chances @ filled) / self._source_length


def ul2_lengths(source_room: int, length: int) -> list[SpanLengths]:
    """For each denoiser, the lengths with the most text whose source fits `source_room` tokens and whose target `length`."""

    def fits(lengths: SpanLengths) -> bool:
        return lengths.source <= source_room and lengths.target <= length

    return [longest(denoiser.lengths, fits) for denoiser in UL2_DENOISERS]


def denoiser_chances(weights_of_modes: tuple[float, float, float]) -> np.ndarray:
    """The probability of each denoiser: that of its mode (R, S, X), shared evenly among those of the mode."""
    modes = [denoiser.mode for denoiser in UL2_DENOISERS]
    weights = np.array([weights_of_modes[mode] / modes.count(mode) for mode in modes])
    return weights / weights.sum()


def sentinels(tokenizer: Tokenizer) -> list[int]:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, ... up to the first that the vocabulary lacks."""
    found: list[int] = []
    while (id := tokenizer.special(sentinel(len(found)))) is not None:
        found.append(id)
    return found


def two_sides(
    source_BS: np.ndarray,
    target_BT: np.ndarray,
    end_of_text: int,
    source_filled_B: np.ndarray | None = None,
    target_filled_B: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of rows with one piece each; only `filled` positions are used, all of them by default."""
    batch: dict[str, np.ndarray] = {"source_tokens": source_BS}
    shifted = np.empty_like(target_BT)
    shifted[:, 0] = end_of_text
    shifted[:, 1:] = target_BT[:, :-1]
    for prefix, rows, filled in (("source_", source_BS, source_filled_B), ("", target_BT, target_filled_B)):
        places = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        inside = np.ones(rows.shape, bool) if filled is None else places < filled[:, None]
        batch[f"{prefix}segments"] = inside.astype(np.int32)
        batch[f"{prefix}positions"] = np.where(inside, places, 0).astype(np.int32)
    batch["tokens"] = np.where(batch["segments"] > 0, shifted, 0).astype(np.int32)
    batch["targets"] = target_BT
    batch["weights"] = batch["segments"].astype(np.float32)
    return batch
