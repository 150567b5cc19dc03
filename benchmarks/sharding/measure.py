"""`manyheads-bench sharding`: one model, one batch, every strategy on the devices at hand.

Each is held against one device in its losses and gradients, then timed in turn with the others; beside that stand what the
compiled program holds, what it sends, and the least that it would have to send on paper.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks import record
from benchmarks.sharding import measure_report
from benchmarks.sharding.ahead import summary
from benchmarks.sharding.hlo import Module
from benchmarks.sharding.layouts import layouts
from benchmarks.sharding.least import least
from train.config import RunConfig, load
from train.data.cache import writing
from train.hardware import utilization
from train.mesh import MESH_AXES, MeshConfig, check_batch, make_mesh, shard_batch, use_mesh
from train.optimizer import OptimizerConfig
from train.program import Program, batch_shapes
from transformer.errors import UserError
from transformer.models.families import flops_per_token

PLAIN = OptimizerConfig(name="sgd", learning_rate=1.0, schedule="constant", b1=0.0, weight_decay=0.0, clip_norm=None)
"""An optimiser whose update is the gradient itself."""
STEPS = 5
"""Whose losses are compared."""


def run(
    path: str,
    *,
    overrides: tuple[str, ...] = (),
    strategies: list[str] | None = None,
    rounds: int = 5,
    output: str | None = None,
) -> dict[str, Any]:
    """Measure every strategy that suits the config and the devices; print a table, write figures and a report.

    Args:
        path: of a config; its mesh is not read.
        strategies: names of `layouts.NAMES`; all by default.
        rounds: turns of each strategy, of three steps each.
        output: folder of the report; `plans` by default.

    Raises:
        UserError: no such strategy, or none that goes.
    """
    config = dataclasses.replace(load(path, overrides), mesh=MeshConfig())
    devices = jax.devices()
    chosen, refused = layouts(config, len(devices), strategies)
    batch = random_batch(config)
    with _own_cache(), Progress(transient=True) as progress:
        task = progress.add_task("one device", total=len(chosen) + 1)
        reference = _followed(config, batch, devices[:1])
        measured: dict[str, Measured] = {}
        for name, one in chosen.items():
            progress.update(task, description=name, advance=1)
            try:
                measured[name] = Measured(one, batch, devices, reference)
            except UserError as error:
                refused[name] = str(error)
        if not measured:
            raise UserError(
                "sharding: no strategy goes: " + "; ".join(f"{name}: {why}" for name, why in refused.items())
            )
        progress.update(task, description="in turn")
        times = record.in_turn({name: one.seconds_a_step for name, one in measured.items()}, rounds)
    result = {
        "config": config.name,
        "devices": len(devices),
        "model_dtype": getattr(config.model, "dtype", "float32"),
        "batch_size": config.batch_size,
        "length": config.sequence_length,
        "parameters": reference.parameters,
        "strategies": {name: one.figures(times[name]) for name, one in measured.items()},
        "refused": refused,
    }
    measure_report.show(result, Console(width=None if Console().is_terminal else 200))
    folder = Path(output or "plans")
    page = folder / f"{config.name}_sharding_{len(devices)}.html"
    with writing(page):
        folder.mkdir(parents=True, exist_ok=True)
        measure_report.write(result, page)
    print(f"the report: {page}")
    command = f"manyheads-bench sharding {path}"
    if devices[0].platform == "cpu":
        command += f" --devices {len(devices)}"
    if strategies:
        command += f" --strategies {','.join(strategies)}"
    record.save(f"sharding_{config.name}_{len(devices)}", command, result, show=False)
    return result


@dataclasses.dataclass(frozen=True)
class Followed:
    """What one device computes."""

    losses: np.ndarray
    gradient: list[np.ndarray]
    parameters: int


class Measured:
    """One strategy: compiled, and held against one device."""

    def __init__(
        self, config: RunConfig, batch: dict[str, np.ndarray], devices: list[Any], reference: Followed
    ) -> None:
        self.config, self.devices = config, devices
        self.mesh = make_mesh(config.mesh, devices)
        check_batch(self.mesh, config.mesh.rules, config.batch_size, config.microbatches)
        with use_mesh(self.mesh, config.mesh.rules):
            self.program = Program(config, self.mesh)
            lowered = self.program.lower()
            start = time.monotonic()
            compiled = lowered.compile()
            self.compile_seconds = time.monotonic() - start
            self.batch = shard_batch(batch, self.program.batch_sharding)
        self.stats: Any = compiled.memory_analysis()
        self.module = Module(compiled.as_text() or "")
        followed = _followed(config, batch, devices)
        self.loss_difference = float(np.max(np.abs(followed.losses / reference.losses - 1)))
        distance = math.sqrt(
            sum(float(np.sum((a - b) ** 2)) for a, b in zip(followed.gradient, reference.gradient, strict=True))
        )
        self.gradient_difference = distance / math.sqrt(sum(float(np.sum(b**2)) for b in reference.gradient))

    def seconds_a_step(self) -> float:
        """The mean of three steps, from a fresh state, behind one that is not counted."""
        with use_mesh(self.mesh, self.config.mesh.rules):
            held = [self.program.train_step(self.program.init(), self.batch)]
            jax.block_until_ready(held)

            def step() -> Any:
                held[0] = self.program.train_step(held[0][0], self.batch)
                return held[0][1]

            return record.seconds_per_call(step, 3)

    def figures(self, times: list[float]) -> dict[str, Any]:
        """As plain data."""
        config, seconds = self.config, record.summary(times)
        per_step = config.batch_size * config.sequence_length
        flops = 3 * flops_per_token(config.model, config.sequence_length) * per_step
        sizes = dict(zip(MESH_AXES, config.mesh.sizes(len(self.devices)), strict=True))
        sent, wanted = summary(self.module), least(config, sizes)
        stats = self.stats
        abstract = self.program.abstract
        peak = (self.devices[0].memory_stats() or {}).get("peak_bytes_in_use")
        return {
            "mesh": {axis: size for axis, size in sizes.items() if size > 1},
            "loss_difference": self.loss_difference,
            "gradient_difference": self.gradient_difference,
            "seconds": seconds,
            "tokens_per_second": per_step / seconds["median"],
            "mfu": utilization(flops / seconds["median"], self.devices, getattr(config.model, "dtype", "float32")),
            "compile_seconds": self.compile_seconds,
            "parameter_bytes": _on_a_device(abstract.params),
            "optimizer_bytes": _on_a_device((abstract.opt_state, abstract.ema)),
            "memory": {
                "state": stats.argument_size_in_bytes,
                "temporary": stats.temp_size_in_bytes,
                "allocator_peak": peak,
            },
            "collectives": sent,
            "sent_bytes": sum(one["bytes"] for one in sent),
            "least": [dataclasses.asdict(one) for one in wanted],
            "least_bytes": sum(one.bytes for one in wanted),
        }


def random_batch(config: RunConfig) -> dict[str, np.ndarray]:
    """A batch of the objective's shapes with tokens out of a hat, every row of one document."""
    rng = np.random.default_rng(0)
    batch = {}
    for name, shape in batch_shapes(config).items():
        if name.endswith(("tokens", "targets")):
            batch[name] = rng.integers(0, min(config.model.vocab_size, 1000), shape.shape).astype(np.int32)
        elif name.endswith("positions") or name == "predicted":
            batch[name] = np.broadcast_to(np.arange(shape.shape[1], dtype=np.int32), shape.shape).copy()
        elif name == "weights":
            batch[name] = np.ones(shape.shape, np.float32)
        else:
            batch[name] = np.ones(shape.shape, np.int32) * (name not in ("token_types", "labels", "prefix"))
    return batch


def _followed(config: RunConfig, batch: dict[str, np.ndarray], devices: list[Any]) -> Followed:
    """Losses of some steps, and the first gradient."""
    mesh = make_mesh(config.mesh, devices)
    with use_mesh(mesh, config.mesh.rules):
        program = Program(config, mesh)
        rows, state, losses = shard_batch(batch, program.batch_sharding), program.init(), []
        for _ in range(STEPS):
            state, metrics = program.train_step(state, rows)
            losses.append(float(metrics["loss"]))
        plain = Program(dataclasses.replace(config, optimizer=PLAIN), mesh)
        before = plain.init()
        held = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(before.params))]
        after, _ = plain.train_step(before, rows)
        gradient = [
            old - np.asarray(new) for old, new in zip(held, jax.tree.leaves(jax.device_get(after.params)), strict=True)
        ]
    return Followed(np.array(losses), gradient, sum(leaf.size for leaf in held))


def _on_a_device(tree: Any) -> int:
    """Bytes of a described tree that one device holds."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    """A compilation cache that begins empty: compile times are real, and no program is compiled twice."""
    with tempfile.TemporaryDirectory(prefix="manyheads-") as folder:
        settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
