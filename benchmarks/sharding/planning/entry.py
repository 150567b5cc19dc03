"""A layout of a plan, and the order of layouts."""

from __future__ import annotations

import dataclasses

from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.planning.objective import Objective, in_order
from benchmarks.sharding.predict.ahead import Compiled
from benchmarks.sharding.predict.analytic import Estimate
from train.config import RunConfig


@dataclasses.dataclass
class Entry:
    """A layout with its estimate and compiled figures."""

    config: RunConfig
    estimate: Estimate
    compiled: Compiled | None = None

    @property
    def seconds(self) -> float:
        """Seconds of a step: from the compiled program, else by formula."""
        if self.compiled is not None and self.compiled.prediction is not None:
            return self.compiled.prediction["seconds"]
        return self.estimate.seconds

    @property
    def memory(self) -> float:
        """Peak bytes on a device: from the compiler, else by formula."""
        if self.compiled is not None and self.compiled.memory is not None:
            return self.compiled.memory
        return self.estimate.memory

    def fits(self, target: Target) -> bool:
        """Whether it fits into a device's memory, by the compiler, else by formula."""
        return self.compiled.fits if self.compiled is not None else self.estimate.memory <= target.chip.memory


def ranked(entries: list[Entry], target: Target, objective: Objective = "time") -> list[Entry]:
    """Compiled before estimated, fitting before others, the best first."""
    groups: dict[tuple[bool, bool], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((not entry.fits(target), entry.compiled is None), []).append(entry)
    in_groups = (
        in_order(groups[key], objective, lambda one: one.seconds, lambda one: one.memory) for key in sorted(groups)
    )
    return [entry for group in in_groups for entry in group]
