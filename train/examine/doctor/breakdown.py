"""Where a step's time goes: each operation of the compiled program with its time, and the least that it could take."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from train.examine.doctor.events import Event, divided
from train.examine.doctor.operations import CATEGORIES, COLLECTIVE, Operation, operations_of, unknown
from train.examine.doctor.peaks import Peaks
from train.program.hlo import Module
from transformer.errors import UserError

_K = TypeVar("_K")


@dataclasses.dataclass(frozen=True)
class Spent:
    """An operation's part of a step, in seconds, as the mean over the devices."""

    operation: Operation
    seconds: float
    times: float
    """How often it ran in a step."""
    least: float | None
    """The least that the device's peaks allow; None for communication, whose links are not known."""


@dataclasses.dataclass(frozen=True)
class Total:
    """Several operations together, in seconds of a step."""

    operations: int
    """How many there are in the program."""
    times: float
    """How often one of them ran in a step."""
    seconds: float
    least: float | None
    """Of those whose least is known; None if there are none."""
    by_category: dict[str, float]
    by_phase: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """A step under the profiler, as the mean over steps and devices. Times in seconds."""

    step: float
    """From its begin to that of the next one."""
    idle: float
    """While a device runs nothing."""
    hidden: float
    """Communication that ran while the device computed, which is not part of the step's time."""
    devices: int
    spent: tuple[Spent, ...]
    """The most expensive first. With `idle`, they add up to `step`."""

    def share(self, seconds: float) -> float:
        """The part of the step that so much time is."""
        return seconds / self.step

    def categories(self) -> dict[str, Total]:
        """The total of each category, in their order."""
        found = self._totals(lambda operation: operation.category)
        return {name: found.get(name, Total(0, 0.0, 0.0, None, {}, {})) for name in CATEGORIES}

    def scopes(self) -> dict[str, Total]:
        """The total of each of the model's scopes, the most expensive first."""
        return self._totals(lambda operation: operation.scope)

    def alike(self) -> dict[Operation, Total]:
        """The totals of operations of one kind in one scope, such as those of equal layers, by the most expensive one of each."""
        first: dict[tuple[str, ...], Operation] = {}
        for one in self.spent:
            first.setdefault(_kind(one.operation), one.operation)
        return self._totals(lambda operation: first[_kind(operation)])

    def where(self, holds: Callable[[Operation], bool]) -> float:
        """Seconds of the operations of which something holds."""
        return sum(one.seconds for one in self.spent if holds(one.operation))

    def _totals(self, key: Callable[[Operation], _K]) -> dict[_K, Total]:
        groups: dict[_K, list[Spent]] = collections.defaultdict(list)
        for one in self.spent:
            groups[key(one.operation)].append(one)
        totals = {name: _total(members) for name, members in groups.items()}
        return dict(sorted(totals.items(), key=lambda item: -item[1].seconds))


def break_down(text: str, events: Sequence[Event], steps: int, peaks: Peaks) -> Breakdown:
    """The breakdown of a step.

    Args:
        text: of the compiled program (`jax.stages.Compiled.as_text`).
        events: of a trace of some steps, which follow each other without anything else between them.
        steps: their number.

    Raises:
        UserError: the trace holds no operation of the program.
    """
    module = Module(text)
    known = operations_of(module)
    name = text.partition("HloModule ")[2].partition(",")[0].strip()

    def operation_of(event: Event) -> Operation:
        of_step = event.module in ("", name) and event.operation in known
        return known[event.operation] if of_step else unknown(event.operation)

    pairs = [(event, operation_of(event)) for event in events]
    pairs = [(event, operation) for event, operation in pairs if not operation.contains]
    timed = [event for event, operation in pairs if known.get(operation.name) is operation]
    if not timed:
        raise UserError(
            "the trace holds no operation of the step; NVIDIA's driver may leave profiling to administrators "
            "(NVreg_RestrictProfilingToAdminUsers=0 lets everyone)"
        )
    start, end = min(event.start for event in timed), max(event.end for event in timed)
    devices = sorted({event.device for event in timed})
    seconds, times = collections.defaultdict[Operation, float](float), collections.Counter[Operation]()
    idle = communicating = 0.0
    # Nanoseconds of all steps and devices to the mean's seconds.
    per = 1e-9 / (steps * len(devices))
    for device in devices:
        own = [(event, operation) for event, operation in pairs if event.device == device]
        ranks = [_rank(operation, known) for _, operation in own]
        parts, unused = divided([event for event, _ in own], ranks, start, end)
        idle += unused * per
        for (_, operation), part in zip(own, parts, strict=True):
            seconds[operation] += part * per
            times[operation] += 1
        sending = [event for event, operation in own if operation.category == COLLECTIVE]
        communicating += (end - start - divided(sending, [0] * len(sending), start, end)[1]) * per
    exposed = sum(part for operation, part in seconds.items() if operation.category == COLLECTIVE)
    # Of a loop whose length the program does not tell, its operations are counted in the trace.
    counted = bool(module.uncounted or module.expected)
    spent = []
    for operation, total in seconds.items():
        seen = times[operation] / (steps * len(devices))
        often = seen if counted or not operation.times else operation.times
        least = peaks.seconds(operation.flops, operation.bytes) * often
        spent.append(Spent(operation, total, often, None if operation.category == COLLECTIVE else least))
    spent.sort(key=lambda one: -one.seconds)
    return Breakdown((end - start) * 1e-9 / steps, idle, max(communicating - exposed, 0.0), len(devices), tuple(spent))


def _rank(operation: Operation, known: dict[str, Operation]) -> int:
    """What the device's time counts as while several operations run: computing first, then communication, then what is not of the
    step, such as the transfer of the next batch."""
    if known.get(operation.name) is not operation:
        return 2
    return 1 if operation.category == COLLECTIVE else 0


def _kind(operation: Operation) -> tuple[str, ...]:
    return operation.scope, operation.phase, operation.category, operation.primitive


def _total(members: Sequence[Spent]) -> Total:
    by_category, by_phase = collections.defaultdict[str, float](float), collections.defaultdict[str, float](float)
    for one in members:
        by_category[one.operation.category] += one.seconds
        by_phase[one.operation.phase] += one.seconds
    seconds, times = sum(one.seconds for one in members), sum(one.times for one in members)
    known = [one.least for one in members if one.least is not None]
    return Total(len(members), times, seconds, sum(known) if known else None, dict(by_category), dict(by_phase))
