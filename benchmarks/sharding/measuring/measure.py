"""`manyheads-bench sharding`: one model, one batch, every strategy on the available devices.

Each strategy's losses and gradients are compared with those of one device, then it is timed in turn with the others. The
report also has the compiled program's memory, its communication, and the theoretical minimum of the latter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from rich.progress import Progress

from benchmarks import record
from benchmarks.sharding.measuring import measure_report
from benchmarks.sharding.measuring.layouts import command_of, layouts, subset, variants
from benchmarks.sharding.predict.ahead import compile_step, summary
from benchmarks.sharding.predict.analytic import sharded_bytes
from benchmarks.sharding.predict.least import least
from benchmarks.units import duration
from benchmarks.workload import program_of, random_batch
from train.config import RunConfig, load
from train.files import writing
from train.optimizer import OptimizerConfig
from train.parallel.hardware import utilization
from train.parallel.mesh import MESH_AXES, MeshConfig, shard_batch, use_mesh
from train.program.hlo import Module
from train.program.program import Program
from train.report.display import console
from transformer.errors import UserError
from transformer.models.families import flops_per_token

PLAIN = OptimizerConfig(name="sgd", learning_rate=1.0, schedule="constant", b1=0.0, weight_decay=0.0, clip_norm=None)
"""An optimiser whose update is the gradient itself."""
STEPS = 5
"""Number of steps whose losses are compared."""


def run(
    path: str,
    *,
    overrides: tuple[str, ...] = (),
    strategies: list[str] | None = None,
    vary: Sequence[str] = (),
    rounds: int = 5,
    output: str | None = None,
) -> dict[str, Any]:
    """Measure every strategy that the config and the devices support; print a table, write figures and a report.

    Args:
        path: of a config; its mesh is not read.
        strategies: names of `layouts.NAMES`; all by default.
        vary: fields of the config and the values that each strategy is measured with (`layouts.variants`).
        rounds: turns of each strategy, of three steps each.
        output: folder of the report; `plans` by default.

    Raises:
        UserError: no such strategy, or none that is possible.
    """
    folder = record.report_folder(output)
    # The reference is the unchanged config on one device.
    config = dataclasses.replace(load(path, overrides), mesh=MeshConfig())
    devices = jax.devices()
    chosen, refused = layouts(variants(path, overrides, vary), len(devices), strategies)
    batch = random_batch(config)
    with _own_cache(), Progress(transient=True) as progress:
        task = progress.add_task("one device", total=len(chosen) + 1)
        reference = followed(program_of(config, devices[:1]), batch)
        measured: dict[str, Measured] = {}
        for name, one in chosen.items():
            progress.update(task, description=name, advance=1)
            try:
                measured[name] = Measured(one, batch, devices, reference)
            except UserError as error:
                refused[name] = str(error)
            else:
                progress.console.print(
                    f"{name}: compiled in {duration(measured[name].compile_seconds)}", highlight=False
                )
        if not measured:
            raise UserError(
                "sharding: no strategy is possible: " + "; ".join(f"{name}: {why}" for name, why in refused.items())
            )
        progress.update(task, description="in turn")
        times = record.in_turn({name: one.seconds_a_step for name, one in measured.items()}, rounds)
    result = {
        "config": config.name,
        "devices": len(devices),
        "platform": devices[0].platform,
        "model_dtype": getattr(config.model, "dtype", "float32"),
        "batch_size": config.batch_size,
        "length": config.sequence_length,
        "parameters": reference.parameters,
        "strategies": {name: one.figures(times[name]) for name, one in measured.items()},
        "refused": refused,
    }
    measure_report.show(result, console())
    name = f"sharding_{config.name}_{len(devices)}{subset(strategies, vary)}"
    page = folder / f"{name}.html"
    with writing(page):
        measure_report.write(result, page)
    print(f"report: {page}")
    virtual = f"--devices {len(devices)}" if result["platform"] == "cpu" else ""
    command = command_of(path, strategies, vary, overrides, virtual)
    record.save(name, command, result, show=False, folder=folder)
    return result


@dataclasses.dataclass(frozen=True)
class Followed:
    """The reference: the results on one device."""

    losses: np.ndarray
    gradient: list[np.ndarray]
    parameters: int


class Measured:
    """One strategy: compiled, and compared with one device."""

    def __init__(
        self, config: RunConfig, batch: dict[str, np.ndarray], devices: list[Any], reference: Followed
    ) -> None:
        self.config, self.devices = config, devices
        self.program = program_of(config, devices)
        compiled, self.compile_seconds = compile_step(self.program)
        with use_mesh(self.program.mesh, config.mesh.rules):
            self.batch = shard_batch(batch, self.program.batch_sharding)
        self.stats: Any = compiled.memory_analysis()
        self.module = Module(compiled.as_text() or "")
        own = followed(self.program, batch)
        self.loss_difference = float(np.max(np.abs(own.losses / reference.losses - 1)))
        distance = math.sqrt(
            sum(float(np.sum((a - b) ** 2)) for a, b in zip(own.gradient, reference.gradient, strict=True))
        )
        self.gradient_difference = distance / math.sqrt(sum(float(np.sum(b**2)) for b in reference.gradient))

    def seconds_a_step(self) -> float:
        """The mean of three steps from a fresh state, after a warm-up step."""
        with use_mesh(self.program.mesh, self.config.mesh.rules):
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
            "parameter_bytes": sharded_bytes(abstract.params, config.mesh.rules, sizes),
            "optimizer_bytes": sharded_bytes((abstract.opt_state, abstract.ema), config.mesh.optimizer_rules, sizes),
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


def followed(program: Program, batch: dict[str, np.ndarray]) -> Followed:
    """Losses of some steps, and the first gradient."""
    config, mesh = program.config, program.mesh
    with use_mesh(mesh, config.mesh.rules):
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


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    """An initially empty compilation cache, so that compile times are real and no program is compiled twice."""
    with tempfile.TemporaryDirectory(prefix="manyheads-") as folder:
        settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            _set_cache(settings)
            yield
        finally:
            _set_cache(before)


def _set_cache(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX keeps using the folder that it first wrote to.
    compilation_cache.reset_cache()
