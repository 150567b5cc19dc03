"""`manyheads-bench compile`: how the compile time of the training step grows with depth."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax

from benchmarks.record import in_turn, ratio, save, summary
from benchmarks.workload import Workload, compiled_step, training_batch, workload
from train.mesh import MeshConfig, make_mesh, use_mesh

DEPTHS = (6, 48)


def run(rounds: int, work: Workload | None = None) -> dict[str, Any]:
    """Seconds to trace, lower and compile the step, from nothing, at each depth in turn."""
    base = workload() if work is None else work
    works = {
        depth: dataclasses.replace(base, model=dataclasses.replace(base.model, num_layers=depth)) for depth in DEPTHS
    }
    taken = in_turn(
        {f"{depth} layers": functools.partial(_compile_seconds, work) for depth, work in works.items()}, rounds
    )
    shallow, deep = taken.values()
    result = {"seconds": {name: summary(values) for name, values in taken.items()}, "ratio": ratio(deep, shallow)}
    save("compile", f"manyheads-bench compile --rounds {rounds}", result)
    return result


def _compile_seconds(work: Workload) -> float:
    config = MeshConfig()
    mesh = make_mesh(config, jax.devices()[:1])
    with use_mesh(mesh, config.rules):
        step, state = compiled_step(work, mesh)
        batch = training_batch(work)
        jax.clear_caches()
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            start = time.perf_counter()
            step.lower(state, batch).compile()  # type: ignore[attr-defined]
            return time.perf_counter() - start
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
