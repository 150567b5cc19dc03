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

from benchmarks.sharding.hlo import Instruction, Module
from benchmarks.sharding.targets import Target

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


def flops_of(module: Module, where: str, instruction: Instruction) -> float:
    """Multiplications and additions of the matrix products in an instruction, 2 for each pair."""
    match instruction.opcode:
        case "dot":
            left = module.operands(where, instruction)[0].shapes[0]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            dims = [int(one) for one in contracted.group(1).split(",") if one] if contracted else []
            return 2.0 * instruction.shapes[0].elements * math.prod(left.dims[dim] for dim in dims)
        case "convolution":
            return _convolution_flops(module, where, instruction)
        case "custom-call":
            return _library_flops(module, where, instruction)
        case "fusion":
            if instruction.called in module.computations:
                inside = module.computations[instruction.called].values()
                return sum(flops_of(module, instruction.called, one) for one in inside)
    return 0.0


def _convolution_flops(module: Module, where: str, instruction: Instruction) -> float:
    """Matrix products as a TPU's compiler writes them: convolutions over the kernel's window and its input features."""
    operands = module.operands(where, instruction)
    labels = re.search(r"dim_labels=\w+_(\w+)->\w+", instruction.attributes)
    if labels is None or len(operands) < 2:
        return 0.0
    kernel = operands[1].shapes[0].dims
    inner = math.prod(size for size, label in zip(kernel, labels.group(1), strict=False) if label != "o")
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    # A batch dim is written as a window, all of whose positions but one meet padding, or gaps between the input's numbers.
    if window := re.search(r"window=\{([^}]*)\}", instruction.attributes):
        fields = dict(field.split("=") for field in window.group(1).split())
        sizes = [int(size) for size in fields["size"].split("x")]
        holes = fields.get("lhs_dilate", "x".join("1" * len(sizes))).split("x")
        pads = fields.get("pad", "x".join(["0_0"] * len(sizes))).split("x")
        for size, hole, pad in zip(sizes, holes, pads, strict=True):
            if size > 1 and (int(hole) == size or pad == f"{size - 1}_{size - 1}"):
                inner //= size
    return 2.0 * instruction.shapes[0].elements * inner / (int(groups.group(1)) if groups else 1)


def _library_flops(module: Module, where: str, instruction: Instruction) -> float:
    """FLOPs of cuBLAS's and cuDNN's own kernels, and of the attention kernel for TPUs that ships with JAX."""
    operands = module.operands(where, instruction)
    if "cublas" in instruction.attributes and len(operands) >= 2:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        dims = [int(one.strip('" ')) for one in contracted.group(1).split(",")] if contracted else []
        result = max(instruction.shapes, key=lambda shape: shape.elements)
        return 2.0 * result.elements * math.prod(operands[0].shapes[0].dims[dim] for dim in dims)
    if "splash" in instruction.attributes and "tpu_custom_call" in instruction.attributes:
        shapes = [shape for one in operands for shape in one.shapes if len(shape.dims) >= 3 and shape.elements > 1]
        if not shapes:
            return 0.0
        # [..., N, T, H] for both queries and keys; fully masked blocks are skipped.
        queries = max(shapes, key=lambda shape: shape.elements).dims
        pairs = math.prod(queries[:-1]) * queries[-2] * (0.5 if "static_sparsity" in instruction.attributes else 1.0)
        products = 5 if "dkv" in instruction.attributes else 3 if "_dq" in instruction.attributes else 2
        return 2.0 * pairs * queries[-1] * products
    if "fmha" in instruction.attributes and len(operands) >= 3:
        q, k = operands[0].shapes[0].dims, operands[1].shapes[0].dims
        # [B, T, N, H]: two products forward, five backward; the kernel skips blocks that a causal mask hides.
        pairs = q[0] * q[2] * q[1] * k[1] * (0.5 if "CAUSAL" in instruction.attributes else 1.0)
        return 2.0 * pairs * q[3] * (5 if "backward" in instruction.attributes.lower() else 2)
    return 0.0


def bytes_of(module: Module, where: str, instruction: Instruction) -> float:
    """Bytes that an instruction reads and writes; if it only takes or changes a slice of a large array, that slice."""
    operands = module.operands(where, instruction)
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * instruction.bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes
    if instruction.opcode != "fusion" or instruction.called not in module.computations:
        return instruction.bytes + sum(one.bytes for one in operands)
    inside = module.computations[instruction.called]
    readers = collections.defaultdict(list)
    for one in inside.values():
        for name in one.operands:
            readers[name].append(one)
    total, parameters = 0.0, [one for one in inside.values() if one.opcode == "parameter"]
    for parameter in parameters:
        users = readers[parameter.name]
        while len(users) == 1 and users[0].opcode == "bitcast":
            parameter, users = users[0], readers[users[0].name]
        if users and all(user.opcode in ("dynamic-slice", "gather") for user in users):
            total += sum(user.bytes for user in users)
        elif not (users and all(_updates(user, parameter.name) for user in users)):
            total += parameter.bytes
    changed = [one for one in inside.values() if one.opcode == "dynamic-update-slice"]
    if changed and any(one.bytes >= 0.5 * instruction.bytes for one in changed):
        return total + sum(inside[one.operands[1]].bytes for one in changed if one.operands[1] in inside)
    return total + instruction.bytes


def _updates(user: Instruction, name: str) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name
