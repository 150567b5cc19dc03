"""The most that a device can do: by its data sheet, or measured where there is none."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from train.parallel.hardware import peak_bandwidth, peak_flops

_TRIES = 15


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Of one device."""

    flops: float
    """FLOP/s of matrix products, in the model's compute type."""
    bandwidth: float
    """Bytes per second of its memory."""
    measured: bool = False
    """Whether no data sheet is known, and both were measured here."""
    shared: bool = False
    """Whether all devices together have no more, as virtual ones of one CPU."""

    def of_all(self, devices: int) -> float:
        """FLOP/s of all devices together."""
        return self.flops if self.shared else self.flops * devices

    def seconds(self, flops: float, bytes: float) -> float:
        """The least time for so much work: the longer of arithmetic and memory (Williams et al. 2009)."""
        return max(flops / self.flops, bytes / self.bandwidth)


def peaks_of(devices: list[jax.Device], dtype: str) -> Peaks:
    """The peaks of each of `devices`, which are of one kind."""
    flops, bandwidth = peak_flops(devices[0], dtype), peak_bandwidth(devices[0])
    if flops is not None and bandwidth is not None:
        return Peaks(flops, bandwidth)
    on_cpu = devices[0].platform == "cpu"
    size, numbers = (1024, 2**24) if on_cpu else (8192, 2**28)
    with jax.default_device(devices[0]):
        x, y = jnp.full((size, size), 1 / size, dtype), jnp.ones((numbers,), jnp.float32)
        product = _least_seconds(jax.jit(lambda x: x @ x), x)
        # In place: new memory would be cleared first.
        pass_over = _least_seconds(jax.jit(lambda y: -y, donate_argnums=0), y)
    return Peaks(2 * size**3 / product, 2 * 4 * numbers / pass_over, measured=True, shared=on_cpu)


def _least_seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    x = jax.block_until_ready(function(x))
    least = math.inf
    for _ in range(_TRIES):
        began = time.perf_counter()
        x = jax.block_until_ready(function(x))
        least = min(least, time.perf_counter() - began)
    return least
