"""`manyheads-bench attention --length`: time and memory over the length of a sequence, for each mechanism and backend.

One row and one head of 64, float32 on a CPU and bfloat16 on an accelerator, forward and backward, under a causal mask.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention.cases import RULES
from benchmarks.record import save, seconds_per_call
from transformer.attention.dispatch import BACKENDS, BackendError, attend
from transformer.attention.linear.fast_weights import fast_weights
from transformer.attention.linear.feature_maps import unit_length
from transformer.attention.linear.linear_attention import linear_attention
from transformer.attention.spec.mask import AttentionMask

HEAD_DIM = 64
FIRST, LAST = 64, 1 << 20
MEMORY = 6 * 2**30
"""Bytes that a program may use in addition to its inputs."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An attention mechanism or backend, from q, k and v of one head to the output."""

    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    power: int
    """Power of the length with which its time grows."""


def candidates() -> dict[str, Candidate]:
    """Softmax attention by each single-device backend, under a causal mask and a window, and the linear-time mechanisms."""
    found = {}
    for backend in BACKENDS:
        try:
            jax.eval_shape(_softmax(backend), *[_shape(64)] * 3)
        except BackendError:
            continue
        found[f"softmax, {backend}"] = Candidate(_softmax(backend), 2)
    found["softmax, blockwise, window of 1024"] = Candidate(_softmax("blockwise", AttentionMask.window(left=1024)), 1)
    found["linear attention"] = Candidate(lambda q, k, v: linear_attention(q, k, v)[0], 1)
    for rule in RULES:
        found[f"fast weights, {rule}"] = Candidate(_fast(rule), 1)
    return found


def run(budget: float, last: int = LAST, planned: int = 131_072) -> dict[str, Any]:
    """Measure, save JSON and a plot, and return the figures.

    Args:
        budget: seconds that one call may take; a candidate stops at the first length above it.
        last: the longest sequence.
        planned: the length at which the compiler's memory plan of every candidate is recorded.
    """
    figures: dict[str, list[dict[str, float]]] = {}
    for name, candidate in candidates().items():
        figures[name] = []
        length, expected = FIRST, 0.0
        while length <= last and expected <= budget:
            point = _measure(candidate, length, budget)
            if point is None:
                break
            figures[name].append(point)
            print(
                f"{name}, {length}: {point['seconds'] * 1e3:.1f} ms, {point['microseconds_per_token']:.2f} µs a token, "
                f"{point['bytes'] / 2**20:.1f} MiB above the inputs",
                flush=True,
            )
            length, expected = 2 * length, point["seconds"] * 2**candidate.power
    result = {
        "head_dim": HEAD_DIM,
        "budget_seconds": budget,
        "figures": figures,
        "flat": _flatness(figures),
        # The compiler's memory plan, even if running it would exceed the budget.
        f"mebibytes_at_{planned}": {
            name: compiled_with_memory(candidate, planned)[1] / 2**20 for name, candidate in candidates().items()
        },
    }
    path = save(
        "attention_length", f"manyheads-bench attention --length --budget {budget:g} --last {last}", result, show=False
    )
    if importlib.util.find_spec("matplotlib"):
        plot(figures, path.with_suffix(".png"))
    else:
        print("no plot: matplotlib is not installed")
    return result


def plot(figures: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Time per token and memory over the length, as a picture. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for number, (name, points) in enumerate(figures.items()):
        style = {"marker": "osD^v<>*PX"[number % 10], "markersize": 4, "linewidth": 1.4}
        lengths = [point["length"] for point in points]
        axes[0].plot(lengths, [point["microseconds_per_token"] for point in points], label=name, **style)
        axes[1].plot(lengths, [point["bytes"] / 2**20 for point in points], label=name, **style)
    for axis, title, unit in zip(
        axes, ("Time, forward and backward", "Memory above the inputs"), ("µs a token", "MiB"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit, title=title)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"plot: {path}")


def compiled_with_memory(candidate: Candidate, length: int) -> tuple[Any, float]:
    """The program of both passes, and the bytes that it uses in addition to its inputs, results included."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(candidate.attend(q, k, v).astype(jnp.float32)))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*[_shape(length)] * 3).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "this platform's compiler does not report the memory of a program"
    return compiled, float(memory.temp_size_in_bytes + memory.output_size_in_bytes)


def arrays_of(length: int) -> list[jax.Array]:
    """Random q, k and v."""
    shape = _shape(length)
    return [jax.random.normal(key, shape.shape, shape.dtype) for key in jax.random.split(jax.random.key(0), 3)]


def _measure(candidate: Candidate, length: int, budget: float) -> dict[str, float] | None:
    compiled, needed = compiled_with_memory(candidate, length)
    if needed > MEMORY:
        return None
    arrays = arrays_of(length)
    taken = [seconds_per_call(lambda: compiled(*arrays), 1)]
    while len(taken) < 9 and sum(taken) < min(3 * budget, 3.0):
        taken.append(seconds_per_call(lambda: compiled(*arrays), 1))
    seconds = statistics.median(taken)
    return {
        "length": length,
        "seconds": seconds,
        "microseconds_per_token": seconds / length * 1e6,
        "bytes": needed,
    }


def _flatness(figures: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Largest over smallest time per token from 4k to 128k tokens, for candidates that reached these lengths."""
    flat = {}
    for name, points in figures.items():
        speeds = {point["length"]: point["microseconds_per_token"] for point in points}
        inside = [speed for length, speed in speeds.items() if 4096 <= length <= 131_072]
        if 131_072 in speeds:
            flat[name] = max(inside) / min(inside)
    return flat


def _shape(length: int) -> jax.ShapeDtypeStruct:
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jax.ShapeDtypeStruct((1, length, 1, HEAD_DIM), dtype)


def _softmax(backend: str, mask: AttentionMask | None = None) -> Callable[..., jax.Array]:
    causal = AttentionMask.causal() if mask is None else AttentionMask.causal() & mask
    return lambda q, k, v: attend(q, k, v, causal, backend=backend)[0]


def _fast(rule: str) -> Callable[..., jax.Array]:
    kind = RULES[rule]

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        gate = jnp.full(k.shape[:3], 0.9, k.dtype)
        beta, decay = gate if kind.erases else None, jnp.log(gate) if kind.decays else None
        return fast_weights(q, k, v, beta, decay, rule=rule, feature_map=unit_length)[0]

    return run
