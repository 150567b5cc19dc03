"""`manyheads-bench plan --validate`: predicted against measured memory and time, on an available device.

Each case runs in a separate process, so that its peak memory is measured separately. Predictions rest on the device's profile,
whose two efficiencies are fitted to the steps on one device; the errors on record are those of each case with efficiencies that
were fitted without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks import record
from benchmarks.record import RESULTS
from benchmarks.sharding.devices.chips import chip_name
from benchmarks.sharding.devices.profile import own_path, profile_of, read
from benchmarks.sharding.devices.targets import Target, at_hand
from benchmarks.sharding.validation.apart import answer_of, task_at_hand
from benchmarks.sharding.validation.calibrate import run as calibrate
from benchmarks.sharding.validation.cases import Case, cases
from benchmarks.sharding.validation.fit import Parts, fitted, leave_one_out
from benchmarks.sharding.validation.quiet import DISTURBED, quiet_rounds
from benchmarks.workload import program_of
from train.examine.doctor.breakdown import break_down
from train.examine.doctor.events import read_events
from train.examine.doctor.operations import COLLECTIVE
from train.examine.doctor.peaks import Peaks
from train.parallel.mesh import shard_batch, use_mesh
from train.parallel.runtime import set_malloc_option

PARTS = ("matrix products", "memory-bound", "collectives", "gaps")
_SETTLED = 0.3
"""Seconds after which a process is at rest."""
_PATIENCE = 12.0
"""Seconds to wait for steps that other processes do not disturb."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""The numbers of the options in glibc's malloc.h."""
_MAPPED = 2**20
"""Bytes of the blocks that are mapped by themselves while memory is measured."""
_LARGEST_KEPT = 2**25
"""The same while time is measured: the most to which glibc raises it by itself as a program runs."""
_TRACED = 2
"""Steps under the profiler."""


def run(rounds: int = 6, seconds: float = 6.0) -> dict[str, Any]:
    """Predict and measure every case; print and record both, and the errors, and fit the profile's efficiencies.

    Args:
        rounds: steps to time of each case, at least.
        seconds: to time steps for.

    Raises:
        UserError: the kind of device is unknown, or a case failed.
    """
    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else chip_name(device)
    profile = read(own_path(kind)) if own_path(kind).exists() else calibrate()
    profile = dataclasses.replace(profile, product_efficiency=1.0, memory_efficiency=1.0, errors={})
    chosen = {case.title: case for case in cases(device.platform, jax.device_count())}
    measured: dict[str, dict[str, Any]] = {}
    # On a CPU twice, some minutes apart: what others do on the machine slows a measurement, and nothing makes one faster.
    for title in itertools.chain(chosen, chosen if kind == "cpu" else ()):
        case = chosen[title]
        target = dataclasses.replace(at_hand(kind, case.devices, profile), dtype=case.config.model.dtype)
        task = {"title": title, "target": dataclasses.asdict(target), "rounds": rounds, "seconds": seconds}
        new = answer_of("validate", task, title)
        one = measured[title] = min(new, measured.get(title, new), key=_disturbance)
        disturbed = "; disturbed by other processes" if one["disturbed"] else ""
        print(
            f"{title}: {one['measured_seconds'] * 1e3:.0f} ms, predicted {one['predicted_seconds'] * 1e3:.0f} ms "
            f"({one['time_error']:+.0%}); {one['measured_memory'] / 2**20:,.0f} MiB, predicted "
            f"{one['predicted_memory'] / 2**20:,.0f} MiB ({one['memory_error']:+.1%}){disturbed}",
            flush=True,
        )
    found = list(measured.values())
    result = {"kind": kind, "basis": profile.title, "cases": found} | judged(found)
    factors = result["factors"]
    efficiencies = {"product_efficiency": 1 / factors["products"], "memory_efficiency": 1 / factors["memory"]}
    dataclasses.replace(profile, **efficiencies, errors=result["worst"]).write(own_path(kind))
    for line in sentences(result):
        print(line)
    record.save("validation", "manyheads-bench plan --validate", result, show=False)
    return result


def _disturbance(one: dict[str, Any]) -> tuple[bool, float]:
    """The order of measurements of one case, the best first."""
    return one["disturbed"], one["measured_seconds"]


def judged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The fitted factors of predicted times, and the errors; adds each case's error without itself in the fit.

    Times of cases that other processes disturbed do not count, unless all were.
    """
    steps = [
        Parts(
            part["matrix products"],
            part["memory-bound"],
            part["collectives"] + part["gaps"],
            one["measured_seconds"],
            one["measured_parts"]["matrix products"],
        )
        for one in found
        for part in (one["predicted_parts"],)
    ]
    steady = [not one["disturbed"] for one in found]
    steady = steady if any(steady) else [True] * len(found)
    used = [one["devices"] == 1 and counts for one, counts in zip(found, steady, strict=True)]
    for one, error in zip(found, leave_one_out(steps, used), strict=True):
        one["left_out_time_error"] = error
    products, memory = fitted([step for step, own in zip(steps, used, strict=True) if own])
    times = sorted(abs(one["left_out_time_error"]) for one, counts in zip(found, steady, strict=True) if counts)
    memories = [abs(one["memory_error"]) for one in found]
    return {
        "factors": {"products": products, "memory": memory},
        "worst": {"time": times[-1], "memory": max(memories)},
        "nine_of_ten": {"time": times[max(9 * len(times) // 10 - 1, 0)]},
        "disturbed": [one["title"] for one, counts in zip(found, steady, strict=True) if not counts],
    }


def sentences(result: dict[str, Any]) -> list[str]:
    """The errors by part and over all."""
    lines = []
    for one in result["cases"]:
        parts = ", ".join(
            f"{name} {1e3 * one['measured_parts'][name]:.0f} ms (predicted {1e3 * one['predicted_parts'][name]:.0f})"
            for name in PARTS
            if max(one["measured_parts"][name], one["predicted_parts"][name]) >= 5e-4
        )
        lines.append(f"{one['title']}: {one['left_out_time_error']:+.0%} left out of the fit; {parts}")
    factors, worst = result["factors"], result["worst"]
    lines.append(
        f"fitted to steps on one device: products × {factors['products']:.2f}, memory × {factors['memory']:.2f}"
    )
    lines.append(
        f"at worst, each case left out of the fit: time {worst['time']:.0%} (nine of ten within "
        f"{result['nine_of_ten']['time']:.0%}), memory {worst['memory']:.1%}"
    )
    if result["disturbed"]:
        lines.append(f"not counted, since other processes disturbed them: {', '.join(result['disturbed'])}")
    return lines


def on_record(kind: str) -> Mapping[str, float] | None:
    """The largest relative errors of predictions for a kind of chip, `time` and `memory`.

    Returns:
        Those that its profile names, else those of the record, or None.
    """
    profile = profile_of(kind)
    if profile is not None and profile.errors:
        return profile.errors
    for path in RESULTS.glob("validation_*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))["result"]
        if result["kind"] == kind:
            return result["worst"]
    return None


def answer() -> None:
    """Predict and measure the case in the input, in this process, and print both as JSON."""
    task, case, target = task_at_hand(cases)
    print(json.dumps(compared(case, target, task["rounds"], task["seconds"])))


def compared(case: Case, target: Target, rounds: int, seconds: float) -> dict[str, Any]:
    """A case's predicted and measured time, by part, and memory."""
    from benchmarks.sharding.predict.ahead import compile_step, examined

    # Else blocks that one device has freed are another's, or stay in the process, and its memory cannot be told.
    _map_blocks_from(_MAPPED)
    config, devices = case.config, jax.devices()[: case.devices]
    program = program_of(config, devices)
    step, seconds_to_compile = compile_step(program)
    compiled = examined(step, seconds_to_compile, program.mesh, target)
    assert compiled.prediction is not None and compiled.memory is not None
    text = step.as_text() or ""
    with use_mesh(program.mesh, config.mesh.rules):
        batch = shard_batch(case.batch(), program.batch_sharding)
        state = program.init_for_step()
        jax.block_until_ready(state)

        def take() -> None:
            nonlocal state
            state, _ = step(state, batch)
            jax.block_until_ready(state)

        # What the first steps load, and what compilers leave behind, is not the program's.
        take()
        take()
        memory = _memory_of(take, devices)
        _map_blocks_from(_LARGEST_KEPT)
        take()
        # The processors' other work hardly disturbs an accelerator.
        on_cpu = devices[0].platform == "cpu"
        timing = quiet_rounds(take, rounds, seconds if on_cpu else 1.0, patience=_PATIENCE if on_cpu else 0.0)
        measured = _parts(text, _traced(take, devices[0].platform), timing.seconds)
    predicted = compiled.prediction
    return {
        "title": case.title,
        "devices": case.devices,
        "measured_seconds": timing.seconds,
        "timing": dataclasses.asdict(timing),
        "disturbed": on_cpu and timing.others > DISTURBED,
        "predicted_seconds": predicted["seconds"],
        "time_error": predicted["seconds"] / timing.seconds - 1,
        "measured_parts": measured,
        "predicted_parts": dict(
            zip(PARTS, (predicted[name] for name in ("compute", "memory", "exposed", "gaps")), strict=True)
        ),
        "measured_memory": memory,
        "predicted_memory": compiled.memory,
        "memory_error": compiled.memory / memory - 1,
    }


def _traced(take: Any, platform: str) -> Any:
    """The operations of some steps under the profiler."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="manyheads-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(_TRACED):
                take()
        (file,) = sorted(Path(folder).rglob("*.xplane.pb"))[:1]
        return tuple(read_events(jax.profiler.ProfileData.from_file(str(file)).planes, platform))


def _parts(text: str, events: Any, seconds: float) -> dict[str, float]:
    """A measured step by part: the parts' shares under the profiler, of its seconds without."""
    step = break_down(text, events, _TRACED, Peaks(1.0, 1.0))
    sent = step.where(lambda one: one.category == COLLECTIVE)
    products = step.where(lambda one: one.flops > 0 and one.category != COLLECTIVE)
    rest = step.step - step.idle - sent - products
    return {
        name: step.share(part) * seconds for name, part in zip(PARTS, (products, rest, sent, step.idle), strict=True)
    }


def _memory_of(take: Callable[[], None], devices: list[jax.Device]) -> float:
    """Peak bytes of one device in a step: by its allocator; on a CPU the arrays at rest, and what a step adds to the process.

    Memory that the process holds at rest besides its arrays, such as compilers' and allocators', is not counted.
    """
    if stats := devices[0].memory_stats():
        take()
        return float(stats["peak_bytes_in_use"])
    added = []
    for _ in range(3):
        # The runtime frees a step's temporary memory a little after its results are there.
        time.sleep(_SETTLED)
        rest = _rest()
        take()
        added.append(_status("VmHWM") - rest)
    shards = [shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards]
    return (sum(shards) + sorted(added)[1]) / len(devices)


def _map_blocks_from(size: int) -> None:
    """Have the C library map blocks of this size by themselves, and return them to the system when they are freed."""
    set_malloc_option(_M_MMAP_THRESHOLD, size)
    # As glibc does where it raises the threshold itself.
    set_malloc_option(_M_TRIM_THRESHOLD, 2 * size)


def _rest() -> int:
    """Resident bytes of this process, without memory that was freed; also resets its peak, if the system supports it."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
