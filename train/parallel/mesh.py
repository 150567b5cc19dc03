"""The device mesh, and sharding strategies as tables from logical axes to mesh axes; no other file names mesh axes.

A strategy is data: the same model, step and checkpoint run under every strategy, on one device or many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.errors import Config, UserError, require
from transformer.resume import OnResume
from transformer.sharding import LOGICAL_AXES

MESH_AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")
"""From the slowest links to the fastest: the most frequent communication is between neighbours."""

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What is sharded, and which mesh axis takes the devices that the config does not assign."""

    fills: str
    slices_parameters: bool = True
    """Sharded over fsdp; else replicated."""
    slices_gradients: bool = True
    """Sharded over fsdp even if the parameters are not: each device then sums only its own shard."""
    slices_stream: bool = False
    """Whether activations between sublayers are sharded by position over tensor."""
    attention: str | None = None
    """The only attention backend that it supports, which `auto` then selects."""


STRATEGIES = {
    # With an fsdp axis of 1 the state is not sharded.
    "dp": Strategy("data"),
    # Data parallelism by jax.pmap (`train/program/pmap.py`).
    "pmap": Strategy("data"),
    # Rajbhandari et al. 2020, stages 1 to 3.
    "zero1": Strategy("fsdp", slices_parameters=False, slices_gradients=False),
    "zero2": Strategy("fsdp", slices_parameters=False),
    "fsdp": Strategy("fsdp"),
    # Sharded within fast links, replicated across slow ones (Zhao et al. 2023, section 3.2.2).
    "hsdp": Strategy("data"),
    # Shoeybi et al. 2019; with the residual stream sharded too, Korthikanti et al. 2022.
    "tensor": Strategy("tensor"),
    "tensor_sequence": Strategy("tensor", slices_stream=True),
    "fsdp_tensor": Strategy("fsdp"),
    # Sequences are sharded: Liu et al. 2023, where `auto` is ring attention; Jacobs et al. 2023, by all-to-alls.
    "context": Strategy("context"),
    "ulysses": Strategy("context", attention="ulysses"),
    # Lepikhin et al. 2020.
    "expert": Strategy("expert"),
    # Huang et al. 2019; Narayanan et al. 2019 and 2021.
    "pipeline": Strategy("pipeline"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Config):
    """How many devices each mesh axis has, and what is sharded over it. Any axes can be combined."""

    on_resume: ClassVar[OnResume] = OnResume.FREE

    strategy: Literal[
        "dp", "pmap", "zero1", "zero2", "fsdp", "hsdp", "tensor", "tensor_sequence", "fsdp_tensor", "context", "ulysses",
        "expert", "pipeline",
    ] = "dp"  # fmt: skip
    """dp: the state replicated on every device, unless the sizes below shard it; pmap: replicated, by jax.pmap; zero1: the
    optimiser's state sharded over fsdp; zero2: gradients too; fsdp: parameters too (ZeRO-3); hsdp: fsdp over `fsdp` devices,
    replicated along data; tensor: heads, feed-forward features and vocabulary sharded; tensor_sequence: also the activations
    between them, by position; fsdp_tensor: fsdp over what `tensor` leaves; context: sequences sharded (ring attention);
    ulysses: sequences sharded, heads in attention (all-to-all); expert: a mixture's experts; pipeline: layers."""
    pipeline: int | None = None
    """Devices over which the layers are split into pipeline stages; null: as for data."""
    data: int | None = None
    """Devices along the data axis; null: all that the other axes leave if the strategy uses this axis, else 1."""
    fsdp: int | None = None
    """Devices over which the state is sharded; null: as for data."""
    expert: int | None = None
    """Devices over which experts are sharded; null: as for data."""
    context: int | None = None
    """Devices over which a sequence is sharded; null: as for data."""
    tensor: int | None = None
    """Devices over which heads and features are sharded; null: as for data."""
    offload_optimizer: bool = False
    """Keep the optimiser's statistics in host memory between steps; each step transfers them to the device and back."""
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    """Schedule of the pipeline. gpipe: forward for all microbatches, then backward; 1f1b: forward and backward alternate, so
    that a device stores inputs of at most twice as many microbatches as there are stages; it recomputes each stage."""
    stages_per_device: int = 1
    """Stages on each device of a pipeline; above 1 (interleaved schedule) the pipeline bubble is smaller."""
    pipeline_microbatches: int | None = None
    """Microbatches of a batch in the pipeline, a multiple of its devices; null: the number of stages."""

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
        require(
            self,
            "offload_optimizer",
            not offloads or self.strategy != "pmap",
            "strategy pmap keeps all of it on the devices; allowed: false",
        )
        for axis in MESH_AXES if self.strategy == "pmap" else ():
            require(
                self,
                axis,
                axis == "data" or getattr(self, axis) in (None, 1),
                "strategy pmap has only the data axis; allowed: 1 or null",
            )
        if self.strategy == "pipeline" or (self.pipeline or 1) > 1:
            # Ring attention and all-to-alls are manual over the whole mesh; a stage is already manual over a part of it.
            apart = self.strategy in ("context", "ulysses")
            require(
                self,
                "pipeline",
                not apart,
                f"strategy {self.strategy} shards sequences, and a pipeline needs them whole; allowed: 1 or null",
            )
            require(self, "context", self.context in (None, 1), "a pipeline needs whole sequences; allowed: 1 or null")
        for strategy, axis in (("hsdp", "fsdp"), ("fsdp_tensor", "tensor")):
            given = self.strategy != strategy or getattr(self, axis) is not None
            require(self, axis, given, f"strategy {strategy} needs a number of devices; allowed: 1 or more")

    @property
    def rules(self) -> Rules:
        """The mesh axes of each logical axis of parameters and activations."""
        return self._rules(STRATEGIES[self.strategy].slices_parameters)

    @property
    def gradient_rules(self) -> Rules:
        """The rules for gradients, each like its parameter."""
        return self._rules(STRATEGIES[self.strategy].slices_gradients)

    @property
    def optimizer_rules(self) -> Rules:
        """The rules for the optimiser's statistics and the moving average, each like its parameter."""
        return self._rules(True)

    def _rules(self, sliced: bool) -> Rules:
        """The complete table; axes that are not in it are replicated."""
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
        """Whether no device holds the whole model."""
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
        # On a torus whose dims are not products of the mesh's axes, two axes share a dim.
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=types)


def _over_slices(sizes: tuple[int, ...], slices: int, devices: list[jax.Device]) -> np.ndarray:
    """Devices of several slices, joined by a slower network, which the first suitable axis spans."""
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
    """Everything traced inside is sharded over `mesh` by `rules`."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        yield


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every array in `tree` by its logical axes under the current rules; replicated if it has none.

    An optimiser's statistics carry the axes of the parameter that they belong to. Those that dropped a dim of it or
    shrank one to 1 (Adafactor's rows and columns) are small and replicated.
    """

    def layout(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        value = leaf.get_value()
        if not hasattr(value, "shape"):
            # A parameter that another part of the optimiser updates.
            return leaf
        spec = nnx.get_partition_spec(leaf).get_value()
        dropped = len(spec) > len(value.shape) or 1 in value.shape
        return leaf.replace(NamedSharding(mesh, PartitionSpec() if dropped else spec))

    return jax.tree.map(layout, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """The sharding of an array whose first dim is the global batch."""
    return NamedSharding(mesh, PartitionSpec(dict(rules)["batch"]))


def batch_parts(mesh: Mesh, rules: Rules) -> int:
    """Into how many parts, one or more devices each, the rows of a batch are split."""
    axes = dict(rules)["batch"] or ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def check_batch(mesh: Mesh, rules: Rules, batch_size: int, microbatches: int, field: str = "batch_size") -> None:
    """Raise a `UserError` that names `field` unless all devices get the same number of sequences of each microbatch."""
    shards = batch_parts(mesh, rules)
    if shards % (processes := jax.process_count()):
        raise UserError(
            f"mesh: the batch is split into {shards} parts, which {processes} processes do not divide; make "
            f"mesh.data × mesh.fsdp a multiple of {processes}"
        )
    if batch_size % (shards * microbatches):
        step = shards * microbatches
        lower, upper = batch_size // step * step, -(-batch_size // step) * step
        near = f"{lower} or {upper}" if lower else str(upper)
        raise UserError(
            f"{field}: got {batch_size}, which {shards} devices × {microbatches} microbatches do not divide; try {near}"
        )


def check_divisible(abstract: Any, shardings: Any) -> None:
    """Raise a `UserError` if a sharding does not evenly divide an array of `abstract`."""
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
            "(fsdp: embed_dim; tensor: attention.num_heads, num_kv_heads, mlp.dim, vocab_size; expert: mlp.num_experts), "
            "or strategy dp"
        )


def shard_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays on the devices."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
