"""`manyheads-bench data`: throughput of the loader compared with that of the step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.record import in_turn, ratio, save, seconds_per_call, summary
from benchmarks.workload import our_step, workload


def run(rounds: int) -> dict[str, Any]:
    """Tokens per second of the loader alone, over the running Python's library as bytes, and of the step, in turn."""
    from train.data.loader import train_batches
    from train.data.prepared.prepare import DataConfig, prepare

    work = workload()
    config = DataConfig()
    prepared = prepare(config)
    step = our_step(work)
    seconds_per_call(step, 2)
    candidates: dict[str, Callable[[], float]] = {"step": lambda: seconds_per_call(step, 5)}
    for packing in ("chunk", "documents"):
        packed = DataConfig(packing=packing)
        loader = train_batches(
            prepared, packed, batch_size=work.batch_size, length=work.model.max_length, seed=0, objective=work.objective
        )
        candidates[f"loader, {packing}"] = functools.partial(_seconds_per_batch, loader.iterate(), 500)
    speeds = {name: [work.tokens_per_step / s for s in taken] for name, taken in in_turn(candidates, rounds).items()}
    result = {
        "tokens_per_second": {name: summary(speed) for name, speed in speeds.items()},
        "ratio": {name: ratio(speed, speeds["step"]) for name, speed in speeds.items() if name != "step"},
    }
    save("data", f"manyheads-bench data --rounds {rounds}", result)
    return result


def _seconds_per_batch(batches: Iterator[dict[str, np.ndarray]], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - start) / count
