"""A mixture of denoisers (Tay et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.data.examples import spans
from train.data.examples.corrupt import SpanLengths
from train.data.examples.pack import Examples, Packing
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from train.objectives.encoder_decoder import Denoising
from transformer.errors import require


@dataclass(frozen=True, kw_only=True)
class Ul2(Denoising):
    """Predicts what a mixture of denoisers left out (UL2)."""

    kind: Literal["ul2"] = "ul2"
    denoiser_weights: tuple[float, float, float] = (2.0, 1.0, 4.0)
    """Relative frequencies of short spans (R), a continuation (S), and long or many spans (X)."""
    mode_tokens: bool = False
    """Begin the source with `[R]`, `[S]` or `[X]`, which must be among the special tokens."""

    least_length = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = self.denoiser_weights
        require(
            self,
            "denoiser_weights",
            min(weights) >= 0 and sum(weights) > 0,
            "allowed: three numbers, 0 or more, not all 0",
        )

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return spans.MODES if self.mode_tokens else ()

    def lengths(self, length: int) -> list[SpanLengths]:
        return spans.ul2_lengths(self.source_width(length) - self.mode_tokens, length)

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return spans.Ul2(
            array, tokenizer, length, self.source_width(length), weights=self.denoiser_weights, mode_tokens=self.mode_tokens
        )  # fmt: skip
