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
from collections.abc import Callable, Mapping
from types import MappingProxyType

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


@dataclasses.dataclass(frozen=True)
class Operation:
    """Predicted time of an instruction, of one execution in seconds."""

    times: float
    """How often it is executed in a step."""
    arithmetic: float
    """Seconds of its matrix products alone."""
    traffic: float
    """Seconds of what it reads and writes alone; it takes the longer of the two."""
    gap: float
    """Before the next operation."""
    product: bool
    """Whether arithmetic limits it."""

    @property
    def seconds(self) -> float:
        """Of one execution, without the gap."""
        return max(self.arithmetic, self.traffic)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Predicted time of a collective, or of a copy from or to the host, of all its executions in a step."""

    kind: str
    link: str
    where: str
    """The computation in which it runs."""
    span: tuple[str, str]
    """The instructions there with which it begins and ends."""
    count: float
    """Number of executions."""
    seconds: float
    exposed: float
    """Seconds during which nothing is computed."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Predicted times of a compiled step, instruction by instruction."""

    operations: dict[tuple[str, str], Operation]
    """By computation and instruction."""
    transfers: list[Transfer]
    first_touch: float
    """Seconds of the first touch of temporary memory, by the target's profile."""
    flops: float
    bytes: float

    def prediction(self) -> Prediction:
        """The step's time by part."""
        ones = self.operations.values()
        links: dict[str, float] = collections.defaultdict(float)
        for one in self.transfers:
            links[one.link] += one.seconds
        return Prediction(
            sum(one.times * one.seconds for one in ones if one.product),
            sum(one.times * one.seconds for one in ones if not one.product) + self.first_touch,
            sum(one.exposed for one in self.transfers), sum(one.seconds - one.exposed for one in self.transfers),
            dict(links), self.flops, self.bytes, sum(one.times * one.gap for one in ones),
        )  # fmt: skip


LinkOf = Callable[[tuple[int, ...]], tuple[str, float]]
"""Partitions that communicate → the kind of link between them, and its bytes per second for one device."""


def predict(module: Module, target: Target, link_of: LinkOf, temporary: float = 0.0) -> Prediction:
    """The step's time on `target`; arguments as of `costs_of`."""
    return costs_of(module, target, link_of, temporary).prediction()


def costs_of(module: Module, target: Target, link_of: LinkOf, temporary: float = 0.0) -> Costs:
    """The step's time on `target`, instruction by instruction.

    Args:
        temporary: bytes of temporary memory of the step, whose first touch takes time where the profile says so.
    """
    flops = traffic = 0.0
    profile = target.profile
    # Virtual devices take turns.
    turns = target.turns
    found: dict[tuple[str, str], Operation] = {}
    for times, where, instruction in module.executed():
        if instruction.opcode in _FREE or instruction.opcode.startswith(_SENDING) or "-done" in instruction.opcode:
            continue
        work, moved = flops_of(module, where, instruction), bytes_of(module, where, instruction)
        flops, traffic = flops + times * work, traffic + times * moved
        if (before := found.get((where, instruction.name))) is not None:
            # A computation that is called from several places.
            found[where, instruction.name] = dataclasses.replace(before, times=before.times + times)
            continue
        gap = 0.0
        if cycles := _CYCLES.search(instruction.attributes) if target.clock else None:
            seconds = int(cycles.group(1)) / target.clock
            by_flops, by_bytes = (seconds, 0.0) if work else (0.0, seconds)
        elif profile is None:
            by_flops = work / (target.peak_flops * target.matmul_efficiency)
            by_bytes = moved / (target.memory_bandwidth * target.memory_efficiency)
        else:
            both = by_profile(module, where, instruction, target, profile, work, moved)
            by_flops, by_bytes = (turns * seconds for seconds in both)
            gap = turns * profile.gap
        product = bool(work and (target.clock or by_flops >= by_bytes))
        found[where, instruction.name] = Operation(times, by_flops, by_bytes, gap, product)
    first_touch = 0.0
    if profile is not None and profile.fresh and temporary >= KEPT:
        first_touch = turns * temporary / (profile.fresh * profile.memory_efficiency)
    return Costs(found, transfers_of(module, target, link_of, found), first_touch, flops, traffic)


def transfers_of(
    module: Module, target: Target, link_of: LinkOf, operations: Mapping[tuple[str, str], Operation],
    faster: Mapping[str, float] = MappingProxyType({}),
) -> list[Transfer]:  # fmt: skip
    """All communication of a step, with what the operations between its start and its end leave exposed.

    Args:
        faster: how many times the bandwidth of a kind of link is to be taken.
    """
    # Seconds of each instruction, in the order of its computation; concurrent communication overlaps with them.
    spent: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for (where, name), operation in operations.items():
        spent[where][name] = operation.times * operation.seconds

    def hidden(seconds: float, where: str, span: tuple[str, str]) -> float:
        return hide(seconds, list(module.computations[where]), span, spent[where])

    found = []
    for times, where, instruction in module.executed():
        if instruction.on_host and target.chip.host:
            seconds = times * instruction.shapes[0].bytes / target.chip.host / faster.get("PCIe", 1.0)
            span = (instruction.name, module.end_of(where, instruction))
            exposed = seconds - hidden(seconds, where, span)
            found.append(Transfer("copy", "PCIe", where, span, times, seconds, exposed))
    profile = target.profile
    for one in module.collectives():
        link, bandwidth = link_of(one.group)
        wire = None if profile is None else profile.wire(one.kind, len(one.group))
        total = one.total / faster.get(link, 1.0)
        if wire is None:
            seconds = total / bandwidth + one.count * target.latency * math.log2(max(len(one.group), 2))
        else:
            # Groups of virtual devices communicate in turns.
            groups = target.num_devices / len(one.group) if target.turns > 1 else 1
            seconds = groups * (total / wire.bandwidth + one.count * wire.latency)
        overlapped = hidden(seconds, one.where, one.span) if one.asynchronous else 0.0
        found.append(Transfer(one.kind, link, one.where, one.span, one.count, seconds, seconds - overlapped))
    return found


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
