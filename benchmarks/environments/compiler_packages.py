"""The packages that decide what compilers for absent accelerators answer, in the versions with which plans were tested."""

from __future__ import annotations

import importlib.metadata

EXTRAS = {"tpu": "tpu", "gpu": "cuda13"}
"""The extras of jax that install a platform's compiler."""
SIZES = {"tpu": 2.0e9, "gpu": 7.0e9}
"""Bytes of an environment and of its downloads: it keeps 1.5 GB and 4.6 GB."""
TESTED: dict[str, dict[str, tuple[str, ...]]] = {
    "0.10.2": {
        "tpu": ("jaxlib==0.10.2", "libtpu==0.0.42.1"),
        "gpu": (
            "jaxlib==0.10.2", "jax-cuda13-pjrt==0.10.2", "jax-cuda13-plugin==0.10.2", "nvidia-cublas==13.10.0.20",
            "nvidia-cuda-cccl==13.3.5.0.6", "nvidia-cuda-crt==13.5.37", "nvidia-cuda-cupti==13.5.25",
            "nvidia-cuda-nvcc==13.5.37", "nvidia-cuda-nvrtc==13.5.37", "nvidia-cuda-runtime==13.5.37",
            "nvidia-cudnn-cu13==9.28.1.4", "nvidia-cufft==12.5.0.14", "nvidia-cusolver==12.4.1.2", "nvidia-cusparse==12.9.4.2",
            "nvidia-nccl-cu13==2.32.3", "nvidia-nvjitlink==13.5.37", "nvidia-nvshmem-cu13==3.8.0", "nvidia-nvvm==13.5.37",
        ),
    },
}  # fmt: skip
"""Version of jax → platform → its packages."""
DECIDING = ("jaxlib", "libtpu", "jax-cuda", "nvidia-")
"""Beginnings of the names of the packages that, with jax itself, decide a compiler's answers."""


def wanted(platform: str) -> list[str]:
    """What pip installs for a platform's compiler: the versions that were tested with this environment's jax, else its extra."""
    jax = importlib.metadata.version("jax")
    found = [f"jax[{EXTRAS[platform]}]=={jax}", *TESTED.get(jax, {}).get(platform, ())]
    return found + [f"{name}=={importlib.metadata.version(name)}" for name in ("flax", "optax", "jaxtyping", "numpy")]
