"""Devices as a mesh, and sharding strategies as tables from logical axes to the mesh's: the only file that names them.

A strategy is data. The same model, step and checkpoint run under every one of them, on one device or many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.errors import UserError, require
from transformer.sharding import LOGICAL_AXES

MESH_AXES = ("data", "fsdp")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Where each logical axis lies, and which mesh axis takes the devices that the config does not place."""

    rules: Rules
    fills: str


def _rules(**placed: str | tuple[str, ...]) -> Rules:
    """A full table: what is not placed is replicated."""
    return tuple((axis, placed.get(axis)) for axis in LOGICAL_AXES)


STRATEGIES = {
    # Every device holds the whole state and a slice of the batch; gradients are all-reduced.
    "dp": Strategy(_rules(batch=("data", "fsdp")), fills="data"),
    # Parameters, gradients and optimiser state are sliced too (ZeRO-3, Rajbhandari et al. 2020): gathered layer by layer
    # for use, gradients reduce-scattered. With data > 1 the slices are replicated that many times.
    "fsdp": Strategy(_rules(batch=("data", "fsdp"), embed="fsdp"), fills="fsdp"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis gets, and what lies along it."""

    strategy: Literal["dp", "fsdp"] = "dp"
    """dp: a copy of the state on every device; fsdp: the state sliced over the devices (ZeRO-3)."""
    data: int | None = None
    """Devices along the data axis; null: what the other axes leave (dp), or 1 (fsdp)."""
    fsdp: int | None = None
    """Devices along the fsdp axis; null: what the other axes leave (fsdp), or 1 (dp)."""

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            require(self, axis, getattr(self, axis) is None or getattr(self, axis) >= 1, "allowed: 1 or more, or null")

    @property
    def rules(self) -> Rules:
        """The strategy's table."""
        return STRATEGIES[self.strategy].rules

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Devices along each of `MESH_AXES`.

        Raises:
            UserError: the sizes do not multiply to `num_devices`.
        """
        fills = STRATEGIES[self.strategy].fills
        given = {axis: getattr(self, axis) for axis in MESH_AXES}
        fixed = math.prod(size or 1 for size in given.values())
        if given[fills] is None:
            given[fills] = max(num_devices // fixed, 1)
        sizes = tuple(given[axis] or 1 for axis in MESH_AXES)
        if math.prod(sizes) != num_devices:
            wanted = " × ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
            raise UserError(
                f"mesh: {wanted} = {math.prod(sizes)} devices, but there are {num_devices}; "
                f"change mesh.{' or mesh.'.join(MESH_AXES)}, or run with --devices {math.prod(sizes)}"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given); 1×1 on one device."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Everything traced inside is laid out on `mesh` by `rules`."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        yield


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """The layout of every array in `tree` by its logical axes under the rules in force; without axes, replicated.

    An optimiser's statistics carry the axes of the parameter that they belong to. Those that dropped a dim of it or
    shrank one to 1 (Adafactor's rows and columns) are small and replicated.
    """

    def layout(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        value = leaf.get_value()
        if not hasattr(value, "shape"):
            # A parameter that this part of the optimiser leaves to another one.
            return leaf
        spec = nnx.get_partition_spec(leaf).get_value()
        dropped = len(spec) > len(value.shape) or 1 in value.shape
        return leaf.replace(NamedSharding(mesh, PartitionSpec() if dropped else spec))

    return jax.tree.map(layout, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """The layout of an array whose first dim is the global batch."""
    return NamedSharding(mesh, PartitionSpec(dict(rules)["batch"]))


def check_batch(mesh: Mesh, rules: Rules, batch_size: int, microbatches: int) -> None:
    """Raise a `UserError` unless each device gets as many sequences of each microbatch as every other one."""
    axes = dict(rules)["batch"] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if batch_size % (shards * microbatches):
        step = shards * microbatches
        lower, upper = batch_size // step * step, -(-batch_size // step) * step
        near = f"{lower} or {upper}" if lower else str(upper)
        raise UserError(
            f"batch_size: got {batch_size}, which {shards} devices × {microbatches} microbatches do not divide; try {near}"
        )


def check_divisible(abstract: Any, shardings: Any) -> None:
    """Raise a `UserError` naming every array of `abstract` that its sharding does not divide evenly."""
    bad = []
    leaves = zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True)
    for (path, leaf), sharding in leaves:
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            bad.append(f"{jax.tree_util.keystr(path)} {leaf.shape} over {sharding.spec}")
    if bad:
        raise UserError(
            f"mesh: {len(bad)} arrays do not divide evenly, the first is {bad[0]}; choose a size that divides "
            "model.embed_dim, or strategy dp"
        )


def shard_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays on the devices."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
