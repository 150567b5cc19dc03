"""`make bench-gpu`: every measurement that needs an accelerator, the most important first, each with a time limit of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from transformer.errors import UserError

SECONDS = 480
"""Of all measurements together."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A command of `manyheads-bench`, in a process of its own, which writes its result when it has it."""

    arguments: tuple[str, ...]
    seconds: int
    """The most that it may take."""

    @property
    def name(self) -> str:
        return " ".join(self.arguments)


def _measurement(command: str, seconds: int) -> Measurement:
    return Measurement(tuple(command.split()), seconds)


MEASUREMENTS = (
    _measurement("step --rounds 3 --steps 10", 100),
    _measurement("step --case packed --rounds 3 --steps 10", 45),
    _measurement("step --case large --rounds 3 --steps 5", 60),
    _measurement("finetuning-step --case padded --compiled-peer --rounds 3 --steps 10", 75),
    _measurement("finetuning-step --compiled-peer --rounds 3 --steps 10", 60),
    _measurement("decode --rounds 3", 60),
    _measurement("attention --speed --rounds 3", 60),
    _measurement("plan --validate", 300),
    _measurement("attention --certify", 90),
    _measurement("experts --rounds 3", 45),
    _measurement("compile --rounds 1", 90),
)


def run() -> None:
    """Run all measurements in sequence; a failure does not stop the rest.

    Raises:
        UserError: there is no accelerator, or a measurement failed or took too long.
    """
    # In a process of its own: a device's memory is not held while others need it.
    found = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True
    )
    if found.returncode:
        raise UserError(f"jax does not start: {found.stderr.strip().splitlines()[-1]}")
    if found.stdout.strip() == "cpu":
        raise UserError("no accelerator found: jax sees only the CPU; install jax for it, such as jax[cuda13]")
    run_all(MEASUREMENTS, SECONDS)


def run_all(measurements: Sequence[Measurement], seconds: float) -> None:
    """Run them one after the other; those for which no time is left do not run.

    Raises:
        UserError: at least one did not succeed.
    """
    end, failed = time.monotonic() + seconds, []
    # JAX takes most of a GPU's memory at once by default, and torch needs some next to it.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    for one in measurements:
        limit = min(one.seconds, end - time.monotonic())
        if limit < 1:
            failed.append(f"{one.name}: no time was left")
            continue
        print(f"── {one.name} ──", flush=True)
        began = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cli", *one.arguments], env=environment, start_new_session=True
        ) as process:
            try:
                status = process.wait(limit)
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
                # Its compiling processes too.
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed.append(f"{one.name}: not finished in {limit:.0f} s")
                continue
        if status:
            failed.append(f"{one.name}: status {status}")
        print(f"{one.name}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise UserError(f"{'; '.join(failed)}. The other results are written")
