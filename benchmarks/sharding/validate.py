"""`manyheads-bench plan --validate`: predicted against measured memory and time, on an available device.

Each case runs in a separate process, so that its peak memory is measured separately. A CPU has no data sheet: its peak
and its bandwidth are measured first, by a large product and a large sum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks.record import RESULTS
from benchmarks.sharding.targets import CHIPS, Chip, Target, chip_name
from benchmarks.workload import of_model, program_of, random_batch
from train.config import RunConfig
from train.parallel.mesh import shard_batch, use_mesh
from transformer.errors import UserError
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch and a remat policy."""

    num_layers: int
    embed_dim: int
    length: int
    batch_size: int
    remat: str
    vocab_size: int
    dtype: str

    @property
    def title(self) -> str:
        """What the case is, for a report."""
        return f"{self.num_layers} layers, {self.embed_dim} wide, {self.batch_size} × {self.length}, remat {self.remat}"

    def config(self) -> RunConfig:
        """The case as a run's config."""
        model = GPTConfig(
            vocab_size=self.vocab_size, max_length=self.length, num_layers=self.num_layers, embed_dim=self.embed_dim,
            attention=SoftmaxConfig(num_heads=self.embed_dim // 64), dtype=self.dtype, remat=self.remat,  # type: ignore[arg-type]
        )  # fmt: skip
        return of_model(model, self.batch_size)


def cases() -> list[Case]:
    """Six: small on a CPU, GPT-2's sizes on an accelerator."""
    if jax.default_backend() == "cpu":
        vocab_size, dtype = 4096, "float32"
        shapes = [
            (4, 256, 256, 8, "none"), (4, 256, 256, 8, "full"), (6, 384, 256, 12, "light"), (6, 384, 512, 4, "none"),
            (8, 512, 256, 8, "none"), (8, 512, 256, 8, "full"),
        ]  # fmt: skip
    else:
        vocab_size, dtype = 50304, "bfloat16"
        shapes = [
            (12, 768, 1024, 8, "none"), (12, 768, 1024, 32, "light"), (12, 768, 1024, 64, "full"),
            (24, 1024, 1024, 16, "light"), (24, 1024, 2048, 16, "full"), (36, 1280, 1024, 8, "full"),
        ]  # fmt: skip
    return [Case(*shape, vocab_size=vocab_size, dtype=dtype) for shape in shapes]


def run(rounds: int = 5) -> dict[str, Any]:
    """Predict and measure every case; print and record both, and the errors.

    Raises:
        UserError: the kind of device is unknown, or a case failed.
    """
    device = jax.devices()[0]
    # A CPU has no data sheet.
    kind = "cpu" if device.platform == "cpu" else chip_name(device)
    chip = measured_cpu() if kind == "cpu" else CHIPS[kind]
    found = []
    for case in cases():
        task = {"case": dataclasses.asdict(case), "chip": dataclasses.asdict(chip), "rounds": rounds}
        done = subprocess.run(
            [sys.executable, "-c", "from benchmarks.sharding import validate; validate.answer()"],
            input=json.dumps(task), capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )  # fmt: skip
        if done.returncode:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
            raise UserError(f"plan --validate: the measurement of {case.title} failed: {last}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
        one = found[-1]
        print(
            f"{case.title}: {one['measured_seconds']['median'] * 1e3:.0f} ms, predicted {one['predicted_seconds'] * 1e3:.0f} ms "
            f"({one['time_error']:+.0%}); {one['measured_memory'] / 2**20:,.0f} MiB, predicted "
            f"{one['predicted_memory'] / 2**20:,.0f} MiB ({one['memory_error']:+.1%})",
            flush=True,
        )
    worst = {part: max(abs(one[f"{part}_error"]) for one in found) for part in ("time", "memory")}
    result = {"kind": kind, "chip": dataclasses.asdict(chip), "cases": found, "worst": worst}
    print(f"at worst: time {worst['time']:.0%}, memory {worst['memory']:.1%}")
    record.save("validation", "manyheads-bench plan --validate", result, show=False)
    return result


def on_record(kind: str) -> dict[str, Any] | None:
    """The measured errors of predictions for a kind of chip; None if there are none."""
    for path in RESULTS.glob("validation_*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))["result"]
        if result["kind"] == kind:
            return result["worst"]
    return None


def measured_cpu() -> Chip:
    """This machine's CPU as a device: FLOP/s of a product of 2048² matrices, bytes a second of a sum of 256 MiB."""
    matrix, vector = jnp.ones((2048, 2048)), jnp.ones(1 << 26)
    multiply, add = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1.0)

    def fastest(function: Any, argument: Any) -> float:
        jax.block_until_ready(function(argument))
        return min(record.seconds_per_call(lambda: function(argument), 1) for _ in range(7))

    peak = 2 * 2048**3 / fastest(multiply, matrix)
    bandwidth = 2 * vector.nbytes / fastest(add, vector)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip(
        kind="cpu", platform="cpu", peak_bfloat16=peak, peak_float32=peak, memory=memory, bandwidth=bandwidth, link=bandwidth / 4,
        network=bandwidth / 4,
    )  # fmt: skip


def answer() -> None:
    """Predict and measure the case in the input, in this process, and print both as JSON."""
    from benchmarks.sharding.ahead import compile_step, examined

    task = json.load(sys.stdin)
    case, chip = Case(**task["case"]), Chip(**task["chip"])
    target = Target("here", chip, (1, 1), dtype=case.dtype)
    if chip.platform == "cpu":
        # The measured peak is already an achieved one.
        target = dataclasses.replace(target, matmul_efficiency=1.0, memory_efficiency=1.0)
    config, devices = case.config(), jax.devices()[:1]
    program = program_of(config, devices)
    step, seconds_to_compile = compile_step(program)
    compiled = examined(step, seconds_to_compile, program.mesh, target)
    assert compiled.prediction is not None and compiled.memory is not None
    with use_mesh(program.mesh, config.mesh.rules):
        batch = shard_batch(random_batch(config), program.batch_sharding)
        before = _held()
        held = [step(program.init(), batch)]
        jax.block_until_ready(held)
        times = []
        for _ in range(task["rounds"]):
            start = time.perf_counter()
            held[0] = step(held[0][0], batch)
            jax.block_until_ready(held)
            times.append(time.perf_counter() - start)
        memory = _peak(devices[0], before)
    seconds = record.summary(times)
    print(
        json.dumps(
            {
                "case": dataclasses.asdict(case),
                "measured_seconds": seconds,
                "predicted_seconds": compiled.prediction["seconds"],
                "time_error": compiled.prediction["seconds"] / seconds["median"] - 1,
                "measured_memory": memory,
                "predicted_memory": compiled.memory,
                "memory_error": compiled.memory / memory - 1,
                "prediction": compiled.prediction,
            }
        )
    )


def _held() -> int:
    """Resident bytes of this process; also resets its peak, if the system supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak(device: Any, before: int) -> int:
    """Peak bytes: those of the allocator, or on a CPU the process's peak above `before`."""
    stats = device.memory_stats()
    return stats["peak_bytes_in_use"] if stats else _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
