"""The ways to lay one training step out over a number of devices that are worth asking about."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.sharding.targets import Target
from train.config import RunConfig
from train.mesh import MESH_AXES
from transformer.errors import ConfigError

REMATS = ("none", "light", "full")
MICROBATCHES = (1, 2, 4, 8)
LONG = 16_384
"""Tokens in a sequence from which it is worth lying apart."""


def candidates(config: RunConfig, target: Target) -> list[RunConfig]:
    """The config on every mesh over the target's devices, under every strategy, remat policy and number of microbatches that
    divide its sizes."""
    found = []
    for sizes in _meshes(config, target):
        for strategy in _strategies(sizes):
            try:
                mesh = dataclasses.replace(config.mesh, strategy=strategy, **sizes)  # type: ignore[arg-type]
            except ConfigError:
                continue
            shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
            for remat, microbatches in itertools.product(REMATS, MICROBATCHES):
                if config.batch_size % (shards * microbatches):
                    continue
                model = dataclasses.replace(config.model, remat=remat)  # type: ignore[arg-type]
                found.append(dataclasses.replace(config, mesh=mesh, model=model, microbatches=microbatches))
    return found


def describe(config: RunConfig) -> str:
    """The layout in a line: the axes with more than one device, the strategy, and what else was chosen."""
    axes = " × ".join(f"{axis} {size}" for axis in MESH_AXES if (size := getattr(config.mesh, axis) or 1) > 1)
    return f"{config.mesh.strategy}: {axes or 'one device'}; remat {config.model.remat}, microbatches {config.microbatches}"


def _meshes(config: RunConfig, target: Target) -> Iterator[dict[str, int]]:
    """Devices along each axis, as far as the model's sizes divide by them."""
    model: Any = config.model
    kv_heads = getattr(model, "kv_heads", 1)
    experts = getattr(model, "num_experts", 0)
    # Tensor parallelism sends so much that it stays on the fast links of a host, or along a dim or two of a torus.
    widest = 16 if target.chip.platform == "tpu" else target.shape[-1]
    for tensor in _divisors(target.num_devices):
        if (
            tensor > widest
            or kv_heads % tensor
            or model.vocab_size % tensor
            or getattr(model, "dim_of_mlp", tensor) % tensor
        ):
            continue
        rest = target.num_devices // tensor
        for context in _divisors(rest) if config.sequence_length >= LONG else [1]:
            if config.sequence_length % (2 * context):
                continue
            for expert in _divisors(rest // context) if experts else [1]:
                if experts and experts % expert:
                    continue
                replicas = rest // context // expert
                for fsdp in _divisors(replicas):
                    if model.embed_dim % fsdp:
                        continue
                    sizes = dict.fromkeys(MESH_AXES, 1)
                    yield sizes | {
                        "data": replicas // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context, "expert": expert,
                    }  # fmt: skip


def _strategies(sizes: dict[str, int]) -> list[str]:
    found = ["dp"] if sizes["fsdp"] == 1 else ["fsdp", "zero1"]
    return [*found, "tensor_sequence"] if sizes["tensor"] > 1 else found


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
