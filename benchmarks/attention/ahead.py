"""Compiles the `pallas` backend for accelerators that are not available: TPU slices and 8 H100s.

B batch, T query position, N query heads, K key/value heads, H head_dim.

The compilers need their own libraries (`jax[tpu]`, `jax[cuda13]`), which seldom belong in the working environment. So
another Python, whose interpreter is an argument, does the work and returns the answer as one line. Compiling proves that
a kernel is valid for the chip, that its blocks fit into its memory and that it works with sharded arrays. It proves
nothing about numerical results or speed.

    python -m benchmarks.attention.ahead tpu --python PATH/TO/python
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from typing import Any

from benchmarks.environments import compilers
from transformer.errors import first_line

COMPILED = "compiled, not run"
"""What `compile_ahead` returns on success."""

TOPOLOGIES = {"tpu": "v5e:2x4", "gpu": "1x1x8"}
"""8 chips of a TPU v5e, and one host with 8 H100s."""

KERNELS = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}
"""The custom call of a program that contains the kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call of attention, by its global shapes; batch and heads are sharded over the topology's devices."""

    batch: int = 8
    num_queries: int = 1024
    num_keys: int = 1024
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    value_dim: int | None = None
    """None: as `head_dim`."""
    dtype: str = "bfloat16"
    causal: bool = True
    window: int | None = None
    segments: bool = False
    soft_cap: float | None = None


def compile_ahead(
    platform: str,
    call: Call | None = None,
    *,
    python: str = sys.executable,
    topology: str | None = None,
    tensor: int = 2,
    timeout: float = 600,
) -> str:
    """Compile a call's forward and backward pass through `attend(backend="pallas")`.

    Args:
        platform: "tpu" or "gpu".
        call: what to compile; packed segments under a causal mask by default.
        python: the interpreter of an environment with the platform's compiler; this one by default.
        topology: "v5e:2x4", "v5p:2x2x1", "v6e:4x4", ... for a TPU, hosts and devices "1x1x8" for GPUs; None: eight devices.
        tensor: devices over which the heads are sharded; the batch is sharded over the others.
        timeout: seconds.

    Returns:
        `COMPILED`, or one line with the reason why it could not be compiled.

    Raises:
        ValueError: no such platform.
    """
    if platform not in TOPOLOGIES:
        raise ValueError(f"compile_ahead: platform {platform!r}; allowed: {', '.join(TOPOLOGIES)}")
    task = {
        "platform": platform,
        "topology": topology or TOPOLOGIES[platform],
        "tensor": tensor,
        "call": dataclasses.asdict(call or Call(segments=True)),
    }
    try:
        done = subprocess.run(
            [python, "-c", "from benchmarks.attention import ahead; ahead.answer()"],
            input=json.dumps(task), capture_output=True, text=True, timeout=timeout, env=compilers.process_environment(platform),
        )  # fmt: skip
    except OSError as error:
        return f"{python} cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"not compiled in {timeout:g} s"
    try:
        return json.loads(done.stdout.splitlines()[-1])["answer"]
    except (IndexError, ValueError, KeyError, TypeError):
        # It ended before it could answer: a module is missing, or the compiler crashed.
        return next(reversed(done.stderr.strip().splitlines()), f"it ended with status {done.returncode} and no answer")


def answer() -> None:
    """Do the task in the input, in the process that has the compiler, and print the answer as JSON."""
    task = json.load(sys.stdin)
    try:
        given = _compile(task["platform"], task["topology"], task["tensor"], Call(**task["call"]))
    except Exception as error:
        given = f"{type(error).__name__}: {first_line(error)}"
    print(json.dumps({"answer": given}))


def _compile(platform: str, topology_name: str, tensor: int, call: Call) -> str:
    if (reason := compilers.missing(platform)) is not None:
        return reason
    # Imported here, so that the calling process does not need it.
    import jax
    import numpy as np
    from flax import nnx
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    devices = compilers.devices_of(platform, topology_name)
    mesh = Mesh(np.array(devices).reshape(-1, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = (("batch", "data"), ("seq", None), ("heads", "tensor"), ("kv_heads", "tensor"))

    def shape(dims: tuple[int, ...], dtype: str, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def heads(length: int, count: int, width: int) -> jax.ShapeDtypeStruct:
        spread = "tensor" if count % tensor == 0 else None
        return shape((call.batch, length, count, width), call.dtype, "data", None, spread)

    q = heads(call.num_queries, call.num_heads, call.head_dim)
    k = heads(call.num_keys, call.num_kv_heads, call.head_dim)
    v = heads(call.num_keys, call.num_kv_heads, call.value_dim or call.head_dim)
    segments = shape((call.batch, call.num_queries), "int32", "data") if call.segments else None
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        text = jax.jit(jax.grad(_loss(call), (0, 1, 2))).lower(q, k, v, segments).compile().as_text()
    return COMPILED if text and KERNELS[platform] in text else "compiled, but without the kernel"


def _loss(call: Call) -> Any:
    from transformer.attention.dispatch import attend
    from transformer.attention.spec.mask import AttentionMask

    def loss(q: Any, k: Any, v: Any, segments: Any) -> Any:
        mask = AttentionMask.causal() if call.causal else AttentionMask.none()
        if call.window is not None:
            mask &= AttentionMask.window(left=call.window)
        if segments is not None:
            mask &= AttentionMask.segments(segments)
        return attend(q, k, v, mask, logit_soft_cap=call.soft_cap, backend="pallas")[0].astype("float32").sum()

    return loss


def main() -> None:
    """Compile one call and print the answer."""
    parser = argparse.ArgumentParser(
        description="compile the pallas attention backend for an accelerator that is not available"
    )
    parser.add_argument("platform", choices=sorted(TOPOLOGIES))
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment with the compiler")
    parser.add_argument("--topology", help="TPU slice or GPU hosts; eight devices by default")
    parser.add_argument("--call", type=json.loads, default={}, help='fields of Call as JSON: {"head_dim": 128}')
    given = parser.parse_args()
    print(compile_ahead(given.platform, Call(**given.call), python=given.python, topology=given.topology))


if __name__ == "__main__":
    main()
