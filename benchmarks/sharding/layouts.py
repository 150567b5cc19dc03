"""Every strategy by name, on the devices at hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from train.config import RunConfig
from train.mesh import STRATEGIES, MeshConfig
from transformer.errors import UserError, nearest

NAMES = (
    "pmap", "dp", "zero1", "zero2", "fsdp", "hsdp", "tensor", "tensor_sequence", "fsdp_tensor", "context", "ulysses",
    "expert", "pipeline", "pipeline_interleaved", "pipeline_1f1b",
)  # fmt: skip
"""The strategies of `train/mesh.py`, and the schedules of a pipeline."""


def layouts(
    config: RunConfig, num_devices: int, names: list[str] | None = None
) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """The config under each strategy over `num_devices`, and why those are missing that cannot be.

    Raises:
        UserError: a name that is no strategy.
    """
    for name in names or ():
        if name not in NAMES:
            raise UserError(f"--strategies: got {name!r}; allowed: {', '.join(NAMES)}.{nearest(name, NAMES)}")
    found: dict[str, RunConfig] = {}
    refused: dict[str, str] = {}
    for name in names or NAMES:
        try:
            found[name] = dataclasses.replace(config, mesh=_mesh(name, config, num_devices))
        except UserError as error:
            refused[name] = str(error)
    return found, refused


def _mesh(name: str, config: RunConfig, n: int) -> MeshConfig:
    model: Any = config.model
    strategy = name.partition("_")[0] if name.startswith("pipeline") else name
    sizes: dict[str, Any] = {"strategy": strategy}
    heads = math.gcd(getattr(model, "kv_heads", 1), n)
    match strategy:
        case "hsdp":
            sizes |= {"fsdp": _below(n, name)}
        case "tensor" | "tensor_sequence":
            if heads == 1:
                raise UserError(f"{n} devices and the key/value heads of the model have no divisor in common")
            sizes |= {"tensor": heads, "data": n // heads}
        case "fsdp_tensor":
            if heads == 1 or n == heads == 2:
                raise UserError("it needs devices for both, and heads that divide by some of them")
            sizes |= {"tensor": 2, "fsdp": n // 2}
        case "context" | "ulysses":
            size = math.gcd(n, config.sequence_length // 2)
            size = math.gcd(size, model.num_heads) if strategy == "ulysses" and hasattr(model, "num_heads") else size
            sizes |= {"context": size, "data": n // size}
        case "expert":
            experts = math.gcd(getattr(model, "num_experts", 0), n)
            if not getattr(model, "num_experts", 0) or experts == 1:
                raise UserError("the model has no mixture of experts that the devices divide")
            sizes |= {"expert": experts, "data": n // experts}
        case "pipeline":
            layers = getattr(model, "num_layers", 1)
            stages = 2 if name == "pipeline_interleaved" else 1
            size = math.gcd(layers // stages if layers % stages == 0 else 1, n)
            if size == 1:
                raise UserError(f"{layers} layers and {n} devices have no divisor in common")
            sizes |= {"pipeline": size, "data": n // size}
            if name == "pipeline_interleaved":
                sizes |= {"stages_per_device": 2}
            elif name == "pipeline_1f1b":
                sizes |= {"schedule": "1f1b"}
        case _:
            assert strategy in STRATEGIES
    return MeshConfig(**sizes)


def _below(n: int, name: str) -> int:
    """Half the devices."""
    if n % 2 or n < 4:
        raise UserError(f"{name} needs an even number of devices, at least 4")
    return n // 2
