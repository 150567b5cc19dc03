"""Base classes of objectives whose models read a source and predict a target.

Axes: B rows, S positions of the source, T positions of the target.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from train.data.examples.corrupt import SpanLengths
from train.data.examples.spans import sentinels
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums, of_tokens
from train.objectives.objective import BatchShapes, Objective, places_of, row_shapes, weight_shape
from transformer.errors import UserError, require
from transformer.types import Keys


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderObjective(Objective):
    """Predicts the tokens of a target from a source and from those before them (teacher forcing)."""

    source_length: int | None = None
    """Tokens in a row of the source; null: the same as in a row of the target."""

    families: ClassVar[tuple[str, ...]] = ("vaswani", "t5")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self, "source_length", self.source_length is None or self.source_length >= 2, "allowed: 2 or more, or null"
        )

    def source_width(self, length: int) -> int:
        """`source_length` with its default filled in."""
        return length if self.source_length is None else self.source_length

    def target_width(self, length: int) -> int:
        """Tokens in a row of the target."""
        return length

    def _check_lengths(self, length: int) -> None:
        if (width := self.source_width(length)) < self.least_length:
            raise UserError(
                f"objective.source_length: got {width}; {self.kind} needs at least {self.least_length} tokens"
            )

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        places = ("tokens", "segments", "positions")
        width = self.target_width(length)
        source = row_shapes(rows, self.source_width(length), places, prefix="source_")
        return source | row_shapes(rows, width, (*places, "targets")) | weight_shape(rows, width)

    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """The mean over the target's tokens, whose `weights` [B, T] are 1."""
        output = model(
            batch["source_tokens"], batch["tokens"], source_segments_BS=batch["source_segments"],
            source_positions_BS=batch["source_positions"], source_lengths_BM=batch.get("source_lengths"), **places_of(batch),
            key=key,
        )  # fmt: skip
        return of_tokens(model, output, batch, config)


@dataclass(frozen=True, kw_only=True)
class Denoising(EncoderDecoderObjective):
    """Predicts spans that were cut out of running text; each span has its own sentinel."""

    packings = ("chunk",)

    @abc.abstractmethod
    def lengths(self, length: int) -> list[SpanLengths]:
        """The lengths of the corrupted sequences, one for each kind of corruption."""

    def largest_inserted(self, tokenizer: Tokenizer) -> int:
        return max(super().largest_inserted(tokenizer), *sentinels(tokenizer), 0)

    def _check_text(self, prepared: Prepared, length: int) -> None:
        spans, there = max(one.spans for one in self.lengths(length)), len(sentinels(prepared.tokenizer))
        if there < spans:
            raise UserError(
                f"objective.kind: {self.kind!r} needs a sentinel for each of up to {spans} spans; the vocabulary has {there}; "
                f"set data.tokenizer.sentinels: {spans}"
            )
        if not prepared.validation:
            return
        # Otherwise held-out text that is too short for one sequence would fail only at the first evaluation.
        needed = max(one.tokens for one in self.lengths(length))
        longest = max(len(array.tokens) - 1 for array in prepared.validation)
        if longest < needed:
            raise UserError(
                f"data.validation: {longest} held-out tokens are fewer than one sequence of {needed}; hold out more, or make "
                "objective.source_length smaller"
            )
