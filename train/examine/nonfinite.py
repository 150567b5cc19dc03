"""Finds the operation that made the first value that is not finite, in a function and in its gradient.

The function is evaluated operation by operation. A value that is not finite is traced to its origin: the operation whose output
has NaN though no input has, or an infinity though all inputs are finite. Infinities that a mask uses, and that vanish in what
follows, have no part in that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

_PACKAGES = tuple(str(Path(__file__).parents[2] / name) for name in ("transformer", "train"))
_JAXPRS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""Parameters that hold the operations of a call."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value first was not finite."""

    number: int
    """How many operations, or arguments, came before."""
    operation: str
    """JAX's name of the operation; of an argument, its path."""
    what: str
    """What its output holds, such as `3 of 64 values are nan`."""
    place: str = ""
    """File, line and function of the code."""
    inside: tuple[str, ...] = ()
    """The loops around it, such as the layers of a stack, with the number of the iteration from 0."""
    is_backward: bool = False

    def __str__(self) -> str:
        parts = [f"`{self.operation}`", f"at {self.place}" if self.place else "", *(f"in {one}" for one in self.inside)]
        where = " ".join(filter(None, [*parts, "of the backward pass" if self.is_backward else ""]))
        return f"{where}: {self.what}"


def first_non_finite(function: Callable[..., Any], *arguments: Any) -> Origin | None:
    """The first origin of a value that is not finite in the outputs of `function(*arguments)`; None if all are finite."""
    closed = jax.make_jaxpr(function)(*arguments)
    search = _Search()
    leaves = jax.tree_util.tree_leaves_with_path(arguments)
    values = [_Value(leaf, search.of_argument(jax.tree_util.keystr(path), leaf)) for path, leaf in leaves]
    outputs = search.evaluate(closed.jaxpr, closed.consts, values, ())
    found = [origin for output in outputs if (origin := output.origin) is not None]
    return min(found, key=lambda origin: origin.number, default=None)


@dataclasses.dataclass(frozen=True)
class _Value:
    array: Any
    origin: Origin | None = None
    """None while it is finite, or comes from a constant that is not."""


class _Search:
    def __init__(self) -> None:
        self._count = 0

    def of_argument(self, path: str, array: Any) -> Origin | None:
        if not (wrong := _wrong(array)):
            return None
        self._count += 1
        return Origin(self._count, f"argument {path}", wrong)

    def evaluate(
        self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Value], inside: tuple[str, ...]
    ) -> list[_Value]:
        known: dict[Any, _Value] = dict(zip(jaxpr.constvars, map(_Value, consts), strict=True))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def value(atom: Any) -> _Value:
            return _Value(atom.val) if isinstance(atom, jex.Literal) else known[atom]

        for equation in jaxpr.eqns:
            outputs = self._apply(jaxpr, equation, [value(atom) for atom in equation.invars], inside)
            known |= zip(equation.outvars, outputs, strict=True)
        return [value(atom) for atom in jaxpr.outvars]

    def _apply(self, jaxpr: Any, equation: Any, inputs: list[_Value], inside: tuple[str, ...]) -> list[_Value]:
        if equation.primitive.name == "scan":
            return self._scan(equation, inputs, inside)
        inner = next((equation.params[name] for name in _JAXPRS if name in equation.params), None)
        if inner is not None and equation.primitive.name not in ("shard_map", "pallas_call", "while"):
            body, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            if len(body.invars) == len(inputs):
                return self.evaluate(body, consts, inputs, inside)
        outputs = _call(jaxpr, equation, [one.array for one in inputs])
        self._count += 1
        return [_Value(output, self._origin(equation, inputs, output, inside)) for output in outputs]

    def _origin(self, equation: Any, inputs: list[_Value], output: Any, inside: tuple[str, ...]) -> Origin | None:
        if not (wrong := _wrong(output)):
            return None
        inherited = [one.origin for one in inputs if one.origin is not None]
        if inherited:
            return min(inherited, key=lambda origin: origin.number)
        if any(_wrong(one.array) for one in inputs) and not _has_nan(output):
            return None
        backward = "transpose" in str(equation.source_info.name_stack) or any("backward" in one for one in inside)
        return Origin(self._count, equation.primitive.name, wrong, _place(equation), inside, backward)

    def _scan(self, equation: Any, inputs: list[_Value], inside: tuple[str, ...]) -> list[_Value]:
        params = equation.params
        consts, carries = params["num_consts"], params["num_carry"]
        fixed, carry = inputs[:consts], inputs[consts : consts + carries]
        per_step, length = inputs[consts + carries :], params["length"]
        rows: list[list[_Value]] = [[]] * length
        backward = " of the backward pass" if "transpose" in str(equation.source_info.name_stack) else ""
        for number in reversed(range(length)) if params["reverse"] else range(length):
            own = [_Value(one.array[number], one.origin and self._of_row(one, number)) for one in per_step]
            where = (*inside, f"iteration {number} of {length}{backward}")
            outputs = self.evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*fixed, *carry, *own], where)
            carry, rows[number] = outputs[:carries], outputs[carries:]
        stacked = []
        for column in zip(*rows, strict=True):
            origins = [one.origin for one in column if one.origin is not None]
            first = min(origins, key=lambda origin: origin.number, default=None)
            stacked.append(_Value(jnp.stack([one.array for one in column]), first))
        return [*carry, *stacked]

    def _of_row(self, value: _Value, number: int) -> Origin | None:
        return value.origin if _wrong(value.array[number]) else None


def _call(jaxpr: Any, equation: Any, inputs: list[Any]) -> list[Any]:
    """The outputs of one operation of `jaxpr`."""
    given = {atom: one for atom, one in zip(equation.invars, inputs, strict=True) if not isinstance(atom, jex.Literal)}
    alone = jaxpr.replace(constvars=[], invars=list(given), outvars=list(equation.outvars), eqns=[equation])
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, []))(*given.values())


def _is_inexact(array: Any) -> bool:
    dtype = array.dtype if hasattr(array, "dtype") else np.result_type(array)
    return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) and jnp.issubdtype(dtype, jnp.inexact)


def _has_nan(array: Any) -> bool:
    return _is_inexact(array) and bool(jnp.isnan(array).any())


def _wrong(array: Any) -> str:
    """What is not finite in an array, as text; empty if all is finite."""
    if not _is_inexact(array) or bool(jnp.isfinite(array).all()):
        return ""
    nans, infinities = int(jnp.isnan(array).sum()), int(jnp.isinf(array).sum())
    kind, count = ("nan", nans) if nans else ("infinite", infinities)
    return f"{count:,} of {jnp.size(array):,} values are {kind}"


def _place(equation: Any) -> str:
    """The innermost place in our own code that asked for the operation, by the path within the package."""
    traceback = equation.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        if frame.file_name.startswith(_PACKAGES) and frame.file_name != __file__:
            path = Path(frame.file_name).relative_to(Path(__file__).parents[2])
            return f"{path}:{frame.line_num} ({frame.function_name.rpartition('.')[2]})"
    return ""
