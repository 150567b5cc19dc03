"""What a plan is to minimise: time, cost by the user's prices, or memory; and the order of layouts by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Literal, TypeVar, get_args

from transformer.errors import UserError, nearest

Objective = Literal["time", "cost", "memory"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
TIE = 0.01
"""Values that differ by less than this fraction are as good as equal: no prediction is more exact."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """What a plan is for."""

    objective: Objective = "time"
    price: float | None = None
    """Price of a device-hour, in the user's own currency."""
    tokens: float | None = None
    """Tokens of a whole training."""

    def cost(self, seconds: float, devices: int) -> float | None:
        """Price of so many seconds of all devices."""
        return None if self.price is None else self.price * devices * seconds / 3600


def in_order(
    items: Sequence[T], objective: Objective, seconds: Callable[[T], float], memory: Callable[[T], float]
) -> list[T]:
    """The items, best first. Those within `TIE` of the best of them are ordered by the other quantity: of layouts as fast as
    each other the smallest comes first, and of layouts of one size the fastest.

    The cost of a number of devices follows their time.
    """
    first, second = (memory, seconds) if objective == "memory" else (seconds, memory)
    left = sorted(items, key=lambda item: (first(item), second(item)))
    found: list[T] = []
    while left:
        limit = first(left[0]) * (1 + TIE)
        equal = [item for item in left if first(item) <= limit]
        found += sorted(equal, key=lambda item: (second(item), first(item)))
        left = left[len(equal) :]
    return found


def parse_prices(text: str | None, kinds: Collection[str]) -> dict[str, float]:
    """Prices of a device-hour by kind of device: `2.5` of the only kind, or `h100=2.5,v5e=1.2`.

    Raises:
        UserError: a price that is not a number above 0, or of another kind.
    """
    if text is None:
        return {}
    found = {}
    for part in text.split(","):
        name, equals, price = (one.strip() for one in part.rpartition("="))
        if not equals:
            if len(kinds) > 1 or "," in text:
                raise UserError(
                    f"--price: got {text!r}; allowed: a price for each kind of device, as in "
                    f"{','.join(f'{kind}=2.5' for kind in kinds)}"
                )
            (name,) = kinds
        if name not in kinds:
            raise UserError(f"--price: got {name!r}; allowed: {', '.join(kinds)}.{nearest(name, kinds)}")
        try:
            number = float(price)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise UserError(f"--price: got {price!r}; allowed: a number above 0, for each device and hour")
        found[name] = number
    return found
