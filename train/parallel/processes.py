"""Several processes as one run: how they find each other, and what they have to agree on.

One process for each host (or each GPU) runs the same command. The transport is JAX's own: `jax.distributed`, and collectives
by NCCL, a TPU's links, or gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from transformer.errors import UserError

_FAREWELL = "farewell"
_LOST = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): ")
"""How JAX begins to tell that a collective failed, as a `JaxRuntimeError` or, from gloo, as a `ValueError`."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """Where this process finds the others. All None: what Slurm, Open MPI, Kubernetes or a TPU pod says, found by JAX."""

    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = 60
    """A process that is silent for so long is taken for dead, and the others stop."""


def join(peers: Peers) -> None:
    """Become one of the run's processes. Call it before anything runs on a device.

    Raises:
        UserError: a part is missing or out of range, no cluster was found, or the others did not come.
    """
    given = (peers.coordinator, peers.num_processes, peers.process_id)
    if any(one is not None for one in given):
        missing = [
            flag
            for flag, one in zip(("--coordinator", "--num-processes", "--process-id"), given, strict=True)
            if one is None
        ]
        if missing:
            raise UserError(f"several processes need {' and '.join(missing)} too, or --distributed to find all of it")
        assert peers.num_processes is not None and peers.process_id is not None
        if not 0 <= peers.process_id < peers.num_processes:
            raise UserError(f"--process-id: got {peers.process_id}; allowed: 0 to {peers.num_processes - 1}")
    try:
        jax.distributed.initialize(
            peers.coordinator, peers.num_processes, peers.process_id, heartbeat_timeout_seconds=peers.heartbeat_seconds
        )
    except (RuntimeError, ValueError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"the processes of the run do not come together: {said.strip()[:200]}; start all of them with the same "
            "--coordinator HOST:PORT and --num-processes, each with its own --process-id"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_log() -> Iterator[None]:
    """What is printed inside is printed by the first process alone."""
    if is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def report_lost_peers(folder: Path) -> Iterator[None]:
    """Where the other processes are lost inside, this one ends with a line that says so and how to go on.

    Either a collective fails, or JAX aborts a process whose peers are silent, wherever it is, so that no code of its own can say
    more then; often both, in either order. So it is always a small process beside it that says the line: with what the
    collective's error was, or once it is left without a farewell.

    Args:
        folder: of the run, where its checkpoints are.

    Raises:
        SystemExit: a collective failed, and it was said.
    """
    if jax.process_count() == 1:
        yield
        return
    message = (
        f"manyheads: process {jax.process_index()} of {jax.process_count()} stops, since another one died or cannot be reached "
        f"(JAX names it, as a task); the same commands go on from the last checkpoint in {folder}"
    )
    last_words = (
        "import sys; said = sys.stdin.read(); said == sys.argv[2] or print(sys.argv[1] + said, file=sys.stderr)"
    )
    command = [sys.executable, "-S", "-c", last_words, message, _FAREWELL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) as beside:
        assert beside.stdin is not None
        said = _FAREWELL
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if not _LOST.match(str(error)):
                raise
            said = f". {str(error).splitlines()[0][:200]}"
            raise SystemExit(2) from None
        finally:
            beside.stdin.write(said)


@contextlib.contextmanager
def process_zero_first(what: str) -> Iterator[None]:
    """The block is run by the first process, and then by the others, which find what it left on a disk that they share."""
    if not is_first():
        multihost_utils.sync_global_devices(f"{what}: first")
    yield
    if is_first() and jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{what}: first")


def any_process(value: bool, step: int, every: int = 10) -> bool:
    """Whether `value` holds in any process; asked only now and then where there are several, and False in between."""
    if jax.process_count() == 1:
        return value
    return step % every == 0 and bool(np.any(multihost_utils.process_allgather(np.array([value]))))


def gathered(text: str) -> list[str]:
    """The text of every process, in their order."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([len(data)]))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows: Any = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(np.asarray(rows), lengths, strict=True)]
