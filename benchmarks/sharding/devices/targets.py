"""Devices to plan for, which need not be available: how many of which chip, and how they are linked."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.sharding.devices.chips import CHIPS, Chip, chip_of_file
from benchmarks.sharding.devices.host import host_chip, own_profile
from benchmarks.sharding.devices.profile import Profile, profile_of
from transformer.errors import UserError, nearest

CORE_LINKS = 6
"""Links of the torus, one way, that the connection of a TPU chip's two devices is worth (Google Cloud, TPU7x)."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    """For a TPU slice its torus; for a GPU cluster (hosts, GPUs per host)."""
    dtype: str = "bfloat16"
    """Compute type of a step."""

    matmul_efficiency: float = 0.75
    """Fraction of the peak FLOP/s that large products reach; a typical value of libraries until `plan --validate` measures it."""
    memory_efficiency: float = 0.85
    """The same for the memory bandwidth."""
    latency: float = 3e-6
    """Latency of a collective in seconds, for each doubling of its devices."""
    profile: Profile | None = None
    """Measured rates of such devices, which come before the published figures and the efficiencies above."""

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Target:
        """Restore it from the output of `dataclasses.asdict` and JSON."""
        profile = None if data.get("profile") is None else Profile.from_data(data["profile"])
        return cls(**data | {"chip": Chip(**data["chip"]), "shape": tuple(data["shape"]), "profile": profile})

    def profiled(self) -> Target:
        """The target with the profile of its kind of device, if there is one, and efficiencies by it for estimates by formula.

        Raises:
            UserError: the profile's file is damaged.
        """
        profile = profile_of(self.name.partition(":")[0])
        if profile is None:
            return self
        return self.with_profile(profile)

    def with_profile(self, profile: Profile) -> Target:
        """The target with this profile, and efficiencies by it for estimates by formula."""
        target = dataclasses.replace(self, profile=profile)
        turns = target.turns
        products, memory = profile.efficiencies(self.dtype, turns * self.peak_flops, turns * self.memory_bandwidth)
        return dataclasses.replace(
            target, matmul_efficiency=products or self.matmul_efficiency, memory_efficiency=memory
        )

    @property
    def turns(self) -> int:
        """Devices that share the rates of the profile: all, where they are virtual devices of one CPU, and otherwise one."""
        return self.num_devices if self.profile is not None and self.profile.devices_share else 1

    @property
    def basis(self) -> str:
        """What predictions of time rest on."""
        if self.profile is not None:
            return self.profile.title
        return f"published figures, of which products reach {self.matmul_efficiency:.0%} and memory {self.memory_efficiency:.0%}"

    @property
    def num_devices(self) -> int:
        """Total number of devices."""
        return math.prod(self.shape) * self.chip.cores

    @property
    def kind(self) -> str:
        """The name of the chip."""
        return self.name.partition(":")[0]

    @property
    def topology(self) -> str:
        """The compiler's name of the topology."""
        if self.chip.platform == "tpu":
            return f"{self.chip.slice_name or self.kind}:{'x'.join(map(str, self.shape))}"
        return "x".join(map(str, (1, *self.shape)))

    @property
    def peak_flops(self) -> float:
        """FLOP/s of one device."""
        return self.chip.peak_bfloat16 if self.dtype == "bfloat16" else self.chip.peak_float32

    @property
    def memory_bandwidth(self) -> float:
        """Memory bandwidth of one device, bytes per second."""
        return self.chip.bandwidth

    @property
    def clock(self) -> float:
        """Cycles per second in a TPU compiler's estimates; 0 without such estimates."""
        return self.chip.clock

    def place(self, device: Any) -> tuple[int, ...]:
        """Coordinates of a device of the target: in the torus, or (host, GPU)."""
        if self.chip.platform == "tpu":
            core = (device.core_on_chip,) if self.chip.cores > 1 else ()
            return (*tuple(device.coords)[: len(self.shape)], *core)
        return divmod(device.id, self.shape[-1])

    def link(self, group: tuple[tuple[int, ...], ...]) -> tuple[str, float]:
        """The kind of link among devices at these coordinates, and the bytes per second that one of them sends over it."""
        spans = [max(places) - min(places) + 1 for places in zip(*group, strict=True)] if group else []
        if self.chip.platform != "tpu":
            between_hosts = bool(spans) and spans[0] > 1
            return ("network", self.chip.network) if between_hosts else (self.chip.link_name, self.chip.link * 0.8)
        # Along a dim that is a ring data is sent in both directions; along an open one the middle link carries everything.
        ways = [
            self.chip.link if size % self.chip.wrap == 0 and size == span else self.chip.link / 2
            for span, size in zip(spans, self.shape, strict=False)
            if span > 1
        ]
        inside = CORE_LINKS * self.chip.link if self.chip.cores > 1 else self.chip.link / 2
        return "ICI", 0.9 * (sum(ways) if ways else inside)

    def link_of_axis(self, axis: str, sizes: Mapping[str, int]) -> float:
        """Bytes per second over an axis of a mesh whose last axis has the nearest devices, before devices are assigned."""
        inside = math.prod(size for name, size in list(sizes.items())[list(sizes).index(axis) + 1 :])
        span = inside * sizes[axis]
        if self.chip.platform == "tpu":
            if span <= self.chip.cores:
                return 0.9 * CORE_LINKS * self.chip.link
            # An axis that spans several dims of the torus has the links of all.
            dims, length = 0, self.chip.cores
            for size in reversed(self.shape):
                if length >= span:
                    break
                dims += length * size > inside
                length *= size
            ways = 1.0 if all(size % self.chip.wrap == 0 for size in self.shape) else 0.5
            return 0.9 * self.chip.link * ways * max(dims, 1)
        return self.chip.network if span > self.shape[-1] else 0.8 * self.chip.link


def parse_target(text: str) -> Target:
    """A target by its name, such as v5e:4x4, v5p:4x4x4, h100:8 or h100:2x8 (two hosts), or by a file of figures: my.yaml:8.

    Raises:
        UserError: no such chip, no such slice of it, or a mistake in the file.
    """
    name, _, shape = text.rpartition(":") if ":" in text else (text, "", "")
    if name == "cpu":
        return host_target(shape)
    own = name.endswith((".yaml", ".yml"))
    if not own and name not in CHIPS:
        raise UserError(
            f"--target: got {text!r}; allowed: {', '.join(CHIPS)}, as in v5e:4x4 or h100:8, cpu for virtual devices of this "
            f"machine's CPU, as in cpu:8, or a file of figures, as in my.yaml:8.{nearest(name, [*CHIPS, 'cpu'])}"
        )
    chip = chip_of_file(Path(name)) if own else CHIPS[name]
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape):
        example = "x".join(["4"] * chip.dims) if chip.dims else "8 or 2x8"
        raise UserError(f"--target: got {text!r}; allowed: {name}: and a number of chips, as in {name}:{example}")
    dims = tuple(int(size) for size in shape.split("x"))
    if chip.platform == "tpu":
        _check_slice(text, name, chip, dims)
    else:
        dims = _hosts(text, name, chip, dims)
    return Target(f"{Path(name).stem}:{shape}" if own else text, chip, dims)


def host_target(number: str | int, profile: Profile | None = None) -> Target:
    """Virtual devices of this machine's CPU.

    Args:
        number: of devices.
        profile: of the CPU; by default what was measured on it.

    Raises:
        UserError: no such number, or the CPU has not been measured.
    """
    if not re.fullmatch(r"[1-9]\d?", str(number)):
        raise UserError(f"--target: got 'cpu:{number}'; allowed: 1 to 99 virtual devices, as in cpu:8")
    profile = profile or own_profile()
    return Target(f"cpu:{number}", host_chip(profile, int(number)), (1, int(number)), "float32").with_profile(profile)


def at_hand(kind: str, number: int, profile: Profile | None = None) -> Target:
    """So many of the devices that are here.

    Args:
        kind: `cpu`, or the name of the chip.
        profile: of it; by default the one there is.
    """
    if kind == "cpu":
        return host_target(number, profile)
    target = Target(f"{kind}:{number}", CHIPS[kind], (1, number))
    return target.profiled() if profile is None else target.with_profile(profile)


def _check_slice(text: str, name: str, chip: Chip, dims: tuple[int, ...]) -> None:
    """A slice consists of hosts with 2 × 2 chips each, or of a single chip."""
    if len(dims) != chip.dims:
        raise UserError(
            f"--target: got {text!r}; allowed: {chip.dims} numbers, since a slice of {name} is a torus of {chip.dims} dims; "
            f"the nearest: {name}:{_text(_nearest_slice(chip, math.prod(dims)))}"
        )
    whole = all(size % 2 == 0 for size in dims[:2]) or math.prod(dims) == 1
    if not whole or math.prod(dims) > chip.most:
        even = tuple(max(size + size % 2, 2) for size in dims[:2]) + dims[2:]
        near = even if math.prod(even) <= chip.most else _nearest_slice(chip, math.prod(dims))
        raise UserError(
            f"--target: got {text!r}; allowed: slices of {name} of up to {chip.most:,} chips whose first two numbers are even, "
            f"since a host has 2x2 chips; the nearest: {name}:{_text(near)}"
        )


def _nearest_slice(chip: Chip, chips: int) -> tuple[int, ...]:
    """The most cubic slice with a number of chips nearest to `chips`."""
    sizes = [2**power for power in range(1, 6)]
    found = [
        one
        for one in itertools.combinations_with_replacement(sizes, chip.dims)
        if math.prod(one) <= chip.most
    ]  # fmt: skip
    return min(found, key=lambda one: (abs(math.prod(one) - chips), max(one) / min(one)))


def _hosts(text: str, name: str, chip: Chip, dims: tuple[int, ...]) -> tuple[int, int]:
    """Hosts, and GPUs a host."""
    if len(dims) > 2:
        raise UserError(f"--target: got {text!r}; allowed: GPUs, as in {name}:8, or hosts x GPUs, as in {name}:2x8")
    count = math.prod(dims)
    whole, rest = divmod(count, chip.domain)
    near = f"{name}:{max(round(count / chip.domain), 1) * chip.domain}"
    if len(dims) == 1:
        if count > chip.domain and rest:
            raise UserError(
                f"--target: got {text!r}; allowed: up to {chip.domain} GPUs, or a multiple of {chip.domain}; the nearest: {near}"
            )
        return (whole, chip.domain) if count > chip.domain else (1, count)
    if dims[1] > chip.domain:
        raise UserError(
            f"--target: got {text!r}; allowed: at most {chip.domain} GPUs that fast links connect; the nearest: {near}"
        )
    return dims[0], dims[1]


def _text(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims))
