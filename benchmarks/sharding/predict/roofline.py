"""Predicts the time of a compiled step on a target: the roofline of each operation, and the exposed communication.

Every operation takes the longer of its arithmetic at the chip's peak and its bytes at the memory's bandwidth (Williams et
al. 2009); if a TPU's compiler annotates its own estimate in cycles, that is used
instead. Communication overlaps with the operations that the compiler scheduled between its start and its end; the rest is
exposed.

Where the target has a profile, measured rates stand in the peaks' place: of each matrix product by its type and size, of other
operations by their kind and bytes; and each executed operation takes a gap in addition.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable

from benchmarks.sharding.devices.profile import COPY, ELEMENTWISE, REDUCTION, SCATTER, TRANSPOSE, Profile
from benchmarks.sharding.devices.targets import Target
from train.program.hlo import Instruction, Module
from train.program.work import bytes_of, flops_of, numbers_of, parts_of, products_of

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain",
}  # fmt: skip
_SENDING = (
    "all-", "reduce-scatter", "ragged-", "collective-", "copy-start", "slice-start", "async-", "send", "recv",
)  # fmt: skip
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_FEW = 1024
KEPT = 2**25
"""Bytes up to which glibc keeps a block of memory that was freed for the next one; a larger one is touched anew."""
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
    gaps: float = 0.0
    """Between operations, by the target's profile."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.compute + self.memory + self.exposed + self.gaps

    @property
    def bound(self) -> str:
        """The largest part of it."""
        parts = {"matmul": self.compute, "memory": self.memory + self.gaps}
        if self.links and self.exposed > 0:
            parts[max(self.links, key=lambda link: self.links[link])] = self.exposed
        return max(parts, key=lambda part: parts[part])


def predict(
    module: Module, target: Target, link_of: Callable[[tuple[int, ...]], tuple[str, float]], temporary: float = 0.0
) -> Prediction:
    """The step's time on `target`.

    Args:
        link_of: partitions that communicate → the kind of link between them and its bytes per second for one device.
        temporary: bytes of temporary memory of the step, whose first touch takes time where the profile says so.
    """
    compute = memory = flops = traffic = gaps = 0.0
    profile = target.profile
    # Virtual devices take turns.
    turns = target.turns
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
        cycles = _CYCLES.search(instruction.attributes) if target.clock else None
        if profile is None or cycles:
            by_flops = work / (target.peak_flops * target.matmul_efficiency)
            by_bytes = moved / (target.memory_bandwidth * target.memory_efficiency)
        else:
            both = by_profile(module, where, instruction, target, profile, work, moved)
            by_flops, by_bytes = (turns * seconds for seconds in both)
            gaps += times * turns * profile.gap
        seconds = int(cycles.group(1)) / target.clock if cycles else max(by_flops, by_bytes)
        if work and (target.clock or by_flops >= by_bytes):
            compute += times * seconds
        else:
            memory += times * seconds
        spent[where][instruction.name] = times * seconds
    if profile is not None and profile.fresh and temporary >= KEPT:
        memory += turns * temporary / (profile.fresh * profile.memory_efficiency)
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
        wire = None if profile is None else profile.wire(one.kind, len(one.group))
        if wire is None:
            seconds = one.total / bandwidth + one.count * target.latency * math.log2(max(len(one.group), 2))
        else:
            # Groups of virtual devices communicate in turns.
            groups = target.num_devices / len(one.group) if turns > 1 else 1
            seconds = groups * (one.total / wire.bandwidth + one.count * wire.latency)
        links[link] += seconds
        behind = 0.0
        if one.asynchronous:
            behind = hide(seconds, list(module.computations[one.where]), one.span, spent[one.where])
        overlapped, exposed = overlapped + behind, exposed + seconds - behind
    return Prediction(compute, memory, exposed, overlapped, dict(links), flops, traffic, gaps)


def by_profile(
    module: Module, where: str, instruction: Instruction, target: Target, profile: Profile, work: float, moved: float
) -> tuple[float, float]:
    """Seconds of an instruction's arithmetic, `work` FLOPs, and of what it reads and writes, `moved` bytes, by measured rates.

    Products of unknown shape, such as those in a library's attention, take the profile's rate of attention, or the highest rate
    that was measured for the type.
    """
    arithmetic = known = 0.0
    # Virtual devices run theirs at the same time, and so do cores: together they are as one operation of all their work.
    turns = target.turns
    for product in products_of(module, where, instruction):
        dtype = _DTYPES.get(product.dtype, target.dtype)
        rate = profile.rate(dtype, turns * product.flops, product.smallest, product.batch)
        arithmetic += product.flops / (rate or target.peak_flops * target.matmul_efficiency)
        known += product.flops
    if (rest := work - known) > 0:
        best = max((one.rate for one in profile.products if one.dtype == target.dtype), default=0.0)
        arithmetic += rest / (profile.attention or best or target.peak_flops * target.matmul_efficiency)
    through = moved / profile.bandwidth(kind_of(module, where, instruction), turns * moved)
    transcendental, plain = numbers_of(module, where, instruction)
    through += transcendental * profile.transcendental + plain * profile.arithmetic
    return arithmetic / profile.product_efficiency, through / profile.memory_efficiency


def kind_of(module: Module, where: str, instruction: Instruction) -> str:
    """Which of the profile's kinds an operation is that is not a matrix product."""
    where, inside = parts_of(module, where, instruction)
    opcodes = {one.opcode for one in inside}
    if "scatter" in opcodes:
        return SCATTER
    if any(_transposes(module, where, one) for one in inside):
        return TRANSPOSE
    if "reduce" in opcodes:
        return REDUCTION
    return COPY if opcodes & {"copy", "transpose"} else ELEMENTWISE


def _transposes(module: Module, where: str, one: Instruction) -> bool:
    """Whether an operation of more than a few numbers parts those that are neighbours in memory."""
    if one.opcode not in ("copy", "transpose") or not one.shapes or one.shapes[0].elements < _FEW:
        return False
    sources = module.operands(where, one)
    if not sources or not sources[0].shapes:
        return False
    source, result = sources[0].shapes[0].minor, one.shapes[0].minor
    if (
        one.opcode == "transpose"
        and (order := re.search(r"dimensions=\{([\d,]*)\}", one.attributes))
        and result is not None
    ):
        result = [int(dim) for dim in order.group(1).split(",")][result]
    return source != result and min(sources[0].shapes[0].dims[source or 0], 2) > 1


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
