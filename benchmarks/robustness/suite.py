"""The time that the test suite takes with an empty compilation cache, next to two measures of the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.record import save, seconds_per_call
from transformer.errors import UserError

ARGUMENTS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart", "0")
"""Those of `make test`."""
_FAST = ("-m", "not slow")
_ADDITIONS, _SIZE = 10**7, 1024


def run(fast: bool) -> None:
    """Run the tests, or the quick half of them, and store how many there are and how long they took.

    Raises:
        UserError: a test fails.
    """
    machine = _machine()
    with tempfile.TemporaryDirectory() as cache:
        began = time.monotonic()
        lines = []
        with subprocess.Popen(
            [sys.executable, "-m", "pytest", *ARGUMENTS, *(_FAST if fast else ())],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True,
        ) as running:  # fmt: skip
            assert running.stdout is not None
            for line in running.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        seconds = time.monotonic() - began
    if running.returncode:
        raise UserError(f"pytest ended with status {running.returncode}")
    name = "suite_fast" if fast else "suite"
    figures = {"tests": passed("".join(lines)), "seconds": seconds, "fast": fast, **machine}
    save(name, f"manyheads-bench suite{' --fast' if fast else ''}", {"suite": figures})


def passed(output: str) -> int:
    """The number of tests that passed, from pytest's last lines; with several `-q` it is that of the dots."""
    found = re.findall(r"(\d+) passed", output)
    return (
        int(found[-1])
        if found
        else sum(line.count(".") for line in output.splitlines() if re.match(r"[.sx]+( |$)", line))
    )


def _machine() -> dict[str, Any]:
    began = time.perf_counter()
    total = 0
    for number in range(_ADDITIONS):
        total += number
    additions = time.perf_counter() - began
    x = jnp.full((_SIZE, _SIZE), 1 / _SIZE)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    matmul = seconds_per_call(lambda: product(x), 10)
    return {"seconds_of_ten_million_additions": additions, "matmul_flops": 2 * _SIZE**3 / matmul}
