"""Accelerators that need not be available: their chips, with the source of every figure, and files of figures for others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from train.parallel.hardware import PEAK_GIGABYTES, PEAK_TFLOPS
from transformer.errors import Config, UserError, require

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
    cores: int = 1
    """Devices of a TPU chip, as JAX sees them."""
    slice_name: str = ""
    """The compiler's name of a TPU's slices, if it is another one than the target's."""
    most: int = 0
    """The most chips of a TPU's slice."""
    domain: int = 8
    """GPUs that the fast links connect: those of a host, or of a rack."""
    link_name: str = "NVLink"
    """Name of a GPU's fast links."""
    price: float = 0.0
    """Price of a device-hour, in the user's own currency; 0 if it is not known."""


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
        host=16 * GB, clock=1.5e9, dims=2, wrap=16, most=256,
    ),
    "v5p": _chip(
        "TPU v5", memory=95.7 * GIB, link=180 * GB, network=6.25 * GB,
        host=16 * GB, clock=1.75e9, dims=3, wrap=4, most=8960,
    ),
    "v6e": _chip(
        "TPU v6 lite", memory=31.25 * GIB, link=180 * GB, network=12.5 * GB,
        host=32 * GB, clock=1.75e9, dims=2, wrap=16, most=256,
    ),
    "v4": _chip(
        "TPU v4", memory=30.75 * GIB, link=90 * GB, network=6.25 * GB,
        host=16 * GB, clock=1.05e9, dims=3, wrap=4, most=4096,
    ),
    # Google Cloud's page "TPU7x (Ironwood)": a chip has two devices, 2307 TFLOP/s in bfloat16, 192 GiB at 7380 GB/s, links of
    # 1200 GB/s both ways (as v5p, whose links send 90 GB/s one way) and a network of 100 Gb/s; here is a half of it. Its clock is
    # not published, so that a compiled step's time is by peak and bandwidth. A program gets 98 % of the memory.
    "v7": _chip(
        "TPU7x", memory=0.98 * 96 * GIB, link=90 * GB, network=6.25 * GB,
        dims=3, wrap=4, cores=2, slice_name="tpu7x", most=9216,
    ),
    # NVIDIA's data sheets: SXM boards, NVLink one way, one 400 Gb/s (A100: 200 Gb/s) adapter a GPU. XLA takes
    # three quarters of the memory by default; a plan assumes 92 %.
    "a100": _chip("NVIDIA A100", memory=0.92 * 80 * GB, link=300 * GB, network=25 * GB),
    "h100": _chip("NVIDIA H100", memory=0.92 * 84.9 * GB, link=450 * GB, network=50 * GB),
    "h200": _chip("NVIDIA H200", memory=0.92 * 150 * GB, link=450 * GB, network=50 * GB),
    # NVIDIA's data sheets "HGX B200" (eight GPUs) and "GB200 NVL72" (a rack of 72 in one NVLink domain; its figures are for 72
    # GPUs, with sparsity): NVLink 1.8 TB/s both ways, one 400 Gb/s adapter a GPU. Memory as the driver reports it, by OpenXLA's
    # specifications of these GPUs.
    "b200": _chip("NVIDIA B200", memory=0.92 * 191.5 * GB, link=900 * GB, network=50 * GB),
    "gb200": _chip("NVIDIA GB200", memory=0.92 * 197.9 * GB, link=900 * GB, network=50 * GB, domain=72),
    # NVIDIA's data sheets "L4", "A10G" and "GeForce RTX 4090": PCIe 4.0 x16 of 32 GB/s one way, no NVLink, memory as the driver
    # reports it. A host has up to eight; the network is 100 Gb/s for all of them, as of the clouds' largest such machines.
    "l4": _chip("NVIDIA L4", memory=0.92 * 24.1 * GB, link=32 * GB, network=1.56 * GB, link_name="PCIe"),
    "a10g": _chip("NVIDIA A10G", memory=0.92 * 24.1 * GB, link=32 * GB, network=1.56 * GB, link_name="PCIe"),
    "rtx4090": _chip(
        "NVIDIA GeForce RTX 4090", memory=0.92 * 25.7 * GB, link=32 * GB, network=1.56 * GB, link_name="PCIe"
    ),
    # AMD's data sheet "Instinct MI300X": 192 GB, and Infinity Fabric to each of the seven others of 64 GB/s one way; one 400 Gb/s
    # adapter a GPU.
    "mi300x": _chip(
        "AMD Instinct MI300X", memory=0.92 * 192 * GB, link=448 * GB, network=50 * GB, link_name="Infinity Fabric"
    ),
}  # fmt: skip


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TflopsConfig(Config):
    """Peaks of matrix products in TFLOP/s, dense."""

    bfloat16: float
    float32: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("bfloat16", "float32"):
            require(self, field, 0 < getattr(self, field) < float("inf"), "allowed: a number above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChipConfig(Config):
    """A device by its figures, for one that `CHIPS` lacks."""

    tflops: TflopsConfig
    memory: float
    """GB available to a program, as are those below GB/s, in powers of 1000."""
    bandwidth: float
    """Of the memory."""
    link: float
    """That a device sends to the others of its host."""
    network: float
    """That a device sends to those of other hosts."""
    devices_per_host: int = 8
    price: float | None = None
    """Price of a device-hour, in any currency."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("memory", "bandwidth", "link", "network"):
            require(self, field, 0 < getattr(self, field) < float("inf"), "allowed: a number above 0")
        require(self, "devices_per_host", 1 <= self.devices_per_host <= 1024, "allowed: 1 to 1024")
        require(
            self, "price", self.price is None or 0 < self.price < float("inf"), "allowed: a number above 0, or null"
        )


def chip_of_file(path: Path) -> Chip:
    """A device by a YAML file of figures.

    Raises:
        UserError: no such file, or a mistake in it.
    """
    from train.config.load import build
    from train.config.yaml_files import read_yaml

    if path.stem in CHIPS:
        raise UserError(f"{path}: the name {path.stem!r} is that of a chip with figures of its own; rename the file")
    figures = build(ChipConfig, read_yaml(path), str(path))
    return Chip(
        kind=path.stem, platform="gpu", peak_bfloat16=figures.tflops.bfloat16 * 1e12, peak_float32=figures.tflops.float32 * 1e12,
        memory=figures.memory * GB, bandwidth=figures.bandwidth * GB, link=figures.link * GB, network=figures.network * GB,
        domain=figures.devices_per_host, link_name="link", price=figures.price or 0.0,
    )  # fmt: skip
