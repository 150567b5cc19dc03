"""Sequence to sequence: predicting the target of pairs of texts, such as a translation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.data.examples.buckets import Buckets
from train.data.examples.pack import Examples, Packing
from train.data.examples.pairs import PackedPairs, PairLimits
from train.data.examples.rows import TooLong
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer
from train.objectives.encoder_decoder import EncoderDecoderObjective
from transformer.errors import require


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(EncoderDecoderObjective):
    """Predicts the target of a pair, such as a translation."""

    kind: Literal["seq2seq"] = "seq2seq"
    target_length: int | None = None
    """The longest target, in tokens with its end of text; null: the length of a row."""
    too_long: TooLong = "drop"
    """What happens to a pair with a side that is too long: it is left out, or cut. The number of such pairs is reported."""
    max_shapes: int = 6
    """With packing `pad`: the most shapes of batches. More shapes waste less padding, but each is compiled separately."""

    families = ("vaswani", "t5", "recurrent")
    takes_pairs = True
    packings = ("documents", "pad")
    metrics = ("bleu", "chrf")
    predicts_all_text = True
    translates = True
    own_target_tokenizer = True
    use = ("translate", "manyheads translate {} --text TEXT")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self, "target_length", self.target_length is None or self.target_length >= 2, "allowed: 2 or more, or null"
        )
        require(self, "max_shapes", self.max_shapes >= 1, "allowed: 1 or more")

    def limits(self, length: int) -> PairLimits:
        """The longest pair in rows of `length` tokens."""
        target = min(length, self.target_length or length)
        return PairLimits(source=self.source_width(length), target=target, too_long=self.too_long)

    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        return PackedPairs(array, length, self.limits(length), shown=shown)

    def buckets(self, array: TokenArray, length: int, batch_size: int, seed: int, *, shown: bool) -> Buckets:
        limits = self.limits(length)
        return Buckets(array, length, limits, batch_size, seed, max_shapes=self.max_shapes, shown=shown)
