"""Logical axes: a model names the meaning of each dimension, never the devices that hold it.

The names are batch, seq, stream (positions of the residual stream, between the sublayers), embed, heads, kv_heads, head_dim,
mlp, vocab, layers and expert. A program maps them to the axes of a mesh with `flax.nnx.logical_axis_rules(table)`; with no
table or no mesh they have no effect and no cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import AxisType

from transformer.types import Array

LOGICAL_AXES = ("batch", "seq", "stream", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "layers", "expert")


def with_axes(init: Callable[..., Array], *axes: str | None) -> Callable[..., Any]:
    """An initialiser whose parameter carries the logical name of each of its dimensions.

    The parameter is laid out where its state is made (`out_shardings`), not at construction, so that a model can be
    built on a laptop without a mesh.

    Raises:
        ValueError: a name that is not a logical axis.
    """
    for axis in axes:
        if axis is not None:
            _known(axis)
    return nnx.with_partitioning(init, axes, eager_sharding=False)


def constrain(x: Array, *axes: str | None) -> Array:
    """Lay out an activation by the logical names of its dimensions, under the active rules and mesh.

    A mesh axis that two dimensions would use goes to the first of them; an axis that an enclosing `jax.shard_map` has made
    manual goes to neither.

    Raises:
        ValueError: a name that is not a logical axis, or not one name for each dimension.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: {len(axes)} names {axes} for an array of shape {x.shape}")
    rules = dict(get_logical_axis_rules())
    placed = [() if axis is None else _names(rules.get(_known(axis))) for axis in axes]
    taken = _manual()
    for index, names in enumerate(placed):
        placed[index] = tuple(name for name in names if name not in taken)
        taken |= set(names)
    spec = jax.sharding.PartitionSpec(*(names or None for names in placed))
    if not rules or jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The axes of the active mesh that the active rules assign to a logical axis; empty without a mesh or rules.

    An axis that an enclosing `jax.shard_map` has made manual is not among them: each device already has its own share.
    """
    names = _names(dict(get_logical_axis_rules()).get(_known(axis)))
    mesh = jax.sharding.get_abstract_mesh()
    free = tuple(name for name in names if name not in _manual())
    return () if mesh.empty else tuple(name for name in free if name in mesh.axis_names)


def dividing_axes(axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes of a logical axis, if they divide a dim of this size evenly; else every device has the whole."""
    names = tuple(name for name in mesh_axes(axis) if axes_size((name,)) > 1)
    return names if size % axes_size(names) == 0 else ()


def axes_to_map() -> set[str] | None:
    """The axes of the active mesh for a `jax.shard_map` within which the compiler partitions nothing; None if none is needed.

    If a program is manual over some axes already, the compiler must not partition over the others either, even if they have
    one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - _manual()
    is_single = math.prod(mesh.shape[name] for name in free) == 1 and len(free) in (0, len(mesh.axis_names))
    return None if is_single else free


def axes_size(names: tuple[str, ...]) -> int:
    """Number of devices along these axes of the active mesh, taken together."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in names)


def platform_of_program() -> str:
    """The platform that a program will run on, cpu, gpu or tpu: that of the active mesh, or the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform == "cuda" else platform


def _manual() -> set[str]:
    """The axes of the active mesh that an enclosing `jax.shard_map` has made manual."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Manual}


def _names(placed: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return placed if isinstance(placed, tuple) else () if placed is None else (placed,)


def _known(axis: str) -> str:
    if axis not in LOGICAL_AXES:
        raise ValueError(f"{axis!r} is not a logical axis; there are {', '.join(LOGICAL_AXES)}")
    return axis
