"""Span corruption: predicting spans that were cut out of a text (Raffel et al. 2020, section 3.1.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.data.examples.corrupt import SpanLengths, lengths_filling
from train.data.examples.pack import Examples, Packing
from train.data.examples.spans import SpanCorruption as CorruptedText
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from train.objectives.encoder_decoder import Denoising
from transformer.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Denoising):
    """Predicts spans that were cut out of the text (T5)."""

    kind: Literal["span_corruption"] = "span_corruption"
    noise_density: float = 0.15
    """The fraction of tokens that is cut out."""
    mean_span: float = 3.0
    """The mean length of a span, in tokens."""

    least_length = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "noise_density", 0 < self.noise_density <= 0.5, "allowed: above 0, at most 0.5")
        require(self, "mean_span", self.mean_span >= 1, "allowed: 1 or more")

    def lengths(self, length: int) -> list[SpanLengths]:
        return [lengths_filling(self.source_width(length), self.noise_density, self.mean_span)]

    def target_width(self, length: int) -> int:
        """The target's width follows from the source's; `length` is its upper limit."""
        return self.lengths(length)[0].target

    def _check_lengths(self, length: int) -> None:
        super()._check_lengths(length)
        if (needed := self.target_width(length)) > length:
            raise UserError(
                f"length: got {length}; a source of {self.source_width(length)} tokens gives targets of {needed}: set length "
                f"to at least {needed}, or objective.source_length to less"
            )

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return CorruptedText(array, tokenizer, self.lengths(length)[0])
