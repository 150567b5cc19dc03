"""One run on several processes: how they find each other, and what they must agree on.

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
"""Beginnings of JAX's messages about a failed collective, in a `JaxRuntimeError` or, from gloo, in a `ValueError`."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """How this process finds the others. All None: JAX finds them from Slurm, Open MPI, Kubernetes or a TPU pod."""

    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = 60
    """Seconds without a heartbeat after which a process counts as dead, and the others stop."""


def join(peers: Peers) -> None:
    """Become one of the run's processes. Call it before anything runs on a device.

    Raises:
        UserError: a setting is missing or out of range, no cluster was found, or the others did not connect.
    """
    given = (peers.coordinator, peers.num_processes, peers.process_id)
    if any(one is not None for one in given):
        missing = [
            flag
            for flag, one in zip(("--coordinator", "--num-processes", "--process-id"), given, strict=True)
            if one is None
        ]
        if missing:
            raise UserError(
                f"several processes also need {' and '.join(missing)}, or --distributed to find all of them"
            )
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
            f"the processes of the run could not connect: {said.strip()[:200]}; start all of them with the same "
            "--coordinator HOST:PORT and --num-processes, each with its own --process-id"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_log() -> Iterator[None]:
    """Only the first process prints what is printed inside."""
    if is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def report_lost_peers(folder: Path) -> Iterator[None]:
    """If other processes are lost inside, this one ends with a line that says so and how to resume.

    Either a collective fails, or JAX aborts a process whose peers are silent, at any point, so that its own code cannot print
    anything; often both, in either order. So a small helper process always prints the line: with the collective's error, or
    when this process ends without a farewell.

    Args:
        folder: of the run, where its checkpoints are.

    Raises:
        SystemExit: a collective failed; the line was printed.
    """
    if jax.process_count() == 1:
        yield
        return
    message = (
        f"manyheads: process {jax.process_index()} of {jax.process_count()} stops because another one died or is unreachable "
        f"(JAX names it as a task); rerun the same commands to resume from the last checkpoint in {folder}"
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
    """The first process runs the block, then the others, which find its files on the shared disk."""
    if not is_first():
        multihost_utils.sync_global_devices(f"{what}: first")
    yield
    if is_first() and jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{what}: first")


def any_process(value: bool, step: int, every: int = 10) -> bool:
    """Whether `value` holds in any process; with several processes it is checked only occasionally, and False in between."""
    if jax.process_count() == 1:
        return value
    return step % every == 0 and bool(np.any(multihost_utils.process_allgather(np.array([value]))))


def gathered(text: str) -> list[str]:
    """The texts of all processes, in order."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([len(data)]))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows: Any = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(np.asarray(rows), lengths, strict=True)]
