"""`manyheads-bench attention --long T`: runs blockwise attention forward and backward over one long sequence.

One row and one head of 64, causal, float32 on a CPU and bfloat16 on an accelerator, in a separate process, so that the peak
memory is that of this program alone.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import resource
from typing import Any

import jax

from benchmarks.attention.length import HEAD_DIM, arrays_of, candidates, compiled_with_memory
from benchmarks.record import save, seconds_per_call

_MEBIBYTE = 2**20


def run(length: int) -> dict[str, Any]:
    """Measure, save, and return the figures."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(_measure, length).result()
    save("attention_long", f"manyheads-bench attention --long {length}", result)
    return result


def _measure(length: int) -> dict[str, Any]:
    compiled, planned = compiled_with_memory(candidates()["softmax, blockwise"], length)
    arrays = jax.block_until_ready(arrays_of(length))
    before = _peak()
    seconds = seconds_per_call(lambda: compiled(*arrays), 1)
    return {
        "length": length,
        "head_dim": HEAD_DIM,
        "dtype": str(arrays[0].dtype),
        "seconds": seconds,
        "planned_mebibytes_above_inputs": planned / _MEBIBYTE,
        "host_mebibytes_before": before / _MEBIBYTE,
        "host_mebibytes_peak": _peak() / _MEBIBYTE,
        "host_mebibytes_above_inputs": (_peak() - before) / _MEBIBYTE,
    }


def _peak() -> int:
    """The peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
