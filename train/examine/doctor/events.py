"""Reads from a trace of JAX's profiler which operations ran when, and divides a step's time among them.

A GPU's plane has a line for each stream, a TPU's has a line of operations, and on a CPU the threads of the host run them. What is
read is the same: the name of the operation in the compiled program, the device, begin and end.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_DEVICE = re.compile(r"/device:\w+:(\d+)")
_OPERATIONS = ("XLA Ops", "Async XLA Ops")
"""Lines of a TPU's plane; a GPU's has the same where a tool derived them from its streams."""


@dataclasses.dataclass(frozen=True)
class Event:
    """An operation, while it runs. Times are in nanoseconds, on one clock for all devices."""

    operation: str
    """Its name in the compiled program; for what is not of one, such as a transfer from the host, the name of the kernel."""
    module: str
    """The name of the compiled program; empty if the trace does not say."""
    device: int
    start: float
    end: float


def read_events(planes: Iterable[Any], platform: str) -> list[Event]:
    """All operations of a trace.

    Args:
        planes: those of `jax.profiler.ProfileData`.
        platform: of the devices. A CPU's operations run in threads of the host; those of others are only launched there.
    """
    if platform == "cpu":
        return [event for plane in planes if plane.name.startswith("/host:") for event in _on_host(plane)]
    numbered = [(plane, _DEVICE.match(plane.name)) for plane in planes]
    return [event for plane, number in numbered if number for event in _on_device(plane, int(number[1]))]


def _on_device(plane: Any, device: int) -> Iterator[Event]:
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")]
    for line in streams or [line for line in lines if line.name in _OPERATIONS]:
        for event in line.events:
            stats = dict(event.stats)
            # A TPU's events are named by the text of the whole instruction.
            name = str(stats.get("hlo_op") or event.name.partition(" = ")[0].lstrip("%"))
            yield Event(name, _module(stats), device, event.start_ns, event.start_ns + event.duration_ns)


def _on_host(plane: Any) -> Iterator[Event]:
    started, ends = [], {}
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith("end: "):
                # An operation that several threads share ends here, and not where the first thread has handed it over.
                stats = dict(event.stats)
                if "_c" in stats:
                    ends[stats["_c"]] = event.start_ns + event.duration_ns
            elif not event.name.startswith("ThreadpoolListener") and "hlo_op" in (stats := dict(event.stats)):
                started.append((event, stats))
    for event, stats in started:
        end = max(event.start_ns + event.duration_ns, ends.get(stats.get("_p"), 0.0))
        device = int(stats.get("device_ordinal", 0))
        yield Event(str(stats["hlo_op"]), _module(stats), device, event.start_ns, end)


def _module(stats: dict[str, Any]) -> str:
    # Some traces add the program's number, as in `jit_step(12)`.
    return str(stats.get("hlo_module", "")).partition("(")[0]


def divided(events: Sequence[Event], ranks: Sequence[int], start: float, end: float) -> tuple[list[float], float]:
    """How much of the time between `start` and `end` on one device is due to each event, and how much to none.

    Of the events that run at one instant, those of the lowest rank have it in equal parts. So communication of a higher rank
    counts only while the device computes nothing.

    Args:
        events: of one device.
        ranks: of each event.

    Returns:
        Nanoseconds of each event, and idle nanoseconds. They add up to the whole time.
    """
    changes = []
    for index, event in enumerate(events):
        first, last = max(event.start, start), min(event.end, end)
        if last > first:
            changes += [(first, True, index), (last, False, index)]
    changes.sort()
    spent, idle, now = [0.0] * len(events), 0.0, start
    running: dict[int, set[int]] = {rank: set() for rank in sorted(set(ranks))}
    for time, begins, index in changes:
        foremost = next((members for members in running.values() if members), None)
        if foremost is None:
            idle += time - now
        else:
            for member in foremost:
                spent[member] += (time - now) / len(foremost)
        now = time
        members = running[ranks[index]]
        members.add(index) if begins else members.discard(index)
    return spent, idle + end - now
