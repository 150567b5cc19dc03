"""Compilers for accelerators that are not available: the environments that hold them, and their target devices.

They need their own libraries (`jax[tpu]`, `jax[cuda13]`), which seldom belong in the working environment. So another
Python does the work; this module finds it, or installs it on request.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import environments
from transformer.errors import UserError

PACKAGES = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin")}
"""Modules, one of which must be installed."""

EXTRAS = {"tpu": "tpu", "gpu": "cuda13"}
"""The extras of jax that install them."""

_GPUS: dict[str, dict[str, Any]] = {
    "a100": {
        "cores": 108, "shared": 166912, "per_core": 167936, "bandwidth": 2039000000000, "l2": 41943040, "clock": 1.41,
        "memory": 84986691584, "major": 8, "name": "NVIDIA A100-SXM4-80GB",
    },
    "h100": {
        "cores": 132, "shared": 232448, "per_core": 233472, "bandwidth": 3352320000000, "l2": 52428800, "clock": 1.98,
        "memory": 84942979072, "major": 9, "name": "NVIDIA H100 80GB HBM3",
    },
    "h200": {
        "cores": 132, "shared": 232448, "per_core": 233472, "bandwidth": 4800000000000, "l2": 62914560, "clock": 1.98,
        "memory": 150754820096, "major": 9, "name": "NVIDIA H200",
    },
}  # fmt: skip

_GPU_FORM = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {per_core}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: {shared} cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


def devices_of(platform: str, topology: str, chip: str = "h100") -> list[Any]:
    """The devices of a topology, in a process that has the compiler.

    Args:
        platform: tpu or gpu.
        topology: "v5e:4x4" of TPUs; "1x2x8", two hosts with eight, of GPUs.
        chip: kind of GPU.
    """
    from jax.experimental import topologies

    if platform == "tpu":
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    _answer_for(_GPUS[chip]["major"])
    config = _GPU_FORM.format(**_GPUS[chip])
    described = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=config, topology=topology)
    return list(described.devices)


def _answer_for(major: int) -> None:
    """JAX's attention kernel asks the devices at hand what they are capable of: let it get the absent GPU's answer."""
    from jax._src.cudnn import fused_attention_stablehlo

    def check(wanted: str) -> bool:
        return float(wanted) <= major

    fused_attention_stablehlo.check_compute_capability = check


def missing(platform: str) -> str | None:
    """Why this process cannot compile for the platform, or None."""
    if any(map(importlib.util.find_spec, PACKAGES[platform])):
        return None
    return f"the compiler is not installed: {' or '.join(PACKAGES[platform])}"


def process_environment(platform: str) -> dict[str, str]:
    """Environment variables of a compiling process: this program's own modules, and no search for accelerators."""
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    # Without a TPU the process itself runs on the CPU; without a GPU the CUDA plugin's check would stop it.
    own = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    if platform == "tpu":
        # Several may compile at the same time, as they share no chip.
        own = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return kept | own | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}


def absent(platform: str) -> str:
    """The message that there is no compiler, and how to install one."""
    return (
        f"no compiler for {platform}; --install makes an environment with jax[{EXTRAS[platform]}], "
        "--compiler-python PATH names an existing one"
    )


def find(platform: str, python: str | None = None, *, make: bool = False) -> str | None:
    """The interpreter of an environment with the platform's compiler: the given one, or the one installed before, or None.

    Args:
        make: if there is none, `install` one.

    Raises:
        UserError: the given one does not run, or has no compiler.
    """
    if python is None:
        return environments.installed(_folder(platform)) or (install(platform) if make else None)
    names = ", ".join(repr(name) for name in PACKAGES[platform])
    test = f"import importlib.util, sys, jax; sys.exit(not any(map(importlib.util.find_spec, ({names},))))"
    try:
        done = subprocess.run([python, "-c", test], capture_output=True, text=True, env=process_environment(platform))
    except OSError as error:
        raise UserError(f"{python}: cannot be started: {error.strerror}") from None
    if done.returncode:
        raise UserError(f"{python}: it has no {' or '.join(PACKAGES[platform])}; install jax[{EXTRAS[platform]}] there")
    return python


def install(platform: str) -> str:
    """Install the platform's compiler into an environment in the user's cache, with this one's versions; its interpreter.

    Raises:
        UserError: pip could not install it.
    """
    wanted = [f"jax[{EXTRAS[platform]}]=={importlib.metadata.version('jax')}"]
    wanted += [f"{name}=={importlib.metadata.version(name)}" for name in ("flax", "optax", "jaxtyping", "numpy")]
    return environments.install(_folder(platform), wanted, "name an existing environment instead")


def _folder(platform: str) -> Path:
    return environments.folder_of("compilers", f"{platform}-jax{importlib.metadata.version('jax')}")
