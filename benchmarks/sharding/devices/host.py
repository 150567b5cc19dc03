"""This machine's CPU as devices to plan for: virtual ones, which share its cores, with the rates that were measured on it."""

from __future__ import annotations

import os

from benchmarks.sharding.devices.chips import Chip
from benchmarks.sharding.devices.profile import ELEMENTWISE, Profile, own_path, read
from transformer.errors import UserError


def host_chip(profile: Profile, devices: int) -> Chip:
    """One of `devices` virtual devices of a CPU, each of which has its part of the whole, by the CPU's profile."""
    peak = max(one.rate for one in profile.products) / devices
    bandwidth = profile.curves[ELEMENTWISE][-1][1] / devices
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return Chip(
        kind="cpu", platform="cpu", peak_bfloat16=peak, peak_float32=peak, memory=memory, bandwidth=bandwidth, link=bandwidth / 4,
        network=bandwidth / 4, domain=devices, link_name="memory",
    )  # fmt: skip


def own_profile() -> Profile:
    """What was measured on this machine's CPU.

    Raises:
        UserError: nothing was.
    """
    path = own_path("cpu")
    if not path.exists():
        raise UserError(
            "--target cpu: this machine's CPU has not been measured; run JAX_PLATFORMS=cpu manyheads-bench calibrate first"
        )
    return read(path)
