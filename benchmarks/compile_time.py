"""`manyheads-bench compile`: how the compile time of the training step grows with depth."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax

from benchmarks.record import in_turn, ratio, save, summary
from benchmarks.workload import program_of, workload
from train.config import RunConfig
from train.parallel.mesh import use_mesh

DEPTHS = (6, 48)


def run(rounds: int, work: RunConfig | None = None) -> dict[str, Any]:
    """Seconds to trace, lower and compile the step, without a cache, at each depth in turn."""
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


def _compile_seconds(work: RunConfig) -> float:
    program = program_of(work, jax.devices()[:1])
    with use_mesh(program.mesh, work.mesh.rules):
        jax.clear_caches()
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            start = time.perf_counter()
            program.lower().compile()
            return time.perf_counter() - start
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
