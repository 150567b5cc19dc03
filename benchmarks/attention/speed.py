"""`manyheads-bench attention --speed`: compares the backends of softmax attention in turn, forward and backward.

On a CPU: blockwise and the reference. On a GPU: every backend that can run, `auto`, and torch's own
scaled_dot_product_attention, in bfloat16, with TFLOP/s, compared with a plain matrix product in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.record import in_turn, ratio, save, seconds_per_call, summary
from transformer.attention.dispatch import BACKENDS, BackendError, attend
from transformer.attention.spec.mask import AttentionMask
from transformer.errors import first_line

TOKENS = {"cpu": 8192, "gpu": 32_768}
"""Rows times length, so that calls have similar work at each length until one row is left."""
LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "gpu": (512, 2048, 8192, 32_768)}
HEADS = {"cpu": ((4, 64),), "gpu": ((16, 64), (8, 128))}
"""Heads and their width."""


def run(rounds: int) -> dict[str, Any]:
    """Measure, save and return the figures."""
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    cases = [_case(*case, dtype, rounds) for case in _cases(platform)]
    result: dict[str, Any] = {"dtype": dtype.__name__, "matmul_tflops": matmul_tflops(dtype), "cases": cases}
    if platform == "gpu":
        result["auto_over_best"] = max(case["auto_over_best"] for case in cases)
    save("attention_speed", f"manyheads-bench attention --speed --rounds {rounds}", result)
    return result


def matmul_tflops(dtype: Any) -> float:
    """TFLOP/s of a large square matrix product on this device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a: a @ a)
    jax.block_until_ready(multiply(a))
    return 2 * size**3 / min(seconds_per_call(lambda: multiply(a), 3) for _ in range(5)) / 1e12


def flops(batch: int, length: int, num_heads: int, head_dim: int, causal: bool, backward: bool) -> float:
    """FLOPs of the products alone, counting only the causal half: two products forward, five more backward (Dao et al. 2022)."""
    pairs = batch * num_heads * length**2 * (0.5 if causal else 1.0)
    return pairs * head_dim * 2 * (7 if backward else 2)


def _cases(platform: str) -> Iterator[tuple[int, int, int, int, bool, bool]]:
    for num_heads, head_dim in HEADS[platform]:
        for length in LENGTHS[platform]:
            for causal in (True, False):
                for backward in (False, True):
                    yield max(TOKENS[platform] // length, 1), length, num_heads, head_dim, causal, backward


def _case(
    batch: int, length: int, num_heads: int, head_dim: int, causal: bool, backward: bool, dtype: Any, rounds: int
) -> dict[str, Any]:
    shape = (batch, length, num_heads, head_dim)
    q, k, v = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3))
    mask = AttentionMask.causal() if causal else AttentionMask.none()
    work: dict[str, Callable[[], Any]] = {}
    on_cpu = jax.default_backend() == "cpu"
    for backend in ("reference", "blockwise") if on_cpu else (*BACKENDS, "auto"):
        if backend == "reference" and batch * num_heads * length**2 * 4 > 8 * 2**30:
            continue
        try:
            compiled = _compiled(backend, mask, backward, q, k, v)
        except (BackendError, jax.errors.JaxRuntimeError) as refusal:
            print(f"{backend}: {first_line(refusal)}")
            continue
        work[backend] = functools.partial(compiled, q, k, v)
    if not on_cpu:
        work["torch"] = _torch(shape, causal, backward)
    timed = {name: functools.partial(seconds_per_call, call, 1 if on_cpu else 10) for name, call in work.items()}
    seconds = in_turn(timed, rounds)
    total = flops(batch, length, num_heads, head_dim, causal, backward)
    case: dict[str, Any] = {
        "batch": batch, "length": length, "num_heads": num_heads, "head_dim": head_dim, "causal": causal,
        "passes": "forward and backward" if backward else "forward",
        "tflops": {name: total / min(taken) / 1e12 for name, taken in seconds.items()},
        "seconds": {name: summary(taken) for name, taken in seconds.items()},
    }  # fmt: skip
    if "reference" in seconds and "blockwise" in seconds:
        case["blockwise_over_reference"] = ratio(seconds["reference"], seconds["blockwise"])
    if "auto" in seconds:
        best = min(min(taken) for name, taken in seconds.items() if name not in ("auto", "torch"))
        case["auto_over_best"] = min(seconds["auto"]) / best
    print({name: f"{value:.2f} TFLOP/s" for name, value in case["tflops"].items()}, shape, causal, backward, flush=True)
    return case


def _compiled(backend: str, mask: AttentionMask, backward: bool, *arrays: jax.Array) -> Callable[..., Any]:
    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, mask, backend=backend)[0]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(forward(q, k, v).astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2)) if backward else forward).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    return compiled


def _torch(shape: tuple[int, ...], causal: bool, backward: bool) -> Callable[[], Any]:
    import torch

    batch, length, num_heads, head_dim = shape
    ones = torch.ones(batch, num_heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = (torch.randn_like(ones).requires_grad_(backward) for _ in range(3))

    def call() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        if backward:
            torch.autograd.grad((out.float() ** 2).sum(), (q, k, v))
        torch.cuda.synchronize()

    call()
    return call
