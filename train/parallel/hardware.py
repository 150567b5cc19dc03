"""Peak performance of devices, for utilisation figures."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import jax

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # Dense peaks from the vendors' data sheets, without sparsity. XLA multiplies float32 matrices in TF32 on NVIDIA GPUs
    # since Ampere, and in one bfloat16 pass on TPUs, by default: those are the float32 peaks here. AMD's is that of float32
    # itself. A chip of TPU7x is two devices.
    "TPU v3": {"bfloat16": 61.5, "float32": 61.5},
    "TPU v4": {"bfloat16": 275, "float32": 275},
    "TPU v5 lite": {"bfloat16": 197, "float32": 197},
    "TPU v5p": {"bfloat16": 459, "float32": 459},
    "TPU v5": {"bfloat16": 459, "float32": 459},
    "TPU v6 lite": {"bfloat16": 918, "float32": 918},
    "TPU7x": {"bfloat16": 1153.5, "float32": 1153.5},
    "AMD Instinct MI300X": {"bfloat16": 1307.4, "float32": 163.4},
    "NVIDIA A100": {"bfloat16": 312, "float32": 156},
    "NVIDIA A10": {"bfloat16": 125, "float32": 62.5},
    "NVIDIA A10G": {"bfloat16": 70, "float32": 35},
    "NVIDIA B200": {"bfloat16": 2250, "float32": 1125},
    "NVIDIA GB200": {"bfloat16": 2500, "float32": 1250},
    "NVIDIA GeForce RTX 3090": {"bfloat16": 71, "float32": 35.6},
    "NVIDIA GeForce RTX 4090": {"bfloat16": 165.2, "float32": 82.6},
    "NVIDIA H100 NVL": {"bfloat16": 835, "float32": 417},
    "NVIDIA H100 PCIe": {"bfloat16": 756, "float32": 378},
    "NVIDIA H100": {"bfloat16": 989, "float32": 494},
    "NVIDIA H200": {"bfloat16": 989, "float32": 494},
    "NVIDIA L4": {"bfloat16": 121, "float32": 60},
    "NVIDIA L40S": {"bfloat16": 362, "float32": 183},
    "Tesla T4": {"float16": 65, "float32": 8.1},
    "Tesla V100": {"float16": 125, "float32": 15.7},
}
"""Device kind, without the board and the size of its memory → compute type → TFLOP/s of one JAX device."""
PEAK_GIGABYTES: dict[str, float] = {
    # Bandwidth of the device memory by the vendors' data sheets; of several boards with one name, the faster. A device of
    # TPU v3 is one of a chip's two cores, and so is one of TPU7x.
    "TPU v3": 450,
    "TPU v4": 1228,
    "TPU v5 lite": 819,
    "TPU v5p": 2765,
    "TPU v5": 2765,
    "TPU v6 lite": 1640,
    "TPU7x": 3690,
    "AMD Instinct MI300X": 5300,
    "NVIDIA A100": 2039,
    "NVIDIA A10": 600,
    "NVIDIA A10G": 600,
    "NVIDIA B200": 8000,
    "NVIDIA GB200": 8000,
    "NVIDIA GeForce RTX 3090": 936,
    "NVIDIA GeForce RTX 4090": 1008,
    "NVIDIA H100 NVL": 3938,
    "NVIDIA H100 PCIe": 2039,
    "NVIDIA H100": 3352,
    "NVIDIA H200": 4800,
    "NVIDIA L4": 300,
    "NVIDIA L40S": 864,
    "Tesla T4": 320,
    "Tesla V100": 900,
}
"""Device kind, as in `PEAK_TFLOPS` → GB/s of one JAX device, in powers of 1000."""
_BOARD = re.compile(r"([- ](SXM\d?|PCIe|PCIE|HBM\d\w?|\d+GB))*")
"""What a name may have in addition, such as `-SXM4-80GB`. Whatever else it has is another device, such as a part of one."""


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s, or None if it is not known, as for every CPU."""
    kind = _listed(device)
    tflops = None if kind is None else PEAK_TFLOPS[kind].get(dtype)
    return None if tflops is None else tflops * 1e12


def peak_bandwidth(device: jax.Device) -> float | None:
    """Peak of one device's memory in bytes per second, or None if it is not known, as for every CPU."""
    kind = _listed(device)
    return None if kind is None else PEAK_GIGABYTES[kind] * 1e9


def peak_memory(devices: Sequence[jax.Device]) -> float | None:
    """The most bytes that one of this process's devices has held, or on a CPU the process itself; None where nobody counts."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    peaks = [stats["peak_bytes_in_use"] for device in own if (stats := device.memory_stats())]
    if peaks or devices[0].platform != "cpu":
        return float(max(peaks)) if peaks else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _listed(device: jax.Device) -> str | None:
    """The kind of a device in the tables above."""
    name = device.device_kind
    kinds = [kind for kind in PEAK_TFLOPS if name.startswith(kind) and _BOARD.fullmatch(name.removeprefix(kind))]
    return max(kinds, key=len, default=None)


def utilization(flops_per_second: float, devices: list[jax.Device], dtype: str) -> float | None:
    """Model FLOPs utilisation over all `devices` (Chowdhery et al. 2022, appendix B), or None if no peak is known."""
    peak = peak_flops(devices[0], dtype)
    return None if peak is None else flops_per_second / (peak * len(devices))
