"""The band of the plane of queries and keys that causal masks and windows allow together."""

from __future__ import annotations

import dataclasses
import math

from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.predicates import Causal, Window


@dataclasses.dataclass(frozen=True)
class Band:
    """The pairs of a query t and a key s with t - left ≤ s ≤ t + right; None leaves a side open. Widths may be negative."""

    left: int | None = None
    right: int | None = None

    @staticmethod
    def of(mask: AttentionMask) -> Band:
        """The band that a mask's positional terms allow together."""
        lefts: list[int] = []
        rights: list[int] = []
        for term in mask.predicates:
            if not isinstance(term, Causal | Window):
                continue
            assert isinstance(term.offset, int)
            if isinstance(term, Causal):
                rights.append(term.offset)
            else:
                lefts += [] if term.left is None else [term.left - term.offset]
                rights += [] if term.right is None else [term.right + term.offset]
        return Band(min(lefts, default=None), min(rights, default=None))

    def is_empty(self, num_queries: int, num_keys: int) -> bool:
        """Whether no query sees any key."""
        left, right = (math.inf if width is None else width for width in (self.left, self.right))
        return left + right < 0 or num_queries - 1 + right < 0 or -left > num_keys - 1

    def excludes_padding(self, num_queries: int, num_keys: int) -> bool:
        """Whether no query sees the keys that padding adds after the last one."""
        return self.right is not None and num_queries - 1 + self.right < num_keys
