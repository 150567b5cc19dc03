"""The work of a compiled operation: its matrix products' FLOPs, and the bytes that it reads and writes."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from train.program.hlo import Instruction, Module

_TRANSCENDENTAL = {
    "exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "logistic", "power", "sine", "cosine", "tan", "erf",
}  # fmt: skip
_PLAIN = {
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "compare", "select", "and", "or", "not",
    "xor", "convert", "sqrt", "rsqrt", "clamp", "sign", "floor", "round-nearest-even", "shift-left", "shift-right-logical",
}  # fmt: skip
ELEMENTWISE = _TRANSCENDENTAL | _PLAIN
"""Operations of which each number of the result is of the same one of the operands."""


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """The matrix products of one instruction, which are of one shape."""

    flops: float
    """Of all of them together."""
    batch: int
    """How many there are."""
    smallest: int
    """The smallest of rows, columns and the contracted dim of one."""
    dtype: str
    """Of the left operand, by XLA's name."""


def parts_of(module: Module, where: str, instruction: Instruction) -> tuple[str, list[Instruction]]:
    """The operations that a fusion consists of, and the computation that they are in; any other instruction is its only part."""
    if instruction.opcode == "fusion" and instruction.called in module.computations:
        return instruction.called, list(module.computations[instruction.called].values())
    return where, [instruction]


def products_of(module: Module, where: str, instruction: Instruction) -> list[MatrixProduct]:
    """The matrix products in an instruction that are written as such: dots, also fused ones, and calls of cuBLAS."""
    match instruction.opcode:
        case "dot":
            found = [
                re.search(rf"lhs_{name}_dims=\{{([\d,]*)\}}", instruction.attributes)
                for name in ("contracting", "batch")
            ]
        case "custom-call" if "cublas" in instruction.attributes:
            names = ("contracting", "batch")
            found = [re.search(rf'"lhs_{name}_dimensions":\[([^\]]*)\]', instruction.attributes) for name in names]
        case "fusion":
            where, inside = parts_of(module, where, instruction)
            return [product for one in inside if one is not instruction for product in products_of(module, where, one)]
        case _:
            return []
    left = module.operands(where, instruction)[0].shapes[0]
    contracted, batched = (
        math.prod(left.dims[int(dim.strip('" '))] for dim in one.group(1).split(",") if dim.strip('" ')) if one else 1
        for one in found
    )
    rows = max(left.elements // (contracted * batched), 1)
    columns = max(instruction.shapes[0].elements // (batched * rows), 1)
    flops = 2.0 * batched * rows * columns * contracted
    return [MatrixProduct(flops, batched, min(rows, columns, contracted), left.dtype)]


def numbers_of(module: Module, where: str, instruction: Instruction) -> tuple[int, int]:
    """How many exponentials, logarithms and the like an instruction computes, and how many simpler results such as sums."""
    _, inside = parts_of(module, where, instruction)
    counts = [
        sum(one.shapes[0].elements for one in inside if one.opcode in opcodes) for opcodes in (_TRANSCENDENTAL, _PLAIN)
    ]
    return counts[0], counts[1]


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
        # After the product, the result has scratch memory, which may be larger.
        return 2.0 * instruction.shapes[0].elements * math.prod(operands[0].shapes[0].dims[dim] for dim in dims)
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
        parts = [_read(user, parameter.name) for user in users] or [None]
        known = [part for part in parts if part is not None]
        total += sum(known) if len(known) == len(parts) else parameter.bytes
    changed = [one for one in inside.values() if one.opcode == "dynamic-update-slice"]
    if changed and any(one.bytes >= 0.5 * instruction.bytes for one in changed):
        return total + sum(inside[one.operands[1]].bytes for one in changed if one.operands[1] in inside)
    return total + instruction.bytes


def _read(user: Instruction, name: str) -> float | None:
    """Bytes that an instruction of a fusion reads of an array: of a slice, nothing where it only replaces one, or None: all."""
    if user.opcode in ("dynamic-slice", "gather") and user.operands[0] == name:
        return user.bytes
    return 0.0 if user.opcode == "dynamic-update-slice" and user.operands[0] == name else None
