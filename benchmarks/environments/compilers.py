"""Compilers for accelerators that are not available: the environments that hold them, and their target devices.

They need their own libraries (`jax[tpu]`, `jax[cuda13]`), which seldom belong in the working environment. So another
Python does the work; this module finds it, or installs it on request.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environments import environment
from benchmarks.environments.compiler_packages import DECIDING, EXTRAS, SIZES, wanted
from transformer.errors import UserError

PACKAGES = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin")}
"""Modules, one of which must be installed."""

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
    # Those of compute capability 10 by OpenXLA's own specifications, the others by NVIDIA's data sheets and CUDA's tables.
    "b200": {
        "cores": 148, "shared": 232448, "per_core": 233472, "bandwidth": 7672320000000, "l2": 132644864, "clock": 1.965,
        "memory": 191514411008, "major": 10, "name": "NVIDIA B200",
    },
    "gb200": {
        "cores": 152, "shared": 232448, "per_core": 233472, "bandwidth": 7928064000000, "l2": 135528448, "clock": 2.062,
        "memory": 197897748480, "major": 10, "name": "NVIDIA GB200",
    },
    "l4": {
        "cores": 58, "shared": 101376, "per_core": 102400, "bandwidth": 300000000000, "l2": 50331648, "clock": 2.04,
        "memory": 24152899584, "major": 8, "minor": 9, "threads": 1536, "name": "NVIDIA L4",
    },
    "a10g": {
        "cores": 80, "shared": 101376, "per_core": 102400, "bandwidth": 600000000000, "l2": 6291456, "clock": 1.71,
        "memory": 24146608128, "major": 8, "minor": 6, "threads": 1536, "name": "NVIDIA A10G",
    },
    "rtx4090": {
        "cores": 128, "shared": 101376, "per_core": 102400, "bandwidth": 1008000000000, "l2": 75497472, "clock": 2.52,
        "memory": 25757220864, "major": 8, "minor": 9, "threads": 1536, "name": "NVIDIA GeForce RTX 4090",
    },
}  # fmt: skip

_GPU_FORM = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {per_core}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: {shared} cuda_compute_capability {{ major: {major} minor: {minor} }}
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
        platform: tpu, gpu or cpu.
        topology: "v5e:4x4" of TPUs; "1x2x8", two hosts with eight, of GPUs; "1x1x8", eight virtual devices, of a CPU.
        chip: kind of GPU.
    """
    if platform == "cpu":
        return _virtual_devices(int(topology.rpartition("x")[2]))
    from jax.experimental import topologies

    if platform == "tpu":
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **_slice_options(topology))
        return list(described.devices)
    figures = {"minor": 0, "threads": 2048} | _GPUS[chip]
    _answer_for(figures["major"] + figures["minor"] / 10)
    config = _GPU_FORM.format(**figures)
    described = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=config, topology=topology)
    return list(described.devices)


@functools.cache
def _virtual_devices(number: int) -> list[Any]:
    import jax

    from train.parallel.runtime import make_cpu_devices

    make_cpu_devices(number)
    return jax.devices()


def covers(platform: str, chip: str) -> bool:
    """Whether a chip's programs can be compiled: any TPU's or CPU's, and those of GPUs whose figures the compiler is given."""
    return platform != "gpu" or chip in _GPUS


def _slice_options(topology: str) -> dict[str, Any]:
    """What the compiler for TPUs needs to know besides the name: that v4's two cores are one device, and how small a slice is."""
    options: dict[str, Any] = {}
    chip, _, shape = topology.partition(":")
    if chip == "v4":
        options["chip_config_name"] = "megacore"
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    return options


def _answer_for(capability: float) -> None:
    """JAX's attention kernel asks the devices at hand what they are capable of: let it get the absent GPU's answer."""
    from jax._src.cudnn import fused_attention_stablehlo

    def check(wanted: str) -> bool:
        return float(wanted) <= capability

    fused_attention_stablehlo.check_compute_capability = check


def missing(platform: str) -> str | None:
    """Why this process cannot compile for the platform, or None."""
    if platform == "cpu" or any(map(importlib.util.find_spec, PACKAGES[platform])):
        return None
    return f"the compiler is not installed: {' or '.join(PACKAGES[platform])}"


def process_environment(platform: str) -> dict[str, str]:
    """Environment variables of a compiling process: this program's own modules, and no search for accelerators."""
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    # Without a TPU the process itself runs on the CPU; without a GPU the CUDA plugin's check would stop it.
    own = {"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    if platform == "tpu":
        # Several may compile at the same time, as they share no chip.
        own = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return kept | own | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


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
    if platform == "cpu":
        # JAX itself has the compiler.
        return sys.executable
    if python is None:
        return environment.installed(_folder(platform)) or (install(platform) if make else None)
    names = ", ".join(repr(name) for name in PACKAGES[platform])
    test = (
        "import importlib.util, jax; print(jax.__version__, sep=''); "
        f"raise SystemExit(not any(map(importlib.util.find_spec, ({names},))))"
    )
    try:
        done = subprocess.run([python, "-c", test], capture_output=True, text=True, env=process_environment(platform))
    except OSError as error:
        raise UserError(f"{python}: cannot be started: {error.strerror}") from None
    if done.returncode:
        raise UserError(f"{python}: it has no {' or '.join(PACKAGES[platform])}; install jax[{EXTRAS[platform]}] there")
    theirs, ours = done.stdout.split()[-1], importlib.metadata.version("jax")
    if theirs != ours:
        raise UserError(
            f"{python}: it has jax {theirs}; allowed: {ours}, this program's own; install jax[{EXTRAS[platform]}]=={ours} there, "
            "or let --install make an environment"
        )
    return python


def versions_of(python: str) -> dict[str, str]:
    """Versions of the packages in an environment that decide its compiler's answers."""
    code = (
        "import importlib.metadata as m, json\n"
        "found = {d.name.lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{n: v for n, v in found.items() if n == 'jax' or n.startswith({DECIDING})}}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return dict(sorted(json.loads(done.stdout).items())) if done.returncode == 0 else {}


def install(platform: str) -> str:
    """Install the platform's compiler into an environment in the user's cache, with this one's versions; its interpreter.

    Raises:
        UserError: the disk is too small, pip could not install it, or it does not compile.
    """
    advice = "name an existing environment: --compiler-python PATH"
    return environment.install(
        _folder(platform), wanted(platform), advice, size=SIZES[platform], check=functools.partial(check, platform)
    )


def check(platform: str, python: str) -> None:
    """Compile a tiny program with an environment's compiler; raise a `UserError` if that fails."""
    topology = {"tpu": "v5e:2x2", "gpu": "1x1x1"}[platform]
    code = f"from benchmarks.environments import compilers; compilers.compile_something({platform!r}, {topology!r})"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=process_environment(platform))
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "without output")
        raise UserError(f"{python}: a tiny program does not compile for {platform}: {last.strip()[:300]}")


def compile_something(platform: str, topology: str) -> None:
    """Compile a product of two matrices, in a process that has the compiler."""
    import jax

    where = jax.sharding.SingleDeviceSharding(devices_of(platform, topology)[0])
    matrix = jax.ShapeDtypeStruct((128, 128), "bfloat16", sharding=where)
    jax.jit(lambda x: x @ x).lower(matrix).compile()


def _folder(platform: str) -> Path:
    return environment.folder_of("compilers", f"{platform}-jax{importlib.metadata.version('jax')}")
