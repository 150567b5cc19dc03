"""Every strategy by name, on the available devices."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.sharding.predict import shape
from train.config import RunConfig, load
from train.parallel.mesh import STRATEGIES, MeshConfig
from transformer.errors import UserError, nearest

NAMES = (
    "pmap", "dp", "zero1", "zero2", "fsdp", "hsdp", "tensor", "tensor_sequence", "fsdp_tensor", "context", "ulysses",
    "expert", "pipeline", "pipeline_interleaved", "pipeline_1f1b",
)  # fmt: skip
"""The strategies of `train/parallel/mesh.py`, and the schedules of a pipeline."""


def variants(path: str, overrides: Sequence[str] = (), vary: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The config with every combination of values, by the varied fields; one with an empty name if nothing is varied.

    Args:
        vary: fields and their values, such as `model.remat=none,full`.

    Raises:
        UserError: an entry with another syntax, or that the config does not accept.
    """
    axes = []
    for text in vary:
        field, _, values = text.partition("=")
        if not (field and values):
            raise UserError(f"--vary: got {text!r}; allowed: a field and its values, as in model.remat=none,full")
        axes.append([(field, value.strip()) for value in values.split(",")])
    found = {}
    for chosen in itertools.product(*axes):
        name = ", ".join(f"{field.rpartition('.')[2]} {value}" for field, value in chosen)
        given = [part for field, value in chosen for part in (f"--{field.replace('_', '-')}", value)]
        found[name] = load(path, (*overrides, *given))
    return found


def command_of(
    path: str, strategies: Sequence[str] | None, vary: Sequence[str], overrides: Sequence[str], more: str = ""
) -> str:
    """The command that repeats a comparison."""
    names = f"--strategies {','.join(strategies)}" if strategies else ""
    parts = [f"manyheads-bench sharding {path}", more, *overrides, names, *(f"--vary {text}" for text in vary)]
    return " ".join(part for part in parts if part)


def subset(strategies: Sequence[str] | None, vary: Sequence[str]) -> str:
    """Suffix of the name of a comparison: empty for all strategies of an unchanged config."""
    parts = list(strategies or ())
    if len(parts) > 3:
        parts = [f"{len(parts)}-strategies"]
    parts += [text.partition("=")[0].rpartition(".")[2] for text in vary]
    return "_" + "-".join(parts) if parts else ""


def layouts(
    configs: Mapping[str, RunConfig], num_devices: int, names: Sequence[str] | None = None
) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """The configs (`variants`) under each strategy over `num_devices`, and the reasons for strategies that are missing.

    Of a config's own mesh, the setting that applies to every strategy is kept: whether the optimiser's state is on the host.

    Raises:
        UserError: a name that is not a strategy.
    """
    for name in names or ():
        if name not in NAMES:
            raise UserError(f"--strategies: got {name!r}; allowed: {', '.join(NAMES)}.{nearest(name, NAMES)}")
    found: dict[str, RunConfig] = {}
    refused: dict[str, str] = {}
    for name, (variant, config) in itertools.product(names or NAMES, configs.items()):
        title = f"{name}, {variant}" if variant else name
        try:
            found[title] = dataclasses.replace(config, mesh=_mesh(name, config, num_devices))
        except UserError as error:
            refused[title] = str(error)
    return found, refused


def _mesh(name: str, config: RunConfig, n: int) -> MeshConfig:
    model: Any = config.model
    strategy = name.partition("_")[0] if name.startswith("pipeline") else name
    sizes: dict[str, Any] = {"strategy": strategy, "offload_optimizer": config.mesh.offload_optimizer}
    heads = math.gcd(shape.kv_heads(model), n)
    match strategy:
        case "hsdp":
            sizes |= {"fsdp": _below(n, name)}
        case "tensor" | "tensor_sequence":
            if heads == 1:
                raise UserError(f"{n} devices and the key/value heads of the model have no divisor in common")
            sizes |= {"tensor": heads, "data": n // heads}
        case "fsdp_tensor":
            if heads == 1 or n == heads == 2:
                raise UserError(
                    "it needs 4 or more devices, and a number of key/value heads that shares a divisor with them"
                )
            sizes |= {"tensor": 2, "fsdp": n // 2}
        case "context" | "ulysses":
            size = math.gcd(n, config.sequence_length // 2)
            size = math.gcd(size, shape.query_heads(model)) if strategy == "ulysses" else size
            sizes |= {"context": size, "data": n // size}
        case "expert":
            mixture = shape.experts(model)
            experts = 1 if mixture is None else math.gcd(mixture.num_experts, n)
            if experts == 1:
                raise UserError(
                    f"the model has no mixture of experts whose num_experts shares a divisor with {n} devices"
                )
            sizes |= {"expert": experts, "data": n // experts}
        case "pipeline":
            layers = getattr(model, "num_layers", 1)
            stages = 2 if name == "pipeline_interleaved" else 1
            size = math.gcd(layers // stages if layers % stages == 0 else 1, n)
            if size == 1:
                raise UserError(f"{layers} layers and {n} devices have no divisor in common")
            # Many microbatches, so that the bubble is small: it takes as long as P - 1 of them.
            rows, most = config.batch_size // config.microbatches // (n // size), 32 * size
            parts = [one for one in range(size, min(rows, most) + 1, size) if rows % one == 0]
            sizes |= {"pipeline": size, "data": n // size, "pipeline_microbatches": max(parts, default=None)}
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
