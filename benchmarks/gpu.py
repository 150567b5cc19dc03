"""`make bench-gpu`: every measurement that needs an accelerator, in one run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import jax

from benchmarks import compile_time, decode, step
from benchmarks.attention import certify, length, speed
from benchmarks.encoders import step as encoder_step
from benchmarks.sharding import validate
from transformer.errors import UserError

MEASUREMENTS: dict[str, Callable[[], object]] = {
    "step": lambda: step.run(rounds=5, steps=10),
    "fine-tuning step": lambda: encoder_step.run(rounds=5, steps=10),
    "decode": lambda: decode.run(rounds=3),
    "compile": lambda: compile_time.run(rounds=1),
    "prediction": lambda: validate.run(rounds=10),
    "attention, speed": lambda: speed.run(rounds=3),
    "attention, length": lambda: length.run(budget=0.5),
    "attention, certificate": certify.run,
}


def run() -> None:
    """Run all measurements in sequence; a failure does not stop the rest.

    Raises:
        UserError: there is no accelerator, or a measurement failed.
    """
    if jax.default_backend() == "cpu":
        raise UserError("no accelerator found: jax sees only the CPU; install jax for it, such as jax[cuda13]")
    failed = []
    for name, measure in MEASUREMENTS.items():
        start = time.monotonic()
        print(f"── {name} ──", flush=True)
        try:
            measure()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; the others are written")
