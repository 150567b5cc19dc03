"""Parses a compiled program's text (HLO): what is executed, how often, and what it sends.

XLA's own `cost_analysis` counts the body of a loop once, and is absent for GPUs compiled ahead. Here the text is parsed: loops
count as often as they run, and a collective that the compiler split counts once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from transformer.loop_length import SCOPE

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9][a-z]*)?)\[([0-9,]*)\](?:\{(\d+)?([^}]*)\}?)?")
_SPACE = re.compile(r"S\((\d+)\)")
_DONATED = re.compile(r"\{(\d+)\}: \((\d+), \{\}")
_OPERAND = re.compile(r"%([\w.\-]+)")
_EXPECTED = re.compile(re.escape(SCOPE) + r"([\d.]+(?:e[+-]\d+)?)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array."""

    dtype: str
    dims: tuple[int, ...]
    minor: int | None = None
    """The dim whose neighbours are neighbours in memory; None if the text has no layout."""
    space: int = 0
    """The compiler's number of the memory that it is in; 0 is the device's own."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Its size."""
        return self.elements * BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    """Shapes of the result; several for a tuple."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    """Everything after the operands."""
    text: str
    """The operands, as written."""
    root: bool
    """Whether it is the result of its computation."""
    on_host: bool
    """Whether it transfers something from or to host memory."""

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def index(self) -> int | None:
        """Index of the tuple element that it takes."""
        found = re.search(r"\bindex=(\d+)", self.attributes)
        return int(found.group(1)) if found else None

    @property
    def called(self) -> str | None:
        """The computation that it calls; for a loop, its body."""
        found = re.search(r"(?:calls|body|to_apply)=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective in which a device takes part, and how often in a step."""

    kind: str
    count: float
    """Number of executions."""
    sent: float
    """Bytes that a device sends each time, by the algorithm that sends the least: (n-1) slices for a gather, and so on."""
    group: tuple[int, ...]
    """The partitions of the first group that communicates."""
    asynchronous: bool
    """Whether the compiler overlaps it with other work."""
    dtype: str
    stage: str
    """The part of the model that it belongs to, by its named scope."""
    where: str
    """The computation in which it runs."""
    span: tuple[str, str]
    """The instructions there with which it begins and ends; those between can overlap with it."""

    @property
    def total(self) -> float:
        """Bytes that a device sends in a step."""
        return self.count * self.sent


class Module:
    """A compiled program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.uncounted: set[str] = set()
        self.expected: set[str] = set()
        """Loops whose length the data decide, and which count as often as the model expects."""
        self.donated: dict[int, int] = {}
        """Results that are written into an argument: the index of the result, and the number of the parameter."""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            # Attributes may span several lines, which may also begin with a bracket.
            if line.rstrip() == "}":
                current = None
            elif line.startswith("HloModule"):
                aliases = line.partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
                self.donated = {int(result): int(argument) for result, argument in _DONATED.findall(aliases)}
            elif current is None:
                if header := _HEADER.match(line):
                    current = self.computations.setdefault(header.group(2), {})
                    if header.group(1):
                        self.entry = header.group(2)
            elif (instruction := _parse(line)) is not None:
                current[instruction.name] = instruction

    def executed(self) -> Iterator[tuple[float, str, Instruction]]:
        """(times, computation, instruction) of everything that runs; a fusion is one instruction, a loop is expanded."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: float) -> Iterator[tuple[float, str, Instruction]]:
        for instruction in self.computations.get(name, {}).values():
            yield from self.expanded(name, instruction, times)

    def expanded(
        self, name: str, instruction: Instruction, times: float = 1
    ) -> Iterator[tuple[float, str, Instruction]]:
        """(times, computation, instruction) of all that an instruction of the computation `name` executes in `times` runs."""
        match instruction.opcode:
            case "while":
                assert instruction.called is not None
                yield from self._executed(instruction.called, times * self.trips(instruction))
            case "call":
                yield from self._executed(instruction.called or "", times)
            case "conditional":
                # A device takes one branch: the most expensive is counted, as the others wait for it.
                weighed = [list(self._executed(branch, times)) for branch in branches_of(instruction)]
                yield from max(weighed, key=len, default=[])
            case _:
                yield times, name, instruction

    def trips(self, loop: Instruction) -> float:
        """The trip count of a loop: the compiler's annotation, or derived from its counter's bound and increment.

        A loop with a computed bound, such as one over the unmasked blocks, counts as often as its scope expects
        (`expected_trips`), else once, and `uncounted` names it.
        """
        if found := _TRIPS.search(loop.attributes):
            return int(found.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        assert condition is not None and loop.called is not None
        inside, body = self.computations[condition.group(1)], self.computations[loop.called]
        test = _root(inside)
        compared = [_source(inside, name) for name in test.operands]
        limits = [int(one.text) for one in compared if one is not None and one.opcode == "constant"]
        counters = [one.index for one in compared if one is not None and one.opcode == "get-tuple-element"]
        if test.opcode != "compare" or len(limits) != 1 or len(counters) != 1 or counters[0] is None:
            if expected := _EXPECTED.findall(op_name(loop)):
                self.expected.add(loop.name)
                return max(float(expected[-1]), 1.0)
            self.uncounted.add(loop.name)
            return 1
        # An unrolled loop increments by more than 1.
        added = _source(body, _root(body).operands[counters[0]])
        if added is None or added.opcode != "add":
            return limits[0]
        steps = [
            one for name in added.operands if (one := _source(body, name)) is not None and one.opcode == "constant"
        ]
        return -(-limits[0] // int(steps[0].text)) if steps else limits[0]

    def operands(self, computation: str, instruction: Instruction) -> list[Instruction]:
        """The instructions that an instruction reads."""
        inside = self.computations[computation]
        return [inside[name] for name in instruction.operands if name in inside]

    def collectives(self) -> list[Collective]:
        """All communication, in every form that the compiler uses."""
        found = []
        # A TPU's compiler splits a collective into pieces that overlap with several other operations.
        pieces: dict[str, Collective] = {}
        for times, name, instruction in self.executed():
            if (kind := collective_kind(instruction.opcode)) is not None:
                if not instruction.opcode.endswith("-done"):
                    span = (instruction.name, self.end_of(name, instruction))
                    found.append(self._collective(kind, times, name, instruction, name, span))
            elif instruction.opcode in ("fusion", "async-start") and instruction.called in self.computations:
                inner = self.computations[instruction.called]
                sliced = any(one.opcode == "dynamic-slice" for one in inner.values())
                for one in inner.values():
                    if (kind := collective_kind(one.opcode)) is None or one.opcode.endswith("-done"):
                        continue
                    kind = "reduce-scatter" if kind == "all-reduce" and sliced else kind
                    span = (instruction.name, self.end_of(name, instruction))
                    whole = self._collective(kind, times, instruction.called, one, name, span)
                    channel = re.search(r"channel_id=(\d+)", one.attributes)
                    key = channel.group(1) if channel else f"{instruction.called} {one.name}"
                    before = pieces.get(key)
                    if before is None or whole.count < before.count:
                        pieces[key] = whole
                    elif before.where == name:
                        pieces[key] = dataclasses.replace(before, span=(before.span[0], span[1]), asynchronous=True)
        return [one for one in (*found, *pieces.values()) if one.sent > 0]

    def end_of(self, where: str, instruction: Instruction) -> str:
        """The instruction that waits for the result of an asynchronous start; itself if nothing waits."""
        for one in self.computations[where].values():
            if "-done" in one.opcode + one.name and instruction.name in one.operands:
                return one.name
        return instruction.name

    def _collective(
        self, kind: str, times: float, inside: str, instruction: Instruction, where: str, span: tuple[str, str]
    ) -> Collective:
        given = self.operands(inside, instruction)
        size = sum(one.bytes for one in given) or instruction.bytes
        group = _first_group(instruction.attributes)
        n = max(len(group), 1)
        share = (n - 1) / n
        match kind:
            case "all-gather":
                sent = (n - 1) * size
            case "all-reduce":
                sent = 2 * share * size
            case "collective-permute" | "collective-broadcast":
                sent = size if n > 1 else 0.0
            case _:
                sent = share * size
        shapes = [shape for one in given for shape in one.shapes] or list(instruction.shapes)
        dtype = max(shapes, key=lambda shape: shape.bytes).dtype
        # Inside a fusion it overlaps with the fusion's own work.
        asynchronous = span[0] != span[1] or inside != where
        return Collective(kind, times, sent, group, asynchronous, dtype, stage_of(instruction), where, span)


def stage_of(instruction: Instruction) -> str:
    """The model's named scopes of an instruction, such as `layers/attention`, and whether it is in the backward pass."""
    path = op_name(instruction)
    backward = "backward " if "transpose(" in path else "again " if "rematted" in path else ""
    return backward + "/".join(_words(path)[:2])


def scopes_of(instruction: Instruction) -> tuple[str, ...]:
    """All named scopes of an instruction, outermost first, without the name of the operation itself."""
    return tuple(_words(op_name(instruction).rpartition("/")[0]))


def pass_of(instruction: Instruction) -> str:
    """The pass of an instruction: forward, backward, or recomputed, which is the forward pass again for the backward one."""
    path = op_name(instruction)
    return "recomputed" if "rematted" in path else "backward" if "transpose(" in path else "forward"


def primitive_of(instruction: Instruction) -> str:
    """JAX's name of the operation that an instruction comes from, such as `dot_general`; empty if none is known."""
    return op_name(instruction).rpartition("/")[2]


def op_name(instruction: Instruction) -> str:
    """The path that JAX gave an instruction; of several that were merged, the first."""
    found = re.search(r'op_name="([^";]*)', instruction.attributes)
    # Those of one scope are merged as `scope/(a:b:c)`.
    return re.sub(r"/\(([^:]*):.*", r"/\1", found.group(1)) if found else ""


def _words(path: str) -> list[str]:
    scopes = []
    for part in path.split("/"):
        word = re.sub(r"^(?:transpose\(|jvp\()+|\)+$", "", part)
        if re.fullmatch(r"[a-z_]+", word) and word not in _PLUMBING and word not in scopes:
            scopes.append(word)
    return scopes


_PLUMBING = {
    "jit", "step", "while", "body", "closed_call", "checkpoint", "rematted_computation", "cond", "shard_map",
    "custom_vjp_call", "custom_jvp_call",
}  # fmt: skip


def collective_kind(opcode: str) -> str | None:
    """Which of `COLLECTIVES` an opcode is, or starts or ends; None: it does not communicate."""
    base = opcode.removesuffix("-start").removesuffix("-done")
    return base if base in COLLECTIVES else None


def _parse(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    start = found.end()
    end = _closing(line, start) if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    inner = line[opcode.end() : close - 1]
    # An asynchronous start repeats its operands in its result.
    shapes = tuple(
        Shape(
            dtype,
            tuple(int(dim) for dim in dims.split(",") if dim),
            int(minor) if minor else None,
            int(space.group(1)) if (space := _SPACE.search(rest)) else 0,
        )
        for dtype, dims, minor, rest in _ARRAY.findall(line[start:end])
    )
    return Instruction(
        found.group(1), shapes, opcode.group(1), tuple(_OPERAND.findall(inner)), line[close:], inner.strip(),
        line.lstrip().startswith("ROOT "), opcode.group(1) == "copy-start" and "S(5)" in line[start:end],
    )  # fmt: skip


def _closing(line: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(line)):
        if line[index] == "(":
            depth += 1
        elif line[index] == ")":
            depth -= 1
            if not depth:
                return index + 1
    return len(line)


def _source(computation: dict[str, Instruction], name: str) -> Instruction | None:
    """The source of an operand, through the copies that the compiler inserts."""
    found = computation.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "copy-start", "copy-done") and found.operands:
        found = computation.get(found.operands[0])
    return found


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(one for one in computation.values() if one.root)


def branches_of(instruction: Instruction) -> list[str]:
    """The computations of a conditional, of which a device runs one."""
    found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if found:
        return [name.strip().lstrip("%") for name in found.group(1).split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)


def _first_group(attributes: str) -> tuple[int, ...]:
    """The partitions of a collective's first group, in whichever notation it has.

    Raises:
        ValueError: an unknown notation. Treating it as no group would hide its communication.
    """
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        pairs = re.findall(r"\{(\d+),(\d+)\}", attributes[found.start() :].partition("}}")[0] + "}")
        return next(((int(a), int(b)) for a, b in pairs if a != b), (0,))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return tuple(int(one) for one in found.group(1).split(",") if one)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return tuple(_ids(found.group(3)).tolist())[: int(found.group(2))]
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}"
    if found := re.search(mesh, attributes):
        axes = [one.split("=") for one in found.group(1).replace("'", "").split(",")]
        names, sizes = [name.strip() for name, _ in axes], [int(size) for _, size in axes]
        used = [names.index(one.strip()) for one in found.group(3).replace("'", "").split(",") if one.strip()]
        order = [index for index in range(len(sizes)) if index not in used] + used
        ids = _ids(found.group(2) or str(sizes).replace(" ", "")).reshape(sizes).transpose(order).reshape(-1)
        return tuple(ids.tolist())[: math.prod(sizes[index] for index in used)]
    raise ValueError(f"a collective whose groups have an unknown notation: {attributes[:200]}")


def _ids(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0 as an array of these dims, transposed to this order, and flattened."""
    dims, _, order = text.partition("T")
    sizes = [int(one) for one in dims.strip("[]").split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose([int(one) for one in order.strip("()").split(",")]) if order else ids).reshape(-1)
