"""Takes some steps of a run as training takes them, first for their speed, then under the profiler."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.data.loader import Batch, Batches, prefetch_to_device
from train.examine.doctor.events import Event, read_events
from train.program.program import Program
from train.program.state import TrainState
from train.report.attention_backends import Choice, choices
from train.run.order import Order
from transformer.errors import UserError

_WARM_UP = 2
"""Steps before the first that is timed: the compilation, and the first one at full speed."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """Some steps of one program. Times are in seconds of a step."""

    text: str
    """Of the compiled program."""
    events: tuple[Event, ...]
    """Of the steps under the profiler."""
    steps: int
    """How many of them."""
    seconds: float
    """Without the profiler."""
    waiting: float
    """In which the host waits for the next batch."""
    dispatching: float
    """In which the host hands a step to the devices."""
    predictions: float
    """Tokens or rows that a step predicts, as its metrics count them."""
    choices: tuple[Choice, ...]
    """What each kind of layer took for its attention."""
    memory: tuple[float, float] | None
    """Bytes of one device that the steps needed at most, and that it has; None if unknown."""


def record(program: Program, state: TrainState, batches: Batches, order: Order, steps: int) -> Recording:
    """Take `steps` steps twice from `state`, which is donated: timed, then traced. Nothing is written.

    Raises:
        UserError: the profiler could not write its trace.
    """
    device = program.mesh.devices.flat[0]
    source = _Source(batches, order.batch(int(state.step) + 1))
    with contextlib.closing(source.on_devices(program)) as rows, choices() as found:
        batch = next(rows)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
        host = _Host(program, state, itertools.chain([batch], rows))
        del state, batch
        host.take(_WARM_UP)
        # It is the program that the first step has compiled.
        compiled = program.train_step.lower(host.state, shapes).compile()
        began, source.passed_over = time.perf_counter(), 0
        host.waiting = host.dispatching = 0.0
        host.take(steps)
        seconds = (time.perf_counter() - began) / steps
        waiting, dispatching = host.waiting / (steps + source.passed_over), host.dispatching / steps
        events = _traced(host, steps, device.platform)
    memory = _memory(device, compiled)
    return Recording(
        compiled.as_text() or "", events, steps, seconds, waiting, dispatching, host.predictions / host.taken,
        tuple(found), memory,
    )  # fmt: skip


class _Source:
    """The run's batches from one number on; those of another shape than the first are passed over: they have a program of their
    own."""

    def __init__(self, batches: Batches, first: int) -> None:
        self._batches, self._first = batches, first
        self.passed_over = 0

    def on_devices(self, program: Program) -> Any:
        """As training fetches them."""
        return prefetch_to_device(self._alike(), program.to_devices)

    def _alike(self) -> Iterator[Batch]:
        with contextlib.closing(self._batches.iterate(self._first)) as batches:
            shapes = None
            for batch in batches:
                own = {name: array.shape for name, array in batch.items()}
                shapes = own if shapes is None else shapes
                if own == shapes:
                    yield batch
                else:
                    self.passed_over += 1


class _Host:
    """What training's host does: it waits for a batch, hands a step to the devices, and reads the metrics of the one before."""

    def __init__(self, program: Program, state: TrainState, batches: Iterator[Any]) -> None:
        self._program, self.state, self._batches = program, state, batches
        self.waiting = self.dispatching = self.predictions = 0.0
        self.taken = 0

    def take(self, steps: int) -> None:
        """Take some steps, and wait for the last one to end."""
        before: Any = None
        for _ in range(steps):
            began = time.perf_counter()
            batch = next(self._batches)
            fetched = time.perf_counter()
            self.state, metrics = self._program.train_step(self.state, batch)
            self.dispatching += time.perf_counter() - fetched
            self.waiting += fetched - began
            self._read(before)
            before = metrics
        self._read(before)
        jax.block_until_ready(self.state)

    def _read(self, metrics: Any) -> None:
        if metrics is not None:
            self.predictions += float(np.asarray(metrics["tokens"]))
            self.taken += 1


def _traced(host: _Host, steps: int, platform: str) -> tuple[Event, ...]:
    options = jax.profiler.ProfileOptions()
    # Following Python's calls would slow down the host, and the devices would wait for it.
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="manyheads-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            host.take(steps)
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            raise UserError("the profiler wrote no trace; update jax, or try another --platform")
        data = jax.profiler.ProfileData.from_file(str(files[0]))
        return tuple(read_events(data.planes, platform))


def _memory(device: jax.Device, compiled: Any) -> tuple[float, float] | None:
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats and "bytes_limit" in stats:
        return float(stats["peak_bytes_in_use"]), float(stats["bytes_limit"])
    if device.platform != "cpu" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    sizes = compiled.memory_analysis()
    # What is donated is counted as an argument, and as a result in the same place.
    used = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    virtual = len(device.client.devices())
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / virtual
    return float(used + sizes.temp_size_in_bytes), float(held)
