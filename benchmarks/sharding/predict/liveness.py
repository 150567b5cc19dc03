"""Which arrays of a compiled program are in memory at each of its instructions.

The compiler schedules a program, so the instructions of a computation are in the order of their execution. An array lives from
the instruction that makes it to the last one that reads it; arguments live throughout. Tuples, bitcasts, updates in place, what a
loop carries and results that are written into an argument have no memory of their own. A loop's or a call's own arrays live while
it runs, so its peak is that of its body, and bodies may hold loops in turn.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterator

import numpy as np

from benchmarks.sharding.predict.array_kinds import KINDS, Array, kinds_of, phase_of
from train.program.hlo import Instruction, Module, branches_of
from train.program.work import ELEMENTWISE

_ALIASES = {"bitcast", "opt-barrier", "domain", "add-dependency", "async-update"}
_IN_PLACE = ("dynamic-update-slice", "scatter")
_MATERIALISED = (
    "reduce",
    "dot",
    "convolution",
    "scatter",
    "gather",
    "custom-call",
    "reduce-window",
    "sort",
    "all-to-all",
)
"""Operations after which an array no longer holds numbers of its operand."""
_OUTPUTS = re.compile(r"\{([\d,]*)\}: \((\d+), \{[\d,]*\}")

Value = Array | list["Value"]
"""The result of an instruction: an array, or of a tuple the results that it consists of."""


@dataclasses.dataclass
class Frame:
    """The arrays of one execution of a computation."""

    arrays: list[tuple[int, int, Array]]
    """First and last instruction by index, of those that are neither arguments of the computation nor in its caller's memory."""
    inner: dict[int, Frame]
    """Of loops, calls and conditionals, by index of the instruction."""
    root: Value
    length: int
    """Number of instructions."""
    own: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    """Bytes by instruction and kind, [instructions, kinds], without what inner frames add."""

    def at(self, index: int) -> np.ndarray:
        """Bytes by kind while an instruction runs, at its own peak."""
        inside = self.inner.get(index)
        return self.own[index] + (0.0 if inside is None else inside.peak())

    def peak(self) -> np.ndarray:
        """Bytes by kind at the instruction at which they are the most."""
        if not self.length:
            return np.zeros(len(KINDS))
        most = self.own.copy()
        for index in self.inner:
            most[index] = self.at(index)
        return most[most.sum(1).argmax()]


def lifetimes(module: Module, elsewhere: Collection[int] = (5,)) -> Frame:
    """The arrays of the entry computation.

    Args:
        elsewhere: the compiler's numbers of memories that are not the device's own, such as 5, the host's.
    """
    analysis = _Analysis(module, elsewhere)
    entry = analysis.frame(module.entry, None, None)
    last = entry.length - 1
    written = {id(one) for one in analysis.donated(entry.root)}
    kept = {id(one) for one in _flat(entry.root)}
    arrays = []
    for first, end, array in entry.arrays:
        if array.argument is not None:
            arrays.append((0, last, array))
        elif id(array) not in written:
            arrays.append((first, last if id(array) in kept else end, array))
    entry.arrays = arrays
    kinds = kinds_of(analysis.arrays)
    for frame in analysis.frames:
        frame.own = np.zeros((frame.length + 1, len(KINDS)))
        for first, end, array in frame.arrays:
            column = KINDS.index(kinds[id(array)])
            frame.own[first, column] += array.bytes
            frame.own[end + 1, column] -= array.bytes
        frame.own = frame.own.cumsum(0)[:-1]
    return entry


class _Analysis:
    """Follows values through a program's computations."""

    def __init__(self, module: Module, elsewhere: Collection[int]) -> None:
        self.module, self.elsewhere = module, elsewhere
        self.arrays: list[Array] = []
        self.frames: list[Frame] = []

    def frame(self, name: str, given: list[Value] | None, phase: str | None) -> Frame:
        """One execution of a computation.

        Args:
            given: values of its parameters; None: it is the entry, and they are the program's arguments.
            phase: of the step, of its caller.
        """
        order = list(self.module.computations.get(name, {}).values())
        values: dict[str, Value] = {}
        ends: dict[int, int] = {}
        own: list[tuple[int, Array]] = []
        shared: list[tuple[int, Array, Array]] = []
        inner: dict[int, Frame] = {}
        done = {one.operands[0]: one for one in order if one.opcode.endswith("-done") and one.operands}
        root: Value = []
        for index, one in enumerate(order):
            operands = [values[operand] for operand in one.operands if operand in values]
            read = list(_flat(operands))
            label = phase_of(one) or max((array.last_written for array in read), default=None, key=_rank) or phase
            made: Value
            match one.opcode:
                case "parameter" if given is not None:
                    made = given[int(one.text)]
                case "tuple":
                    made = operands
                case "get-tuple-element":
                    whole, place = operands[0], one.index or 0
                    made = whole[place] if isinstance(whole, list) and place < len(whole) else whole
                case opcode if opcode in _ALIASES or opcode.endswith("-done"):
                    made = operands[0]
                case "while":
                    made = operands[0]
                    inner[index] = body = self.frame(one.called or "", [made], label)
                    self._merge(body, body.root, made)
                case "call":
                    inner[index] = called = self.frame(one.called or "", operands, label)
                    made = called.root
                    # What it returns stays.
                    returned = {id(array) for array in _flat(made)}
                    own += [(index, array) for _, _, array in called.arrays if id(array) in returned]
                    called.arrays = [each for each in called.arrays if id(each[2]) not in returned]
                case "conditional":
                    made = self._fresh(one, one)
                    own += [(index, array) for array in _flat(made)]
                    branches = [
                        self.frame(branch, [value], label)
                        for branch, value in zip(branches_of(one), operands[1:], strict=False)
                    ]
                    for branch in branches:
                        self._merge(branch, branch.root, made)
                    # They run one at a time.
                    if branches:
                        inner[index] = max(branches, key=lambda each: sum(array.bytes for _, _, array in each.arrays))
                case _:
                    # The result of an asynchronous operation is that of its end.
                    made = self._fresh(one, done.get(one.name, one))
                    aliased = self._in_place(one)
                    for place, operand in aliased.items():
                        if operand < len(operands):
                            made = _replaced(made, place, operands[operand])
                    new = [array for array in _flat(made) if not any(array is each for each in read)]
                    own += [(index, array) for array in new]
                    kept = set(aliased.values())
                    passes_on = self._passes_on(one)
                    for number, operand_value in enumerate(operands):
                        for array in _flat(operand_value):
                            if number not in kept:
                                array.reads.append((label, passes_on, list(_flat(made))))
                    for array in _flat(made):
                        if read or one.opcode == "parameter":
                            array.written.add(label)
                            array.last_written = label
                    shared += [
                        (index, array, candidate)
                        for array in new
                        for number, candidate in self._reusable(one, operands)
                        if candidate.bytes == array.bytes and number not in kept
                    ]
            values[one.name] = made
            if one.opcode not in ("tuple", "get-tuple-element", "bitcast", "parameter"):
                for array in read:
                    ends[id(array)] = index
                if one.opcode.endswith("-done"):
                    start = self.module.computations[name].get(one.operands[0])
                    for source in start.operands if start is not None else ():
                        for array in _flat(values.get(source, [])):
                            ends[id(array)] = index
            if one.root:
                root = made
        for array in _flat(root):
            ends[id(array)] = len(order) - 1
        # An elementwise result takes the memory of an operand that nothing reads after it, if it has no other place: that of an
        # argument, or of what a loop carries.
        taken: set[int] = set()
        placed = {id(array) for array in (self.donated(root) if given is None else _flat(root))}
        mine = {id(array) for _, array in own}
        for index, array, candidate in shared:
            free = ends.get(id(candidate)) == index and id(candidate) in mine and candidate.argument is None
            if free and id(candidate) not in taken and id(array) not in placed:
                ends[id(candidate)] = index - 1
                taken.add(id(candidate))
                placed.add(id(array))
        frame = Frame(
            [(first, end, array) for first, array in own if (end := ends.get(id(array), first)) >= first],
            inner, root, len(order),
        )  # fmt: skip
        self.frames.append(frame)
        return frame

    def donated(self, root: Value) -> Iterator[Array]:
        """Those of the program's results that are written into arguments."""
        results = root if isinstance(root, list) else [root]
        for index in self.module.donated:
            if index < len(results):
                yield from _flat(results[index])

    def _fresh(self, one: Instruction, result: Instruction) -> Value:
        """New arrays in the shapes of `result`."""
        made: list[Value] = []
        for shape in result.shapes:
            size = 0.0 if shape.space in self.elsewhere else shape.bytes
            array = Array(size, argument_kind(one) if one.opcode == "parameter" else None)
            self.arrays.append(array)
            made.append(array)
        return made[0] if len(made) == 1 else made

    def _merge(self, frame: Frame, result: Value, into: Value) -> None:
        """A body's result is in the memory of what the loop carries, a branch's in that of the conditional's result."""
        for mine, outer in zip(_flat(result), _flat(into), strict=False):
            if mine is not outer and any(array is mine for _, _, array in frame.arrays):
                frame.arrays = [each for each in frame.arrays if each[2] is not mine]
                mine.merged = outer
                outer.written |= mine.written
                outer.last_written = mine.last_written

    def _in_place(self, one: Instruction) -> dict[int, int]:
        """Results of an instruction that are written into an operand: which of its results, and the operand's number."""
        if one.opcode in _IN_PLACE:
            return {0: 0}
        if one.opcode == "all-reduce-start":
            return {number: number for number in range(len(one.operands))}
        if "output_to_operand_aliasing" in one.attributes:
            text = one.attributes.partition("output_to_operand_aliasing=")[2]
            text = text[: text.find("}}") if "}}" in text else len(text)]
            return {int(place.split(",")[0] or 0): int(operand) for place, operand in _OUTPUTS.findall(text)}
        inside = self.module.computations.get(one.called or "") if one.opcode == "fusion" else None
        if inside is None:
            return {}
        root = next(each for each in inside.values() if each.root)
        results = root.operands if root.opcode == "tuple" else (root.name,)
        found = {}
        for place, result in enumerate(results):
            changed = _behind(inside, result)
            if changed is not None and changed.opcode in _IN_PLACE:
                target = _behind(inside, changed.operands[0])
                if target is not None and target.opcode == "parameter" and target.bytes == changed.bytes:
                    found[place] = int(target.text)
        return found

    def _reusable(self, one: Instruction, operands: list[Value]) -> Iterator[tuple[int, Array]]:
        """Operands, by number, whose memory the result can take if nothing else reads them."""
        inside = self.module.computations.get(one.called or "") if one.opcode == "fusion" else None
        for number, value in enumerate(operands):
            if not isinstance(value, Array):
                continue
            if inside is None:
                if one.opcode in ELEMENTWISE or one.opcode == "all-reduce":
                    yield number, value
            elif _number_by_number(inside, number):
                yield number, value

    def _passes_on(self, one: Instruction) -> bool:
        """Whether a result holds numbers of an operand, changed one by one, or moved."""
        inside = self.module.computations.get(one.called or "") if one.opcode == "fusion" else None
        return not any(each.opcode in _MATERIALISED for each in (inside.values() if inside is not None else (one,)))


def argument_kind(parameter: Instruction) -> str:
    """What an argument of a training step is, by its path in the step's arguments."""
    path = re.search(r'op_name="([^"]*)"', parameter.attributes)
    name = path.group(1) if path else parameter.name
    if re.match(r"state(\.|_)(params|ema)", name):
        return "parameters"
    return "optimiser state" if re.match(r"state(\.|_)opt_state", name) else "other arguments"


def _rank(phase: str | None) -> int:
    return ("forward", "recomputed", "backward", "optimiser").index(phase) if phase else -1


def _flat(value: Value) -> Iterator[Array]:
    if isinstance(value, Array):
        yield value
    else:
        for one in value:
            yield from _flat(one)


def _replaced(whole: Value, place: int, part: Value) -> Value:
    return [part if index == place else one for index, one in enumerate(whole)] if isinstance(whole, list) else part


def _behind(inside: dict[str, Instruction], name: str) -> Instruction | None:
    """The operation of a fusion that a result is of, through changes of shape."""
    found = inside.get(name)
    while found is not None and found.opcode in ("bitcast", "copy", "reshape") and found.operands:
        found = inside.get(found.operands[0])
    return found


def _number_by_number(inside: dict[str, Instruction], number: int) -> bool:
    """Whether a fusion computes each number of its results from that number alone of an operand."""
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for one in inside.values():
        for operand in one.operands:
            users[operand].append(one)
    parameter = next((one for one in inside.values() if one.opcode == "parameter" and int(one.text) == number), None)
    open_ones = [parameter] if parameter is not None else []
    seen = set()
    while open_ones:
        one = open_ones.pop()
        for user in users[one.name]:
            if user.name in seen or user.opcode == "tuple":
                continue
            seen.add(user.name)
            if user.opcode not in ELEMENTWISE and user.opcode not in ("bitcast", "reshape"):
                return False
            if not user.shapes or not one.shapes or user.shapes[0].elements != one.shapes[0].elements:
                return False
            open_ones.append(user)
    return bool(seen) and parameter is not None
