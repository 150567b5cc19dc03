"""Functions with a custom backward pass that keep forward mode.

A function with a `jax.custom_vjp` cannot be differentiated by `jax.jvp`, so it has no Hessian-vector products by `jax.jvp` of
`jax.grad` either. Here the function is a `jax.custom_jvp` whose tangent is one opaque linear operation: reverse mode transposes
it by the given backward pass, forward mode evaluates it as the derivative of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from transformer.errors import UserError
from transformer.types import Array


def with_backward(
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[..., tuple[Any, ...]],
    *args: Any,
    value: Callable[..., Any] | None = None,
) -> Any:
    """The output of `forward(*args)`, differentiated in reverse mode by `backward`, as with `jax.custom_vjp`.

    They may close over static values, but not over traced arrays.

    Args:
        forward: maps the arguments to the output and to what the backward pass needs of it (residuals).
        backward: maps the residuals and the output's gradient to a tuple with the gradient of each argument, in the argument's
            structure; None, for an argument or a leaf of it, means no gradient.
        args: pytrees of arrays. Only floating-point arrays have gradients.
        value: computes the output alone, for use without a backward pass; by default `forward`, without its residuals.

    Returns:
        The output, a pytree of floating-point arrays. It can be differentiated as many times as `forward` and `backward` can: a
        loop whose length is only known at run time has forward mode alone.
    """
    leaves, structure = jax.tree.flatten(args)
    # Where each argument has a leaf, and where a None, which JAX does not count as a leaf.
    layouts = [[leaf is not None for leaf in _with_none(arg)] for arg in args]
    is_float = [bool(jnp.issubdtype(leaf.dtype, jnp.floating)) for leaf in leaves]

    def joined(floats: Sequence[Array], others: Sequence[Any]) -> Any:
        parts, rest = iter(floats), iter(others)
        return jax.tree.unflatten(structure, [next(parts if known else rest) for known in is_float])

    def output(floats: Sequence[Array], others: Sequence[Any]) -> Any:
        given = joined(floats, others)
        return forward(*given)[0] if value is None else value(*given)

    @jax.custom_jvp
    def call(floats: list[Array], others: list[Any]) -> Any:
        return output(floats, others)

    @call.defjvp
    def tangent(primals: tuple[list, list], tangents: tuple[list, list]) -> tuple[Any, Any]:
        floats, others = primals
        out, residuals = forward(*joined(floats, others))
        outs, out_structure = jax.tree.flatten(out)
        # An array that is both an argument and a residual is kept once.
        kept, places = _unique([*floats, *others, *jax.tree.leaves(residuals)])
        residual_structure, num_floats, num_args = jax.tree.structure(residuals), len(floats), len(is_float)

        def apply(kept: Sequence[Any], dfloats: Sequence[Array]) -> list[Array]:
            known = [kept[place] for place in places]
            _, douts = jax.jvp(
                lambda *floats: jax.tree.leaves(output(floats, known[num_floats:num_args])),
                tuple(known[:num_floats]), tuple(dfloats),
            )  # fmt: skip
            return douts

        def transpose(kept: Sequence[Any], douts: Sequence[Array]) -> list[Array]:
            saved = jax.tree.unflatten(residual_structure, [kept[place] for place in places[num_args:]])
            gradients = backward(saved, jax.tree.unflatten(out_structure, douts))
            found = _aligned(gradients, layouts, is_float)
            return [
                jnp.zeros_like(kept[place]) if gradient is None else gradient
                for gradient, place in zip(found, places, strict=False)
            ]

        return out, jax.tree.unflatten(out_structure, _linear(apply, transpose, kept, tangents[0], outs))

    return call(
        [leaf for leaf, known in zip(leaves, is_float, strict=True) if known],
        [leaf for leaf, known in zip(leaves, is_float, strict=True) if not known],
    )


def own_transpose(function: Callable[[Any, Array], Array], residuals: Any, x: Array) -> Array:
    """`function(residuals, x)`, which is linear in x and equal to its own transpose: a mask, for example.

    Only the residuals are kept for the backward pass; autodiff of the function would keep what it computes from them.
    """
    flat, structure = jax.tree.flatten(residuals)

    def apply(kept: Sequence[Any], xs: Sequence[Array]) -> list[Array]:
        return [function(jax.tree.unflatten(structure, kept), x) for x in xs]

    return _linear(apply, apply, flat, [x], [x])[0]


def reverse_mode_only(arrays: Sequence[Array], message: str) -> list[Array]:
    """The arrays unchanged, as inputs of a kernel that only defines its first gradient.

    Forward mode, alone or over the kernel's backward pass, then raises a `UserError` with `message`, rather than an error
    that names an operation of the kernel.
    """

    def refuse(*_: Any) -> Any:
        raise UserError(message)

    @jax.custom_jvp
    def once(arrays: list[Array]) -> list[Array]:
        return arrays

    once.defjvp(refuse)

    @jax.custom_jvp
    def call(arrays: list[Array]) -> list[Array]:
        return arrays

    @call.defjvp
    def tangent(primals: tuple[list[Array]], tangents: tuple[list[Array]]) -> tuple[list[Array], list[Array]]:
        out = once(*primals)
        return out, _linear(refuse, lambda _, gradients: list(gradients), [], *tangents, out)

    return call(list(arrays))


def _unique(arrays: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The arrays without duplicates, and the index of each of the given arrays among them."""
    kept: list[Any] = []
    index: dict[int, int] = {}
    for array in arrays:
        if id(array) not in index:
            index[id(array)] = len(kept)
            kept.append(array)
    return kept, [index[id(array)] for array in arrays]


def _aligned(
    gradients: tuple[Any, ...], layouts: Sequence[Sequence[bool]], is_float: Sequence[bool]
) -> list[Array | None]:
    """The gradient of each floating-point leaf of the arguments."""
    found: list[Array | None] = []
    for gradient, layout in zip(gradients, layouts, strict=True):
        parts = [None] * len(layout) if gradient is None else _with_none(gradient)
        found += [part for part, is_leaf in zip(parts, layout, strict=True) if is_leaf]
    return [part for part, known in zip(found, is_float, strict=True) if known]


def _with_none(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


# The linear operation. Its parameters are functions of lists: apply(residuals, tangents) and transpose(residuals, gradients).

_linear_p = Primitive("linear_with_transpose")
_linear_p.multiple_results = True

Apply = Callable[[Sequence[Any], Sequence[Array]], list[Array]]


def _linear(
    apply: Apply, transpose: Apply, residuals: Sequence[Any], tangents: Sequence[Array], like: Sequence[Array]
) -> list[Array]:
    avals = tuple(jax.typeof(x) for x in like)
    return _linear_p.bind(
        *residuals, *tangents, apply=apply, transpose=transpose, num_residuals=len(residuals), out_avals=avals
    )


def _run(*operands: Any, apply: Apply, num_residuals: int, **_: Any) -> list[Array]:
    return apply(list(operands[:num_residuals]), list(operands[num_residuals:]))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    n, apply = params["num_residuals"], params["apply"]
    residuals, linear = list(primals[:n]), list(primals[n:])
    out = _linear_p.bind(*primals, **params)
    total: list[Any] = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    if any(type(t) is not ad.Zero for t in tangents[n:]):
        total = _linear_p.bind(*residuals, *map(ad.instantiate_zeros, tangents[n:]), **params)
    moving = [i for i, t in enumerate(tangents[:n]) if type(t) is not ad.Zero]
    if moving:

        def at(*values: Any) -> list[Array]:
            given = list(residuals)
            for i, value in zip(moving, values, strict=True):
                given[i] = value
            return apply(given, linear)

        _, more = jax.jvp(at, tuple(residuals[i] for i in moving), tuple(tangents[i] for i in moving))
        total = [ad.add_tangents(a, b) for a, b in zip(total, more, strict=True)]
    return out, total


def _transpose(cotangents: Sequence[Any], *operands: Any, transpose: Apply, num_residuals: int, **_: Any) -> list[Any]:
    residuals, linear = list(operands[:num_residuals]), operands[num_residuals:]
    gradients = transpose(residuals, [ad.instantiate_zeros(ct) for ct in cotangents])
    asked = (g if ad.is_undefined_primal(x) else None for g, x in zip(gradients, linear, strict=True))
    return [None] * num_residuals + list(asked)


def _batch(operands: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[list[Any], list[int]]:
    n, apply, transpose = params["num_residuals"], params["apply"], params["transpose"]
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    residuals, axes = list(operands[:n]), list(dims[:n])
    linear = [batching.bdim_at_front(x, d, size) for x, d in zip(operands[n:], dims[n:], strict=True)]
    avals = tuple(aval.update(shape=(size, *aval.shape)) for aval in params["out_avals"])
    out = _linear_p.bind(
        *residuals, *linear, num_residuals=n,
        apply=jax.vmap(apply, in_axes=(axes, 0), axis_size=size),
        transpose=jax.vmap(transpose, in_axes=(axes, 0), axis_size=size),
        out_avals=avals,
    )  # fmt: skip
    return out, [0] * len(out)


_linear_p.def_impl(_run)
_linear_p.def_abstract_eval(lambda *_, out_avals, **__: list(out_avals))
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
