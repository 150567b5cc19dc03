"""The candidate layouts of one training step over a number of devices."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.predict import shape
from train.config import RunConfig
from train.parallel.mesh import MESH_AXES, MeshConfig
from transformer.errors import ConfigError
from transformer.stack import FEW_LAYERS

REMATS = ("none", "light", "full")
MICROBATCHES = (1, 2, 4, 8)
DEEPEST = 16
"""The most devices of a pipeline, whose bubble grows with them."""
LONG = 16_384
"""The shortest sequence, in tokens, that is worth sharding."""
UNROLLED = 32
"""The most layers that are tried as a loop where `scan_layers: auto` scans: the time to compile grows with them."""


def meshes(config: RunConfig, target: Target) -> Iterator[MeshConfig]:
    """Every mesh, strategy and pipeline over the target's devices that divides the config's sizes."""
    for sizes in _sizes(config, target):
        for strategy, pipeline in itertools.product(_strategies(sizes), _pipelines(sizes["pipeline"], config.model)):
            with contextlib.suppress(ConfigError):
                yield dataclasses.replace(config.mesh, strategy=strategy, **sizes, **pipeline)  # type: ignore[arg-type]


def choices(config: RunConfig, mesh: MeshConfig, target: Target) -> Iterator[RunConfig]:
    """The config on one mesh under every remat policy and number of microbatches that divides its rows."""
    sizes = dict(zip(MESH_AXES, mesh.sizes(target.num_devices), strict=True))
    rows = config.batch_size / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    # A pipeline has its own microbatches.
    parts = [mesh.pipeline_microbatches or 1] if sizes["pipeline"] > 1 else MICROBATCHES
    for microbatches, remat in itertools.product(parts, _remats(config.model)):
        if rows % microbatches:
            continue
        own = config.microbatches if sizes["pipeline"] > 1 else microbatches
        # An objective may refuse parts of a batch, or a schedule.
        with contextlib.suppress(ConfigError):
            model: Any = dataclasses.replace(config.model, remat=remat)  # type: ignore[arg-type]
            yield dataclasses.replace(config, mesh=mesh, model=model, microbatches=own)


def neighbours(config: RunConfig, target: Target) -> Iterator[RunConfig]:
    """The config with one choice within a device changed: what is recomputed, twice or half as many microbatches, a loop over
    the layers or a scan, all logits at once or in chunks, and the optimiser's state in host memory or on the device."""
    mesh, model = config.mesh, config.model
    on_mesh = list(choices(config, mesh, target))
    near = (config.microbatches / 2, config.microbatches, 2 * config.microbatches)
    for one in on_mesh:
        same = (one.model.remat == model.remat) + (one.microbatches == config.microbatches)
        if same == 1 and one.microbatches in near:
            yield one
    scan = getattr(model, "scan_layers", None)
    if scan is False or (
        scan is not None and scans_layers(model, target.chip.platform) and model.num_layers <= UNROLLED
    ):
        other: Any = dataclasses.replace(model, scan_layers="auto" if scan is False else False)  # type: ignore[arg-type]
        yield dataclasses.replace(config, model=other)
    chunk: Any = "auto" if config.loss.chunk is None else None
    yield dataclasses.replace(config, loss=dataclasses.replace(config.loss, chunk=chunk))
    if target.chip.host:
        yield dataclasses.replace(config, mesh=dataclasses.replace(mesh, offload_optimizer=not mesh.offload_optimizer))


def _remats(model: Any) -> list[str]:
    """Policies of rematerialisation that the kind of model has."""
    allowed = get_args(get_type_hints(type(model))["remat"])
    return [name for name in REMATS if name in allowed]


def scans_layers(model: Any, platform: str) -> bool:
    """Whether a step of the model scans its layers."""
    scan = getattr(model, "scan_layers", False)
    return (platform != "gpu" or model.num_layers > FEW_LAYERS) if scan == "auto" else bool(scan)


def batch_sizes(config: RunConfig, target: Target, most: int = 2) -> list[int]:
    """The batch sizes nearest to the config's that some layout over the target's devices divides."""
    parts = set()
    for sizes in _sizes(config, target):
        rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        parts |= {rows * one.get("pipeline_microbatches", 1) for one in _pipelines(sizes["pipeline"], config.model)}
    wanted = config.batch_size
    near = {size for one in parts for size in (wanted // one * one, -(-wanted // one) * one) if size}
    return sorted(sorted(near, key=lambda size: abs(size - wanted))[:most])


def describe(config: RunConfig) -> str:
    """The layout in one line: the axes with more than one device, the strategy, and the other choices."""
    mesh = config.mesh
    axes = " × ".join(f"{axis} {size}" for axis in MESH_AXES if (size := getattr(mesh, axis) or 1) > 1)
    parts = f"microbatches {config.microbatches}"
    if (mesh.pipeline or 1) > 1:
        parts = f"{mesh.schedule} of {mesh.pipeline_microbatches} microbatches"
    if mesh.schedule == "gpipe" and (mesh.pipeline or 1) > 1 and mesh.stages_per_device > 1:
        parts += f", {mesh.stages_per_device} stages a device"
    if getattr(config.model, "scan_layers", "auto") is False:
        parts += ", unrolled"
    if config.loss.chunk is None:
        parts += ", loss unchunked"
    if mesh.offload_optimizer:
        parts += ", optimiser on the host"
    return f"{mesh.strategy}: {axes or 'one device'}; remat {config.model.remat}, {parts}"


def _sizes(config: RunConfig, target: Target) -> Iterator[dict[str, int]]:
    """Devices along each axis that divide the model's sizes."""
    model: Any = config.model
    heads, mlp, mixture = shape.kv_heads(model), shape.mlp_width(model), shape.experts(model)
    experts = 0 if mixture is None else mixture.num_experts
    # Tensor parallelism communicates so much that it stays on the fast links of a host, or on one or two dims of a torus.
    widest = 16 if target.chip.platform == "tpu" else target.shape[-1]
    for tensor in _divisors(target.num_devices):
        if tensor > widest or heads % tensor or model.vocab_size % tensor or (mlp or tensor) % tensor:
            continue
        rest = target.num_devices // tensor
        for context in _divisors(rest) if config.sequence_length >= LONG else [1]:
            if config.sequence_length % (2 * context):
                continue
            for expert in _divisors(rest // context) if experts else [1]:
                if experts and experts % expert:
                    continue
                replicas = rest // context // expert
                stages = _divisors(replicas) if context == expert == 1 and model.family in ("gpt", "bert") else [1]
                for pipeline in stages:
                    if pipeline > DEEPEST or getattr(model, "num_layers", 1) % pipeline:
                        continue
                    for fsdp in _divisors(replicas // pipeline):
                        if model.embed_dim % fsdp:
                            continue
                        yield {
                            "pipeline": pipeline, "data": replicas // pipeline // fsdp, "fsdp": fsdp, "expert": expert,
                            "context": context, "tensor": tensor,
                        }  # fmt: skip


def _strategies(sizes: dict[str, int]) -> list[str]:
    found = ["dp"] if sizes["fsdp"] == 1 else ["fsdp", "zero1"]
    return [*found, "tensor_sequence"] if sizes["tensor"] > 1 else found


def _pipelines(devices: int, model: Any) -> list[dict[str, Any]]:
    """Schedules, stages of each device, and the number of microbatches for each device."""
    if devices == 1:
        return [{}]
    schedules: list[tuple[Any, int]] = [("gpipe", 1), ("1f1b", 1)]
    if getattr(model, "num_layers", 1) % (2 * devices) == 0:
        schedules.append(("gpipe", 2))
    return [
        {"schedule": schedule, "stages_per_device": stages, "pipeline_microbatches": devices * each}
        for (schedule, stages), each in itertools.product(schedules, (4, 16))
    ]


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
