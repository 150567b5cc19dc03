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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.errors import Config, UserError, require
from transformer.sharding import LOGICAL_AXES

MESH_AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")
"""From the slowest links to the fastest: what is sent most often goes between neighbours."""

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What is sliced, and which mesh axis takes the devices that the config does not place."""

    fills: str
    slices_parameters: bool = True
    """Along fsdp; else every device has them whole."""
    slices_gradients: bool = True
    """Along fsdp, whatever the parameters are: each device then sums its own slice alone."""
    slices_stream: bool = False
    """Activations between sublayers are sliced along tensor, by position."""
    attention: str | None = None
    """The one attention backend that it goes with, which `auto` then is."""


STRATEGIES = {
    # Slices of the state along fsdp are whole where nothing lies there.
    "dp": Strategy("data"),
    # The same by jax.pmap (`train/run/pmap.py`).
    "pmap": Strategy("data"),
    # Rajbhandari et al. 2020, stages 1 to 3.
    "zero1": Strategy("fsdp", slices_parameters=False, slices_gradients=False),
    "zero2": Strategy("fsdp", slices_parameters=False),
    "fsdp": Strategy("fsdp"),
    # Sliced within fast links, replicated across slow ones (Zhao et al. 2023, section 3.2.2).
    "hsdp": Strategy("data"),
    # Shoeybi et al. 2019; with the stream sliced too, Korthikanti et al. 2022.
    "tensor": Strategy("tensor"),
    "tensor_sequence": Strategy("tensor", slices_stream=True),
    "fsdp_tensor": Strategy("fsdp"),
    # Sequences are sliced: Liu et al. 2023, where `auto` is the ring; Jacobs et al. 2023, by all-to-alls.
    "context": Strategy("context"),
    "ulysses": Strategy("context", attention="ulysses"),
    # Lepikhin et al. 2020.
    "expert": Strategy("expert"),
    # Huang et al. 2019; Narayanan et al. 2019 and 2021.
    "pipeline": Strategy("pipeline"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Config):
    """How many devices each mesh axis gets, and what lies along it. Any axes go together."""

    strategy: Literal[
        "dp", "pmap", "zero1", "zero2", "fsdp", "hsdp", "tensor", "tensor_sequence", "fsdp_tensor", "context", "ulysses",
        "expert", "pipeline",
    ] = "dp"  # fmt: skip
    """dp: a copy of the state on every device, or what the sizes below make of it; pmap: a copy on every device, by jax.pmap;
    zero1: the optimiser's state sliced over fsdp; zero2: gradients too; fsdp: parameters too (ZeRO-3); hsdp: the same, over
    `fsdp` devices, and copies along data; tensor: heads, feed-forward features and vocabulary sliced; tensor_sequence: and the
    activations between them, by position; fsdp_tensor: fsdp over what `tensor` leaves; context: sequences sliced (ring
    attention); ulysses: sequences sliced, heads in attention (all-to-all); expert: a mixture's experts; pipeline: layers."""
    pipeline: int | None = None
    """Devices over which the layers are sliced; null: as for data."""
    data: int | None = None
    """Devices along the data axis; null: what the other axes leave where the strategy is about it, else 1."""
    fsdp: int | None = None
    """Devices over which the state is sliced; null: as for data."""
    expert: int | None = None
    """Devices over which experts are sliced; null: as for data."""
    context: int | None = None
    """Devices over which a sequence is sliced; null: as for data."""
    tensor: int | None = None
    """Devices over which heads and features are sliced; null: as for data."""
    offload_optimizer: bool = False
    """Keep the optimiser's statistics in the host's memory between steps; each step brings them and takes them back."""
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    """Order of a pipeline's work. gpipe: forward for all microbatches, then backward; 1f1b: a backward after each forward, so
    that a device keeps the inputs of as many microbatches as there are stages, at most twice, and computes a stage again."""
    stages_per_device: int = 1
    """Stages of a pipeline that each of its devices has; above 1 (interleaved) it waits less at the ends of a batch."""
    pipeline_microbatches: int | None = None
    """Parts a batch goes through the pipeline in, a multiple of its devices; null: as many as stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in (*MESH_AXES, "pipeline_microbatches"):
            require(self, axis, getattr(self, axis) is None or getattr(self, axis) >= 1, "allowed: 1 or more, or null")
        require(self, "stages_per_device", self.stages_per_device >= 1, "allowed: 1 or more")
        require(
            self, "stages_per_device", self.stages_per_device == 1 or self.schedule == "gpipe",
            f"allowed: 1 with schedule {self.schedule}",
        )  # fmt: skip
        offloads = self.offload_optimizer
        require(self, "offload_optimizer", not offloads or self.strategy != "pmap", "pmap keeps all on its devices")
        for axis in MESH_AXES if self.strategy == "pmap" else ():
            require(self, axis, axis == "data" or getattr(self, axis) in (None, 1), "strategy pmap has data alone")
        if self.strategy == "pipeline" or (self.pipeline or 1) > 1:
            # Ring attention and all-to-alls are manual over the whole mesh, which a stage is already over a part of.
            apart = self.strategy in ("context", "ulysses")
            require(
                self, "pipeline", not apart, f"strategy {self.strategy} slices sequences, and a pipeline has them whole"
            )
            require(self, "context", self.context in (None, 1), "a pipeline has sequences whole; allowed: 1 or null")
        for strategy, axis in (("hsdp", "fsdp"), ("fsdp_tensor", "tensor")):
            given = self.strategy != strategy or getattr(self, axis) is not None
            require(self, axis, given, f"{strategy} needs a number of devices")

    @property
    def rules(self) -> Rules:
        """Where each logical axis of parameters and activations lies."""
        return self._rules(STRATEGIES[self.strategy].slices_parameters)

    @property
    def gradient_rules(self) -> Rules:
        """The same of gradients, each like its parameter."""
        return self._rules(STRATEGIES[self.strategy].slices_gradients)

    @property
    def optimizer_rules(self) -> Rules:
        """The same of the optimiser's statistics and the moving average, each like its parameter."""
        return self._rules(True)

    def _rules(self, sliced: bool) -> Rules:
        """A full table: what is not placed is replicated."""
        placed: dict[str, str | tuple[str, ...]] = {
            # Outside the layers, the devices of a pipeline share the batch.
            "batch": ("pipeline", "data", "fsdp", "expert"),
            "layers": "pipeline",
            "seq": "context",
            "stream": ("context", "tensor") if STRATEGIES[self.strategy].slices_stream else "context",
            **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tensor"),
            "expert": "expert",
        }
        if sliced:
            placed["embed"] = "fsdp"
        return tuple((axis, placed.get(axis)) for axis in LOGICAL_AXES)

    @property
    def slices_parameters(self) -> bool:
        """Whether no device has all of the model."""
        axis, sliced = STRATEGIES[self.strategy].fills, ("pipeline", "fsdp", "expert", "tensor")
        given = any((getattr(self, name) or 1) > 1 for name in sliced)
        return STRATEGIES[self.strategy].slices_parameters and (given or axis in sliced)

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
            wanted = " × ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1)
            factors = ", ".join(str(size) for size in range(1, num_devices + 1) if num_devices % size == 0)
            raise UserError(
                f"mesh: {wanted} = {math.prod(sizes)} devices, but there are {num_devices} (factors {factors}); "
                f"change {' or '.join(f'mesh.{axis}' for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1)}, "
                f"or run with --devices {math.prod(sizes)}"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given); 1×1 on one device."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    types = (AxisType.Auto,) * len(sizes)
    if (slices := len({getattr(device, "slice_index", 0) for device in devices})) > 1:
        placed = _over_slices(sizes, slices, devices)
    else:
        # On a torus whose dims are no products of the mesh's axes, two of them share a dim.
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=types)


def _over_slices(sizes: tuple[int, ...], slices: int, devices: list[jax.Device]) -> np.ndarray:
    """Devices of several slices, which a slower network joins: one axis goes over it, and that is the first that can."""
    for axis in range(MESH_AXES.index("expert")):
        if sizes[axis] % slices == 0:
            between = [slices if index == axis else 1 for index in range(len(sizes))]
            within = [size // outer for size, outer in zip(sizes, between, strict=True)]
            return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    raise UserError(
        f"mesh: there are {slices} slices, and none of pipeline, data and fsdp can go over the network between them; "
        f"make one of them a multiple of {slices}"
    )


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
    if shards % (processes := jax.process_count()):
        raise UserError(
            f"mesh: a batch lies over {shards} parts, and {processes} processes read it, each whole rows of its own; make "
            f"mesh.data × mesh.fsdp a multiple of {processes}"
        )
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
            names = [str(getattr(part, "key", "")) for part in path]
            axes = ", ".join(str(part) for part in sharding.spec)
            bad.append(f"{'.'.join(name for name in names if name)} {leaf.shape} over ({axes})")
    if bad:
        raise UserError(
            f"mesh: {len(bad)} arrays do not divide evenly, the first is {bad[0]}; choose sizes that divide the model's "
            "(fsdp: embed_dim; tensor: heads, key/value heads, mlp_dim, vocab_size; expert: num_experts), or strategy dp"
        )


def shard_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays on the devices."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
