"""`manyheads-bench calibrate`: measures on the device at hand what the roofline of a step rests on, and keeps it as a profile.

Every operation writes into memory that it had before, as inside of a step; what the first touch of new memory costs is measured
separately. Of several tries the fastest counts, since other processes can only slow one down.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import record
from benchmarks.sharding.devices.chips import chip_name
from benchmarks.sharding.devices.profile import (
    COPY,
    ELEMENTWISE,
    KINDS,
    REDUCTION,
    SCATTER,
    TRANSPOSE,
    Curve,
    Product,
    Profile,
    Wire,
    own_path,
)  # fmt: skip
from benchmarks.sharding.validation.apart import answer_of
from benchmarks.sharding.validation.quiet import DISTURBED, fastest_quiet, watched
from train.parallel.runtime import make_cpu_devices
from train.versions import versions

_TRIES = 5
_TERMS = 12
_LARGE = 2**19
"""Bytes from which a call takes much longer than handing it over."""
_LEAST = 0.03
"""Seconds that a try takes at least."""
_CHAINED = 2**27
"""Bytes of the arrays of a chain of equal operations."""
_PATIENCE = 1.5
"""Seconds to wait for tries that other processes do not disturb."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What to measure."""

    products: tuple[tuple[int, int, int, int], ...]
    """(batch, rows, contracted, columns)."""
    dtypes: tuple[str, ...]
    bytes: tuple[int, ...]
    """Of an array of the operations that are not products."""
    chain: int = 200
    """Operations in the chain that shows the gap."""
    groups: tuple[int, ...] = (2, 4, 8)
    """Numbers of devices that communicate."""
    sent: tuple[int, ...] = (2**12, 2**18, 2**22)
    """Bytes that a device has before a collective."""


def sizes_of(platform: str) -> Sizes:
    """The sizes for a kind of platform: those of small models on a CPU."""
    if platform == "cpu":
        square = tuple((1, size, size, size) for size in (64, 128, 256, 512, 1024, 1536))
        thin = tuple(
            (1, rows, inner, columns)
            for rows in (1024, 3072)
            for inner, columns in ((64, 64), (256, 256), (256, 1024), (1024, 256), (512, 4096), (4096, 512))
        )
        across = ((1, 256, 2048, 256), (1, 256, 2048, 1024), (1, 512, 2048, 2048), (1, 4096, 2048, 256))
        batched = tuple(
            shape for length in (64, 128, 256, 512) for shape in ((32, length, 64, length), (32, length, length, 64))
        )
        return Sizes(
            (*square, *thin, *across, *batched), ("float32",), tuple(2**power for power in (14, 17, 20, 22, 24, 26))
        )
    square = tuple((1, size, size, size) for size in (256, 512, 1024, 2048, 4096, 8192))
    thin = tuple(
        (1, rows, inner, columns)
        for rows in (4096, 32768)
        for inner, columns in ((768, 768), (768, 3072), (3072, 768), (2048, 8192), (768, 50304), (50304, 768))
    )
    wide = ((1, 768, 32768, 768), (1, 768, 32768, 3072), (1, 2048, 16384, 8192))
    batched = tuple(
        shape for length in (128, 512, 1024) for shape in ((192, length, 64, length), (192, length, length, 64))
    )
    powers = (16, 20, 23, 25, 27, 29, 30)
    return Sizes((*square, *thin, *wide, *batched), ("float32", "bfloat16"), tuple(2**power for power in powers))


def run(out: str | None = None) -> Profile:
    """Measure the device at hand, print what was found, and write the profile.

    Args:
        out: file to write; by default that of the kind of device in the user's cache folder.

    Raises:
        UserError: the kind of device is unknown, or the file cannot be written.
    """
    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else chip_name(device)
    path = Path(out) if out else own_path(kind)
    found: list[Profile] = []
    others, seconds = watched(lambda: found.append(measured(kind, sizes_of(device.platform))))
    profile = dataclasses.replace(found[0], others=others)
    profile.write(path)
    for line in sentences(profile):
        print(line)
    if device.platform == "cpu" and others > DISTURBED:
        print(f"other processes took {others:.0%} of the processors meanwhile: repeat this in a quieter moment")
    print(f"measured in {seconds:.0f} s; written to {path}")
    return profile


def sentences(profile: Profile) -> list[str]:
    """What a profile says, in a few lines."""
    lines = []
    for dtype in dict.fromkeys(one.dtype for one in profile.products):
        rates = [one.rate for one in profile.products if one.dtype == dtype]
        lines.append(f"matrix products in {dtype}: {min(rates) / 1e9:,.0f} to {max(rates) / 1e9:,.0f} GFLOP/s")
    for name, curve in profile.curves.items():
        speeds = [speed / 1e9 for _, speed in curve]
        lines.append(f"{name}: {min(speeds):,.1f} to {max(speeds):,.1f} GB/s")
    lines.append(f"gap per operation: {profile.gap * 1e6:.2f} µs")
    for wire in profile.wires:
        speed = f"{wire.latency * 1e6:,.0f} µs and {wire.bandwidth / 1e9:,.2f} GB/s"
        lines.append(f"{wire.kind} over {wire.devices} devices: {speed}")
    return lines


def measured(kind: str, sizes: Sizes) -> Profile:
    """The profile of the first device, and of the links where there are several devices."""
    device = jax.devices()[0]
    with jax.default_device(device):
        overhead = _seconds(lambda out: out + 1.0, jnp.zeros(8))
        products = [_product(*shape, dtype, overhead) for dtype in sizes.dtypes for shape in sizes.products]
        curves = _curves(sizes.bytes, overhead)
        transcendental, arithmetic = _numbers(min(2**22, max(sizes.bytes)))
        gap = _gap(sizes.chain, overhead)
        fresh = _fresh(max(sizes.bytes)) if device.platform == "cpu" else 0.0
    if device.platform == "cpu":
        wires = _virtual_wires(sizes)
        name = record.with_origin("", None)["device"]["kind"]
    else:
        wires, name = _wires(sizes), device.device_kind
    return Profile(
        kind=kind, device=name, source="measured by manyheads-bench calibrate", versions=versions(), products=tuple(products),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), curves=curves, gap=gap,
        transcendental=transcendental, arithmetic=arithmetic, fresh=fresh, wires=wires, devices_share=device.platform == "cpu",
    )  # fmt: skip


def _seconds(function: Callable[..., Any], out: Any, *arguments: Any) -> float:
    """Seconds of a call that writes its result into the memory of its first argument."""
    call = jax.jit(function, donate_argnums=0, keep_unused=True)
    out = jax.block_until_ready(call(out, *arguments))
    began = time.perf_counter()
    out = jax.block_until_ready(call(out, *arguments))
    calls = min(max(math.ceil(_LEAST / (time.perf_counter() - began)), 1), 1000)

    def take() -> None:
        nonlocal out
        for _ in range(calls):
            out = call(out, *arguments)
        jax.block_until_ready(out)

    return fastest_quiet(take, _TRIES, _PATIENCE) / calls


def _product(batch: int, rows: int, inner: int, columns: int, dtype: str, overhead: float) -> Product:
    left, right = jnp.ones((batch, rows, inner), dtype), jnp.ones((batch, inner, columns), dtype)
    if batch == 1:
        left, right = left[0], right[0]
    out = jnp.zeros((*left.shape[:-1], columns), dtype)
    seconds = _seconds(lambda out, left, right: left @ right, out, left, right)
    flops = 2.0 * batch * rows * inner * columns
    rate = flops / max(seconds - overhead, 0.05 * seconds)
    return Product(dtype=dtype, batch=batch, smallest=min(rows, inner, columns), flops=flops, rate=rate)


def _curves(sizes: tuple[int, ...], overhead: float) -> dict[str, Curve]:
    """The bandwidth of each kind of operation, over the bytes that it reads and writes."""
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    for size in sizes:
        rows = size // 4 // 256

        def add(kind: str, moved: float, function: Callable[..., jax.Array], out: jax.Array, *rest: jax.Array) -> None:
            seconds = _in_a_chain(function, out, *rest, overhead=overhead)
            curves[kind].append((moved, moved / seconds))

        x = jnp.ones((rows, 256))
        add(ELEMENTWISE, 3 * size, lambda out, x: out * x, jnp.ones_like(x), x)
        if size < _LARGE:
            continue
        add(TRANSPOSE, 2 * size, lambda out, x: x.T, jnp.zeros((256, rows)), x)
        heads = jnp.ones((rows // 64, 64, 4, 64))
        add(COPY, 2 * size, lambda out, x: x.swapaxes(1, 2), jnp.zeros((rows // 64, 4, 64, 64)), heads)
        add(REDUCTION, size + 4 * rows, lambda out, x: x.sum(-1), jnp.zeros(rows), x)
        numbers = jnp.asarray(np.random.default_rng(0).integers(0, rows, rows // 2))
        moved = 2 * size + 0.5 * size + 2 * rows
        add(SCATTER, moved, lambda out, at, x: out.at[at].add(x), jnp.zeros_like(x), numbers, x[: rows // 2])
    return {name: tuple(sorted(points)) for name, points in curves.items() if points}


def _in_a_chain(function: Callable[..., jax.Array], out: jax.Array, *rest: jax.Array, overhead: float) -> float:
    """Seconds of an operation as in a step: one of many in a program, which come after each other and each have arrays of their
    own, in all more than the processor's caches hold."""
    size = out.nbytes + sum(one.nbytes for one in rest)
    count = min(max(_CHAINED // size, 1), 64)

    def chain(outs: list[jax.Array], *arrays: list[jax.Array]) -> list[jax.Array]:
        done: list[jax.Array] = []
        for place, one in enumerate(outs):
            given = [array[place] for array in arrays]
            if done:
                # Each waits for the one before it.
                one, *given = jax.lax.optimization_barrier((one, *given, done[-1]))[:-1]
            done.append(function(one, *given))
        return done

    def copies(array: jax.Array) -> list[jax.Array]:
        return [array + jnp.zeros((), array.dtype) for _ in range(count)]

    seconds = _seconds(chain, copies(out), *(copies(one) for one in rest))
    return max(seconds - overhead, 0.05 * seconds) / count


def _numbers(size: int) -> tuple[float, float]:
    """Seconds for each exponential or the like, and for each sum or product, beyond what their bytes take."""
    x = jnp.ones(size // 4)

    def polynomial(out: jax.Array) -> jax.Array:
        for _ in range(_TERMS):
            out = out * out + 0.5
        return out

    once = _seconds(lambda out: out * 0.5, x + 0.0)
    both = [_seconds(function, x + 0.0) for function in (jnp.tanh, jnp.exp)]
    transcendental = max(sum(both) / len(both) - once, 0.0) / x.size
    return transcendental, max(_seconds(polynomial, x + 0.0) - once, 0.0) / ((2 * _TERMS - 1) * x.size)


def _gap(chain: int, overhead: float) -> float:
    """Seconds that each of many tiny matrix products takes, each of which needs the one before; compilers do not fuse those."""

    def tiny(out: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(chain):
            out = out @ x
        return out

    return max(_seconds(tiny, jnp.zeros((4, 4)), jnp.ones((4, 4))) - overhead, 0.0) / chain


def _fresh(size: int) -> float:
    """Bytes per second of the first touch of new memory, beyond that of writing into memory that was there."""
    x = jnp.ones(size // 4)
    new = jax.jit(lambda x: x + 1.0)
    jax.block_until_ready(new(x))
    fresh = fastest_quiet(lambda: jax.block_until_ready(new(x)), _TRIES, _PATIENCE)
    kept = _seconds(lambda out, x: x + 1.0, jnp.zeros_like(x), x)
    return x.nbytes / max(fresh - kept, 0.01 * fresh)


def _virtual_wires(sizes: Sizes) -> tuple[Wire, ...]:
    """Collectives among virtual devices of a CPU, in a process that has so many."""
    if max(sizes.groups, default=1) < 2:
        return ()
    found = answer_of("calibrate", dataclasses.asdict(sizes), "the collectives")
    return tuple(Wire(**one) for one in found["wires"])


def answer() -> None:
    """Measure the collectives of the sizes in the input, in this process, and print them as JSON."""
    sizes = Sizes(**json.load(sys.stdin))
    make_cpu_devices(max(sizes.groups))
    print(json.dumps({"wires": [dataclasses.asdict(one) for one in _wires(sizes)]}))


def _wires(sizes: Sizes) -> tuple[Wire, ...]:
    """Latency and bandwidth of each kind of collective over each number of devices that there are."""
    found = []
    for devices in sizes.groups:
        if devices > jax.device_count():
            continue
        mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        for kind in _COLLECTIVES:
            points = [_collective(kind, mesh, size) for size in sizes.sent]
            found.append(_line(kind, devices, points))
    return tuple(found)


def _line(kind: str, devices: int, points: list[tuple[float, float]]) -> Wire:
    """The latency of the smallest, and the bandwidth between it and the largest.

    Args:
        points: (bytes sent, seconds).
    """
    (few, short), (many, long) = min(points), max(points)
    bandwidth = (many - few) / max(long - short, 0.02 * long) if many > few else few / short
    return Wire(kind=kind, devices=devices, latency=max(short - few / bandwidth, 0.0), bandwidth=bandwidth)


_COLLECTIVES: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    # On each device's [1, n].
    "all-reduce": lambda x, n: jax.lax.psum(x, "x") / n,
    "all-gather": lambda x, n: jax.lax.all_gather(x, "x", tiled=True).reshape(n, -1),
    "reduce-scatter": lambda x, n: jax.lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True),
    "all-to-all": lambda x, n: jax.lax.all_to_all(x.reshape(n, -1), "x", 0, 0, tiled=True),
    "collective-permute": lambda x, n: jax.lax.ppermute(x, "x", [(i, (i + 1) % n) for i in range(n)]),
}


def _collective(kind: str, mesh: jax.sharding.Mesh, size: int) -> tuple[float, float]:
    """(bytes sent by a device, seconds) of a collective of arrays of `size` bytes on each device."""
    n = mesh.size
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.device_put(jnp.ones((n, size // 4)), sharding)
    spec = PartitionSpec("x")
    call = jax.jit(
        jax.shard_map(lambda x: _COLLECTIVES[kind](x, n), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    jax.block_until_ready(call(x))
    seconds = fastest_quiet(lambda: jax.block_until_ready(call(x)), _TRIES, _PATIENCE / 10)
    share = (n - 1) / n
    sent = {"all-reduce": 2 * share, "all-gather": n - 1, "collective-permute": 1.0}.get(kind, share) * size
    return sent, seconds
