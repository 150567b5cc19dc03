"""What each operation of a compiled step is: its category, the part of the model that it belongs to, and its work."""

from __future__ import annotations

import collections
import dataclasses
import re

from train.program.hlo import Instruction, Module, collective_kind, op_name, pass_of, primitive_of, scopes_of
from train.program.work import bytes_of, flops_of

MATRIX, ATTENTION, COLLECTIVE, COPY, ELEMENTWISE = (
    "matrix products", "attention", "collectives", "copies", "elementwise",
)  # fmt: skip
CATEGORIES = (MATRIX, ATTENTION, COLLECTIVE, COPY, ELEMENTWISE)
NO_SCOPE = "outside the model"
"""The scope of what XLA adds without saying what for."""
RANDOM = "random numbers"
"""The scope of the keys and masks of dropout that are made outside of the model."""
OPTIMIZER = "optimizer"
"""The scope of the update."""

_ATTENTION_SCOPES = {"attend", "linear_attention", "fast_weights"}
"""Those of the functions that read keys and values; the projections around them are matrix products."""
_CONTAINERS = {"while", "call", "conditional"}
"""They last as long as what runs inside them."""
_MOVES = {
    "copy", "copy-start", "copy-done", "transpose", "bitcast-convert", "reshape", "slice", "dynamic-slice",
    "dynamic-update-slice", "concatenate", "pad", "reverse",
}  # fmt: skip
_PLAIN = {
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "broadcast", "after-all", "partition-id",
    "replica-id", "opt-barrier",
}  # fmt: skip
_PRODUCT_KERNEL = re.compile(r"gemm|cublas|cutlass|matmul|ragged-dot|megablox|\bgmm", re.IGNORECASE)
_ATTENTION_KERNEL = re.compile(r"fmha|flash_?att|splash|\bmha\b", re.IGNORECASE)
_FAR = 3
"""How many instructions away a scope is looked for."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of the compiled step, as a device runs it."""

    name: str
    primitive: str
    """What it does: `dot_general` for a matrix product, JAX's name of what is fused, else XLA's name."""
    category: str
    scope: str
    """The model's named scopes, outermost first, such as `layers/attention`."""
    phase: str
    """forward, backward, recomputed, or update."""
    times: float
    """How often it runs in a step, by the program; 0 if that does not say."""
    flops: float
    """Of its matrix products, each time that it runs."""
    bytes: float
    """That it reads and writes, each time."""
    contains: bool = False
    """Whether it only lasts as long as others that run inside it, such as a loop."""


def operations_of(module: Module) -> dict[str, Operation]:
    """Name → operation of all that a device may run."""
    times: dict[str, float] = collections.defaultdict(float)
    for count, where, instruction in module.executed():
        times[f"{where} {instruction.name}"] += count
    callers = {
        one.called: one for inside in module.computations.values() for one in inside.values() if one.called is not None
    }
    found = {}
    for where, inside in module.computations.items():
        # Readers are looked up in the other direction.
        readers: dict[str, list[Instruction]] = collections.defaultdict(list)
        for one in inside.values():
            for name in one.operands:
                readers[name].append(one)
        for one in inside.values():
            named = _named(module, where, one, readers, callers)
            contains = one.opcode in _CONTAINERS
            work = 0.0 if contains else flops_of(module, where, one)
            scope = _scope(named) or NO_SCOPE
            found[one.name] = Operation(
                name=one.name,
                primitive=_primitive(one, work),
                category=_category(module, where, one),
                scope=scope,
                phase="update" if scope.startswith(OPTIMIZER) else pass_of(named),
                times=times[f"{where} {one.name}"],
                flops=work,
                bytes=0.0 if contains else bytes_of(module, where, one),
                contains=contains,
            )
    return found


def unknown(name: str) -> Operation:
    """A kernel that is not of the compiled step, such as a transfer of the next batch, judged by its name."""
    category = ELEMENTWISE
    if "nccl" in name.lower() or collective_kind(name.partition(".")[0]) is not None:
        category = COLLECTIVE
    elif re.match(r"mem(cpy|set)", name, re.IGNORECASE):
        category = COPY
    elif _ATTENTION_KERNEL.search(name):
        category = ATTENTION
    elif _PRODUCT_KERNEL.search(name):
        category = MATRIX
    return Operation(name, name, category, NO_SCOPE, "forward", 0, 0.0, 0.0)


def _primitive(one: Instruction, flops: float) -> str:
    if one.opcode == "dot" or (one.opcode == "fusion" and flops):
        return "dot_general"
    return (one.opcode in ("fusion", "custom-call") and primitive_of(one)) or one.opcode


def _category(module: Module, where: str, one: Instruction) -> str:
    called = module.computations.get(one.called or "", {}) if one.opcode in ("fusion", "async-start") else {}
    inside = list(called.values()) or [one]
    work = flops_of(module, where, one)
    kernel = one.attributes if one.opcode == "custom-call" else ""
    multiplies = work > 0 or one.opcode == "ragged-dot" or _PRODUCT_KERNEL.search(kernel) is not None
    # A loop that overlaps a product with its communication is a product.
    if any(collective_kind(part.opcode) for part in inside) and not multiplies:
        return COLLECTIVE
    if _ATTENTION_SCOPES & set(scopes_of(one)) or _ATTENTION_KERNEL.search(kernel):
        return ATTENTION
    if multiplies:
        return MATRIX
    # Single numbers are places to copy to.
    opcodes = {part.opcode for part in inside if any(shape.elements > 1 for shape in part.shapes)}
    return COPY if opcodes & _MOVES and opcodes <= _MOVES | _PLAIN else ELEMENTWISE


def _scope(one: Instruction) -> str:
    made = re.search("threefry|random|rng", op_name(one), re.IGNORECASE)
    return "/".join(scopes_of(one)) or (RANDOM if made else "")


def _named(
    module: Module,
    where: str,
    one: Instruction,
    readers: dict[str, list[Instruction]],
    callers: dict[str, Instruction],
) -> Instruction:
    """The instruction whose scope is this one's: itself, one that is fused into it, the nearest that reads it or that it reads,
    or the loop around it."""
    inside = list(module.computations.get(one.called or "", {}).values()) if one.opcode == "fusion" else []
    for part in (one, *reversed(inside)):
        if _scope(part):
            return part
    seen, nearest = {one.name}, [one]
    for _ in range(_FAR):
        around = [other for near in nearest for other in (*readers[near.name], *module.operands(where, near))]
        nearest = [other for other in around if other.name not in seen]
        seen |= {other.name for other in nearest}
        for other in nearest:
            if _scope(other):
                return other
    caller = callers.get(where)
    return one if caller is None else caller
