"""The candidate layouts of one training step over a number of devices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.predict import shape
from train.config import RunConfig
from train.parallel.mesh import MESH_AXES
from transformer.errors import ConfigError

REMATS = ("none", "light", "full")
MICROBATCHES = (1, 2, 4, 8)
DEEPEST = 16
"""The most devices of a pipeline, whose bubble grows with them."""
LONG = 16_384
"""The shortest sequence, in tokens, that is worth sharding."""


def candidates(config: RunConfig, target: Target) -> list[RunConfig]:
    """The config on every mesh over the target's devices, under every strategy, remat policy and number of microbatches that
    divide its sizes."""
    found = []
    for sizes in _meshes(config, target):
        rows = config.batch_size / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
        for strategy, pipeline in itertools.product(_strategies(sizes), _pipelines(sizes["pipeline"])):
            try:
                mesh = dataclasses.replace(config.mesh, strategy=strategy, **sizes, **pipeline)  # type: ignore[arg-type]
            except ConfigError:
                continue
            # A pipeline has its own microbatches.
            parts = [pipeline["pipeline_microbatches"]] if pipeline else MICROBATCHES
            for remat, microbatches in itertools.product(REMATS, parts):
                if rows % microbatches:
                    continue
                model = dataclasses.replace(config.model, remat=remat)  # type: ignore[arg-type]
                one = dataclasses.replace(config, mesh=mesh, model=model)
                found.append(one if pipeline else dataclasses.replace(one, microbatches=microbatches))
    return found


def batch_sizes(config: RunConfig, target: Target, most: int = 2) -> list[int]:
    """The batch sizes nearest to the config's that some layout over the target's devices divides."""
    parts = set()
    for sizes in _meshes(config, target):
        rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        parts |= {rows * one.get("pipeline_microbatches", 1) for one in _pipelines(sizes["pipeline"])}
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
    return f"{mesh.strategy}: {axes or 'one device'}; remat {config.model.remat}, {parts}"


def _meshes(config: RunConfig, target: Target) -> Iterator[dict[str, int]]:
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


def _pipelines(devices: int) -> list[dict[str, Any]]:
    """Schedules, and the number of microbatches for each device."""
    if devices == 1:
        return [{}]
    schedules: tuple[Any, ...] = ("gpipe", "1f1b")
    return [
        {"schedule": schedule, "pipeline_microbatches": devices * each}
        for schedule, each in itertools.product(schedules, (4, 16))
    ]


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
