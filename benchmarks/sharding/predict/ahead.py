"""Compiles training steps for a target, in a process that has its compiler.

A process of this module answers one request per line, so that it starts only once:

    python -m benchmarks.sharding.predict.ahead       requests on standard input, answers on standard output

A request and its answer are each one line of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.environments import compilers
from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.predict.roofline import costs_of
from benchmarks.sharding.predict.timeline import timeline_of
from benchmarks.sharding.predict.what_if import what_if
from benchmarks.workload import program_of
from train.config import RunConfig, to_data
from train.config.restore import restore
from train.parallel.mesh import use_mesh
from train.program.hlo import Module
from train.program.program import Program
from transformer.errors import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The target compiler's result for a training step. Bytes are for one device."""

    seconds_to_compile: float
    memory: float | None
    """Peak memory of the step; None if it was refused without a figure."""
    state: float
    """Arguments of the step: parameters, optimiser state and batch."""
    temporary: float
    """Gradients, activations, buffers."""
    fits: bool
    over: float
    """Bytes by which the device's memory is exceeded; 0 if the step fits."""
    prediction: dict[str, Any] | None
    """`roofline.Prediction`, with its seconds and bound, and how many loops of unknown length were counted once."""
    collectives: tuple[dict[str, Any], ...]
    """Kind, dtype, devices, count and bytes sent in a step."""
    error: str | None = None
    """The error if there is no result, in one line."""
    timeline: dict[str, Any] | None = None
    """The step over time, as of `timeline.timeline_of`, and what would change it, as of `what_if.what_if`."""

    @property
    def failed(self) -> bool:
        """Whether the compiler gave neither a program nor a size that exceeds the memory."""
        return self.error is not None and self.memory is None


def require_any(compiled: Iterable[Compiled | None], target: Target) -> None:
    """Raise a `UserError` with the first error where every compile failed."""
    done = [one for one in compiled if one is not None]
    if done and all(one.failed for one in done):
        count = "the only layout" if len(done) == 1 else f"all {len(done)} layouts"
        raise UserError(f"{target.name}: {count} failed to compile; the first error: {done[0].error}")


class Compiler:
    """A process that compiles configs for one target, in sequence."""

    def __init__(self, target: Target, python: str) -> None:
        self.target = target
        self._process = subprocess.Popen(
            [python, "-c", "from benchmarks.sharding.predict import ahead; ahead.serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=compilers.process_environment(target.chip.platform),
            # The parent process handles Ctrl-C, and ends this one.
            start_new_session=True,
        )  # fmt: skip
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._last_words: list[str] = []
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._read, self._listen)]
        for thread in self._threads:
            thread.start()

    def compile(self, config: RunConfig, timeout: float = 900) -> Compiled:
        """Compile the config's training step.

        Raises:
            UserError: the process ended, or gave no answer in time.
        """
        assert self._process.stdin is not None
        question = json.dumps({"config": to_data(config), "target": dataclasses.asdict(self.target)})
        with contextlib.suppress(BrokenPipeError, ValueError):
            print(question, file=self._process.stdin, flush=True)
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise UserError(f"{self.target.name}: not compiled in {timeout:g} s") from None
        if answer is None:
            said = next((line for line in reversed(self._last_words) if line.strip()), "without output")
            raise UserError(f"{self.target.name}: the compiler's process ended: {said.strip()[:300]}")
        return from_data(json.loads(answer))

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        for thread in self._threads:
            thread.join()
        # Leaving the context closes the pipes and waits.
        self._process.__exit__(None, None, None)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # Libraries also print.
            if line.startswith("{"):
                self._answers.put(line)
        self._answers.put(None)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_words = [*self._last_words[-20:], line]


def from_data(data: dict[str, Any]) -> Compiled:
    """Restore it from the output of `dataclasses.asdict` and JSON."""
    return Compiled(**data | {"collectives": tuple(data["collectives"])})


def serve() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        question = json.loads(line)
        target = Target.from_data(question["target"])
        # The compiler's environment may have no pydantic.
        found = answer(restore(RunConfig, question["config"]), target)
        print(json.dumps(dataclasses.asdict(found)), flush=True)


def answer(config: RunConfig, target: Target) -> Compiled:
    """Compile in this process; errors of the compiler are returned, not raised."""
    start = time.monotonic()
    try:
        if (reason := compilers.missing(target.chip.platform)) is not None:
            raise UserError(reason)
        devices = compilers.devices_of(target.chip.platform, target.topology, target.kind)
        program = program_of(config, devices)
        return examined(*compile_step(program), program.mesh, target)
    except Exception as error:
        return refused(error, time.monotonic() - start, target)


def compile_step(program: Program) -> tuple[jax.stages.Compiled, float]:
    """The compiled step, and the seconds that tracing and compiling it took."""
    start = time.monotonic()
    with use_mesh(program.mesh, program.config.mesh.rules):
        return program.lower().compile(), time.monotonic() - start


def examined(compiled: jax.stages.Compiled, seconds: float, mesh: Mesh, target: Target) -> Compiled:
    """The figures of a compiled step."""
    stats: Any = compiled.memory_analysis()
    module = Module(compiled.as_text() or "")
    places = [target.place(device) for device in mesh.devices.flat]
    state = stats.argument_size_in_bytes
    temporary = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes

    def link_of(group: tuple[int, ...]) -> tuple[str, float]:
        return target.link(tuple(places[one] for one in group))

    costs = costs_of(module, target, link_of, temporary)
    prediction = costs.prediction()
    timeline = timeline_of(module, costs, compiler=state + temporary, platform=target.chip.platform)
    timeline["what_if"] = what_if(module, target, link_of, costs, timeline)
    memory = state + temporary + stats.generated_code_size_in_bytes
    over = max(memory - target.chip.memory, 0)
    return Compiled(
        seconds, memory, state, temporary, over == 0, over,
        dataclasses.asdict(prediction)
        | {"seconds": prediction.seconds, "bound": prediction.bound, "uncounted_loops": len(module.uncounted)},
        tuple(summary(module)), timeline=timeline,
    )  # fmt: skip


def summary(module: Any) -> list[dict[str, Any]]:
    """The program's collectives by kind, data type and group size, sorted by bytes sent."""
    sums: dict[tuple[str, str, int], dict[str, Any]] = {}
    for one in module.collectives():
        entry = sums.setdefault(
            (one.kind, one.dtype, len(one.group)),
            {
                "kind": one.kind,
                "dtype": one.dtype,
                "devices": len(one.group),
                "count": 0,
                "bytes": 0.0,
                "asynchronous": 0.0,
            },
        )
        entry["count"] += one.count
        entry["bytes"] += one.total
        entry["asynchronous"] += one.total if one.asynchronous else 0.0
    return sorted(sums.values(), key=lambda entry: -entry["bytes"])


def refused(error: Exception, seconds: float, target: Target) -> Compiled:
    """The compiler's error; for a program that is too large, by how much."""
    text = str(error)
    message = f"{type(error).__name__}: {first_line(error)}"
    # Two forms of the message: "Used 20.00G of 15.75G", "required for HLO temporaries (19.70G) exceeds available HBM".
    used = re.search(r"(?:[Uu]sed |temporaries \()([\d.]+)([KMGT]?)(?: of|\) exceeds)", text)
    memory, over = None, 0.0
    if used:
        memory = float(used.group(1)) * 1024 ** " KMGT".index(used.group(2) or " ")
        over = max(memory - target.chip.memory, 1.0)
        message = "larger than the device's memory, according to the compiler"
    return Compiled(seconds, memory, 0.0, 0.0, False, over, None, (), message)


if __name__ == "__main__":
    serve()
