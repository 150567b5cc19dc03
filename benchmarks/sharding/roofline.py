"""Predicts the time of a compiled step on a target: the roofline of each operation, and the exposed communication.

Every operation takes the longer of its arithmetic at the chip's peak and its bytes at the memory's bandwidth (Williams et
al. 2009); if a TPU's compiler annotates its own estimate in cycles, that is used
instead. Communication overlaps with the operations that the compiler scheduled between its start and its end; the rest is
exposed.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable

from benchmarks.sharding.targets import Target
from train.program.hlo import Module
from train.program.work import bytes_of, flops_of

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain",
}  # fmt: skip
_SENDING = (
    "all-", "reduce-scatter", "ragged-", "collective-", "copy-start", "slice-start", "async-", "send", "recv",
)  # fmt: skip
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step's time by part, in seconds."""

    compute: float
    """Arithmetic-bound operations."""
    memory: float
    """Operations bound by memory bandwidth."""
    exposed: float
    """Exposed communication."""
    overlapped: float
    """Communication that overlaps with other work; not part of the step's time."""
    links: dict[str, float]
    """Seconds of communication by kind of link."""
    flops: float
    """FLOPs of one device, recomputation included."""
    bytes: float
    """Bytes read and written by one device."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.compute + self.memory + self.exposed

    @property
    def bound(self) -> str:
        """The largest part of it."""
        parts = {"matmul": self.compute, "memory": self.memory}
        if self.links and self.exposed > 0:
            parts[max(self.links, key=lambda link: self.links[link])] = self.exposed
        return max(parts, key=lambda part: parts[part])


def predict(module: Module, target: Target, link_of: Callable[[tuple[int, ...]], tuple[str, float]]) -> Prediction:
    """The step's time on `target`.

    Args:
        link_of: partitions that communicate → the kind of link between them and its bytes per second for one device.
    """
    compute = memory = flops = traffic = 0.0
    # Seconds of each instruction, in the order of its computation; concurrent communication overlaps with them.
    spent: dict[str, dict[str, float]] = collections.defaultdict(dict)
    copies = []
    for times, where, instruction in module.executed():
        if instruction.on_host and target.chip.host:
            copies.append((times, where, instruction))
        if instruction.opcode in _FREE or instruction.opcode.startswith(_SENDING) or "-done" in instruction.opcode:
            continue
        work, moved = flops_of(module, where, instruction), bytes_of(module, where, instruction)
        flops, traffic = flops + times * work, traffic + times * moved
        by_flops = work / (target.peak_flops * target.matmul_efficiency)
        by_bytes = moved / (target.memory_bandwidth * target.memory_efficiency)
        seconds = max(by_flops, by_bytes)
        if target.clock and (cycles := _CYCLES.search(instruction.attributes)):
            seconds = int(cycles.group(1)) / target.clock
        if work and (target.clock or by_flops >= by_bytes):
            compute += times * seconds
        else:
            memory += times * seconds
        spent[where][instruction.name] = times * seconds
    exposed = overlapped = 0.0
    links: dict[str, float] = collections.defaultdict(float)
    for times, where, instruction in copies:
        seconds = times * instruction.shapes[0].bytes / target.chip.host
        span = (instruction.name, module.end_of(where, instruction))
        behind = hide(seconds, list(module.computations[where]), span, spent[where])
        links["PCIe"] += seconds
        overlapped, exposed = overlapped + behind, exposed + seconds - behind
    for one in module.collectives():
        link, bandwidth = link_of(one.group)
        seconds = one.total / bandwidth + one.count * target.latency * math.log2(max(len(one.group), 2))
        links[link] += seconds
        behind = 0.0
        if one.asynchronous:
            behind = hide(seconds, list(module.computations[one.where]), one.span, spent[one.where])
        overlapped, exposed = overlapped + behind, exposed + seconds - behind
    return Prediction(compute, memory, exposed, overlapped, dict(links), flops, traffic)


def hide(seconds: float, order: list[str], span: tuple[str, str], spent: dict[str, float]) -> float:
    """Seconds that overlap with the instructions of a span; that time is then used up."""
    left = seconds
    for name in order[order.index(span[0]) : order.index(span[1]) + 1]:
        if name in spent:
            # Subtracted from both, so that rounding makes neither negative.
            taken = min(left, spent[name])
            left -= taken
            spent[name] -= taken
    return seconds - left
