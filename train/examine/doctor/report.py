"""What was found about a step, as rows of text for the terminal and for a page."""

from __future__ import annotations

import dataclasses
import itertools
import math

from train.config import RunConfig
from train.examine.doctor.advice import Advice
from train.examine.doctor.breakdown import Breakdown, Total
from train.examine.doctor.operations import Operation
from train.examine.doctor.peaks import Peaks
from train.examine.doctor.record import Recording

COUNT = 10
"""How many operations are listed."""
PARTS = ("part", "ms", "% of step", "roofline ms", "of roofline")
OPERATIONS = ("scope", "pass", "operation", "part", "times", "ms", "% of step", "roofline ms")
ATTENTION = ("layer", "backend", "why not a faster one")


@dataclasses.dataclass(frozen=True)
class Report:
    """A step of a config on the devices at hand."""

    config: RunConfig
    devices: str
    """Their number and kind."""
    first: int
    """The number of the first step that was taken."""
    recording: Recording
    breakdown: Breakdown
    peaks: Peaks
    mfu: float
    """Model FLOPs utilisation without the profiler (Chowdhery et al. 2022, appendix B)."""
    advice: tuple[Advice, ...]

    def headline(self) -> str:
        """What was run, and how fast."""
        r, c = self.recording, self.config
        speed = f"{ms(r.seconds)} ms a step, {r.predictions / r.seconds:,.0f} {c.objective.unit}/s"
        return f"{c.name} on {self.devices} ({c.mesh.strategy}, {c.model.dtype}), from step {self.first} on: {speed}"

    def utilization(self) -> str:
        """The MFU, and what it is a part of."""
        source = "as measured here" if self.peaks.measured else "by the data sheet"
        several = self.breakdown.devices > 1
        each = "" if not several else ", which all devices share" if self.peaks.shared else ", for each device"
        arithmetic, memory = rate(self.peaks.flops), rate(self.peaks.bandwidth)
        return f"MFU {self.mfu:.1%}; peaks {source}: {arithmetic}FLOP/s, memory {memory}B/s{each}"

    def notes(self) -> list[str]:
        """How to read the figures."""
        b, r = self.breakdown, self.recording
        steps = "one step" if r.steps == 1 else f"the mean of {r.steps} steps"
        of = steps + (f" and {b.devices} devices" if b.devices > 1 else "")
        notes = [f"{of} under the profiler, where a step takes {ms(b.step)} ms; what runs at once shares the time"]
        notes.append(
            "roofline: the least time that the peaks of arithmetic and memory allow for the operations as compiled"
        )
        if b.hidden >= 0.001 * b.step:
            notes.append(f"{ms(b.hidden)} ms of communication more run while a device computes")
        if any((total.least or 0.0) > total.seconds for total in b.categories().values()):
            why = ", or other work slowed the machine down while its peaks were measured" if self.peaks.measured else ""
            notes.append(f"above 100%: small arrays stay in a cache, which is faster than the memory{why}")
        return notes

    def parts(self) -> list[list[str]]:
        """A row of `PARTS` for each category, idle time and the whole step."""
        b = self.breakdown
        totals = b.categories()
        rows = [[name, *self._figures(total.seconds, total.least)] for name, total in totals.items()]
        least = sum(total.least or 0.0 for total in totals.values())
        return [*rows, ["idle", *self._figures(b.idle, None)], ["step", *self._figures(b.step, least)]]

    def operations(self) -> list[list[str]]:
        """A row of `OPERATIONS` for each of the most expensive ones."""
        return [self._operation(*one) for one in itertools.islice(self.breakdown.alike().items(), COUNT)]

    def attention(self) -> list[list[str]]:
        """A row of `ATTENTION` for each kind of layer."""
        return [[one.call, one.here, "; ".join(one.own_reasons)] for one in self.recording.choices]

    def changes(self) -> list[tuple[str, str, str]]:
        """(change, expected gain, reason) of each advice."""
        return [(one.change, self._gain(one), one.reason) for one in self.advice]

    def passes(self, total: Total) -> str:
        """The milliseconds of each pass, where there are several."""
        parts = [f"{name} {ms(seconds)}" for name, seconds in total.by_phase.items() if seconds >= 0.01 * total.seconds]
        return ", ".join(parts) if len(parts) > 1 else ""

    def _gain(self, advice: Advice) -> str:
        return f"up to {ms(advice.gain)} ms, {self.breakdown.share(advice.gain):.0%} of the step"

    def _operation(self, first: Operation, total: Total) -> list[str]:
        name = first.name if first.primitive in first.name else f"{first.primitive} ({first.name})"
        if total.operations > 1:
            name = f"{first.primitive} ({total.operations} of them)"
        seconds, share, least, _ = self._figures(total.seconds, total.least)
        return [first.scope, first.phase, name, first.category, f"{total.times:,.0f}", seconds, share, least]

    def _figures(self, seconds: float, least: float | None) -> list[str]:
        known = "" if least is None else ms(least)
        reached = f"{least / seconds:.0%}" if least and seconds else ""
        return [ms(seconds), f"{100 * self.breakdown.share(seconds):.1f}", known, reached]


def ms(seconds: float) -> str:
    """Milliseconds, with two decimals."""
    return f"{1e3 * seconds:,.2f}"


def rate(per_second: float) -> str:
    """A rate with three figures and the prefix of its unit."""
    power = min(max(int(math.log10(per_second)) // 3, 0), 5) if per_second >= 1 else 0
    value = per_second / 1000**power
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {['', 'k', 'M', 'G', 'T', 'P'][power]}"
