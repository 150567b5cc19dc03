"""Accelerators that need not be available: chips, memory, and links, by the vendors' data sheets."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from benchmarks.sharding.profile import Profile, profile_of
from train.parallel.hardware import PEAK_GIGABYTES, PEAK_TFLOPS
from transformer.errors import UserError, nearest

GB = 1e9
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX sees it."""

    kind: str
    """JAX's name of such devices, or a prefix of it."""
    platform: Literal["tpu", "gpu", "cpu"]
    peak_bfloat16: float
    """FLOP/s, dense."""
    peak_float32: float
    """FLOP/s of XLA's float32 matrix products."""
    memory: float
    """Bytes available to a program."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""
    link: float
    """Bytes per second that a device sends over its fast links: for a TPU along one dim of the torus, in both directions
    together; for a GPU to the others of its host."""
    network: float
    """Bytes per second between hosts, for each device."""
    host: float = 0.0
    """Bytes per second to or from host memory, if the compiler schedules such transfers."""
    clock: float = 0.0
    """Clock in cycles per second, the unit of a TPU compiler's estimates."""
    dims: int = 0
    """Number of dims of the torus."""
    wrap: int = 0
    """Length from which a dim of the slice wraps around to a ring."""


def _chip(kind: str, **data: Any) -> Chip:
    """Peaks of arithmetic and memory are the same as for utilisation figures."""
    bfloat16, float32 = (PEAK_TFLOPS[kind][dtype] * 1e12 for dtype in ("bfloat16", "float32"))
    platform: Literal["tpu", "gpu"] = "tpu" if kind.startswith("TPU") else "gpu"
    bandwidth = PEAK_GIGABYTES[kind] * GB
    return Chip(
        kind=kind, platform=platform, peak_bfloat16=bfloat16, peak_float32=float32, bandwidth=bandwidth, **data
    )  # fmt: skip


CHIPS = {
    # Google's data sheets; links by the Scaling Book (Austin et al. 2025), one way 45 or 90 GB/s each, and PCIe. The
    # clock follows from the peak and the matrix units (4 or 8 of 128 × 128; of v6e 4 of 256 × 256, at half the rate).
    "v5e": _chip(
        "TPU v5 lite", memory=15.75 * GIB, link=90 * GB, network=6.25 * GB,
        host=16 * GB, clock=1.5e9, dims=2, wrap=16,
    ),
    "v5p": _chip(
        "TPU v5", memory=95.7 * GIB, link=180 * GB, network=6.25 * GB,
        host=16 * GB, clock=1.75e9, dims=3, wrap=4,
    ),
    "v6e": _chip(
        "TPU v6 lite", memory=31.25 * GIB, link=180 * GB, network=12.5 * GB,
        host=32 * GB, clock=1.75e9, dims=2, wrap=16,
    ),
    "v4": _chip(
        "TPU v4", memory=30.75 * GIB, link=90 * GB, network=6.25 * GB,
        host=16 * GB, clock=1.05e9, dims=3, wrap=4,
    ),
    # NVIDIA's data sheets: SXM boards, NVLink one way, one 400 Gb/s (A100: 200 Gb/s) adapter a GPU. XLA takes
    # three quarters of the memory by default; a plan assumes 92 %.
    "a100": _chip("NVIDIA A100", memory=0.92 * 80 * GB, link=300 * GB, network=25 * GB),
    "h100": _chip("NVIDIA H100", memory=0.92 * 84.9 * GB, link=450 * GB, network=50 * GB),
    "h200": _chip("NVIDIA H200", memory=0.92 * 150 * GB, link=450 * GB, network=50 * GB),
}  # fmt: skip

GPUS_A_HOST = 8


def chip_name(device: Any) -> str:
    """The name of a device's kind, among `CHIPS`.

    Raises:
        UserError: it is of another kind.
    """
    known = {name: chip.kind for name, chip in CHIPS.items() if device.device_kind.startswith(chip.kind)}
    if not known:
        kinds = ", ".join(chip.kind for chip in CHIPS.values())
        raise UserError(f"kind of device: got {device.device_kind!r}; allowed: {kinds}")
    return max(known, key=lambda name: len(known[name]))


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
        products, memory = profile.efficiencies(self.dtype, self.peak_flops, self.memory_bandwidth)
        return dataclasses.replace(
            self,
            profile=profile,
            matmul_efficiency=products or self.matmul_efficiency,
            memory_efficiency=memory,
        )

    @property
    def basis(self) -> str:
        """What predictions of time rest on."""
        if self.profile is not None:
            return self.profile.title
        return f"published figures, of which products reach {self.matmul_efficiency:.0%} and memory {self.memory_efficiency:.0%}"

    @property
    def num_devices(self) -> int:
        """Total number of devices."""
        return math.prod(self.shape)

    @property
    def topology(self) -> str:
        """The compiler's name of the topology."""
        if self.chip.platform == "tpu":
            return self.name
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
            return tuple(device.coords)[: len(self.shape)]
        return divmod(device.id, self.shape[-1])

    def link(self, group: tuple[tuple[int, ...], ...]) -> tuple[str, float]:
        """The kind of link among devices at these coordinates, and the bytes per second that one of them sends over it."""
        spans = [max(places) - min(places) + 1 for places in zip(*group, strict=True)] if group else []
        if self.chip.platform != "tpu":
            between_hosts = bool(spans) and spans[0] > 1
            return ("network", self.chip.network) if between_hosts else ("NVLink", self.chip.link * 0.8)
        # Along a dim that is a ring data is sent in both directions; along an open one the middle link carries everything.
        ways = [
            self.chip.link if size % self.chip.wrap == 0 and size == span else self.chip.link / 2
            for span, size in zip(spans, self.shape, strict=False)
            if span > 1
        ]
        return "ICI", 0.9 * (sum(ways) if ways else self.chip.link / 2)

    def link_of_axis(self, axis: str, sizes: Mapping[str, int]) -> float:
        """Bytes per second over an axis of a mesh whose last axis has the nearest devices, before devices are assigned."""
        inside = math.prod(size for name, size in list(sizes.items())[list(sizes).index(axis) + 1 :])
        span = inside * sizes[axis]
        if self.chip.platform == "tpu":
            # An axis that spans several dims of the torus has the links of all.
            dims, length = 0, 1
            for size in reversed(self.shape):
                if length >= span:
                    break
                dims += length * size > inside
                length *= size
            ways = 1.0 if all(size % self.chip.wrap == 0 for size in self.shape) else 0.5
            return 0.9 * self.chip.link * ways * max(dims, 1)
        return self.chip.network if span > self.shape[-1] else 0.8 * self.chip.link


def parse_target(text: str) -> Target:
    """A target by its name, such as v5e:4x4, v5p:4x4x4, h100:8 or h100:2x8 (two hosts).

    Raises:
        UserError: no such chip, or no such slice of it.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"--target: got {text!r}; allowed: {', '.join(CHIPS)}, as in v5e:4x4 or h100:8.{nearest(name, CHIPS)}"
        )
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        example = "x".join(["4"] * chip.dims) if chip.dims else "8 or 2x8"
        raise UserError(f"--target: got {text!r}; allowed: {name}: and a number of chips, as in {name}:{example}")
    dims = tuple(int(size) for size in shape.split("x"))
    if chip.platform == "tpu":
        if len(dims) != chip.dims:
            raise UserError(
                f"--target: got {text!r}; allowed: {chip.dims} numbers, since a slice of {name} is a torus of {chip.dims} dims"
            )
        return Target(text, chip, dims)
    if len(dims) > 2:
        raise UserError(f"--target: got {text!r}; allowed: GPUs, as in {name}:8, or hosts x GPUs, as in {name}:2x8")
    if len(dims) == 1:
        whole, rest = divmod(dims[0], GPUS_A_HOST)
        if dims[0] > GPUS_A_HOST and rest:
            raise UserError(
                f"--target: got {text!r}; allowed: up to {GPUS_A_HOST} GPUs, or a multiple of {GPUS_A_HOST}"
            )
        dims = (whole, GPUS_A_HOST) if dims[0] > GPUS_A_HOST else (1, dims[0])
    return Target(text, chip, dims)
