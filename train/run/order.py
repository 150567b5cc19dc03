"""Which batch of the data each step of a run takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformer.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class Order:
    """Step s takes batch s - 1, and a later one where batches before it were passed over."""

    passed: tuple[tuple[int, int], ...] = ()
    """(step, number): after this step, so many batches were passed over."""

    @classmethod
    def from_data(cls, data: Sequence[Sequence[int]]) -> Order:
        """The order that a checkpoint holds. Raises `UserError` for data that is none."""
        try:
            return cls(tuple((int(step), int(number)) for step, number in data))
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"passed: got {shown(data)}; a checkpoint holds pairs of a step and a number") from None

    def batch(self, step: int) -> int:
        """The number of the batch of a step, from 0."""
        return step - 1 + self._passed_before(step)

    def rolled_back(self, step: int, spike: int) -> Order:
        """The order in which the step after `step` takes the batch after that of the step `spike`."""
        kept = Order(tuple(one for one in self.passed if one[0] <= step))
        return Order((*kept.passed, (step, self.batch(spike) + 1 - kept.batch(step + 1))))

    def _passed_before(self, step: int) -> int:
        return sum(number for after, number in self.passed if after < step)
