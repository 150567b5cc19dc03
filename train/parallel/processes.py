"""One run on several processes: how they find each other, and what they must agree on.

One process for each host (or each GPU) runs the same command. The transport is JAX's own: `jax.distributed`, and collectives
by NCCL, a TPU's links, or gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from transformer.errors import UserError, first_line

LOST = 75
"""Status of a process whose peers are lost: the same command may succeed (EX_TEMPFAIL in sysexits.h)."""
_FAREWELL = "farewell"
_ERROR = "manyheads/error"
"""Key of the error that ends all processes, and prefix of those by which each says that it has it."""
_PATIENCE_MS = 10_000
_POLL_SECONDS = 0.5
_MEETINGS = itertools.count()
"""Names of meetings, each of which is held once; all processes count alike."""
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
        raise UserError(
            f"the processes of the run could not connect: {first_line(error)}; start all of them with the same "
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

    A `UserError` inside ends all processes, each with its line, within seconds.

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
    program = "import sys; message = sys.stdin.read(); message == sys.argv[2] or print(sys.argv[1] + message, file=sys.stderr)"
    command = [sys.executable, "-S", "-c", program, message, _FAREWELL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) as watcher:
        assert watcher.stdin is not None
        report = _FAREWELL
        errors = _SharedErrors(before_exit=lambda: _tell(watcher, _FAREWELL))
        try:
            yield
        except UserError as error:
            errors.end_all(error)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if not _LOST.match(str(error)):
                raise
            report = f". {first_line(error)}"
            raise SystemExit(LOST) from None
        finally:
            errors.stop()
            _tell(watcher, report)


def _tell(watcher: subprocess.Popen[str], report: str) -> None:
    assert watcher.stdin is not None
    with contextlib.suppress(OSError, ValueError):
        watcher.stdin.write(report)
        watcher.stdin.close()


class _SharedErrors:
    """Ends all processes of a run with the error that a user made in one of them.

    The others may wait in a collective for the one that stops, so that a thread of each listens for its message, by the service
    through which the processes found each other.
    """

    def __init__(self, before_exit: Callable[[], None]) -> None:
        self._client = _service()
        self._before_exit = before_exit
        self._ending, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        self._stopped.set()
        self._thread.join()

    def end_all(self, error: UserError) -> NoReturn:
        """Show the error, pass it on, and exit with status 2 when all have it, or after some seconds."""
        self._ending.acquire()
        print(f"manyheads: {error}", file=sys.stderr, flush=True)
        # Another one may have passed its own error on, or the service has ended with its process.
        with contextlib.suppress(Exception):
            self._client.key_value_set(_ERROR, f"{jax.process_index()}: {error}")
        self._exit()

    def _listen(self) -> None:
        text = None
        while text is None:
            # Not a call that blocks: Python must not end while a thread is in one.
            if self._stopped.wait(_POLL_SECONDS):
                return
            try:
                text = _value(_ERROR)
            except Exception:
                return  # the service has ended, which other code reports
        if not self._ending.acquire(blocking=False):
            return  # this process has shown an error of its own
        sender, _, message = text.partition(": ")
        print(f"manyheads: process {sender}: {message}", file=sys.stderr, flush=True)
        self._exit()

    def _exit(self) -> NoReturn:
        """Leave when all have the error: a collective with one that left before would fail in those that do not know why."""
        self._before_exit()
        sys.stdout.flush()
        self._say("has it")
        self._wait_for("has it")
        # Process 0 has the service, without which JAX aborts the others; so it leaves last.
        if is_first():
            self._wait_for("leaves")
            time.sleep(_POLL_SECONDS)
        else:
            self._say("leaves")
        # Leaving in the usual way would wait for the others.
        os._exit(2)

    def _say(self, what: str) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_ERROR}/{jax.process_index()}/{what}", "")

    def _wait_for(self, what: str) -> None:
        with contextlib.suppress(Exception):
            for other in set(range(jax.process_count())) - {jax.process_index()}:
                self._client.blocking_key_value_get(f"{_ERROR}/{other}/{what}", _PATIENCE_MS)


@contextlib.contextmanager
def process_zero_first() -> Iterator[None]:
    """The first process runs the block, however long it takes, then the others, which find its files on the shared disk.

    They wait by the service through which they found each other: unlike a collective it takes no device, and no limit of a
    transport ends it.
    """
    if jax.process_count() == 1:
        yield
        return
    key = f"manyheads/done/{next(_MEETINGS)}"
    if is_first():
        yield
        _service().key_value_set(key, "")
    else:
        _awaited(key)
        yield


def _awaited(key: str) -> str:
    """The value of a key, once a process has set it. Asked again and again, so that a signal is answered in between."""
    while (text := _value(key)) is None:
        time.sleep(_POLL_SECONDS / 5)
    return text


def _value(key: str) -> str | None:
    """The value of a key; None while no process has set it."""
    try:
        return str(_service().key_value_try_get(key))
    except Exception as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


def _service() -> Any:
    """Through which the processes found each other."""
    return distributed.global_state.client


def any_process(value: bool, step: int, every: int = 10) -> bool:
    """Whether `value` holds in any process; with several processes it is checked only occasionally, and False in between."""
    if jax.process_count() == 1:
        return value
    return step % every == 0 and bool(np.any(multihost_utils.process_allgather(np.array([value]))))


def gathered(text: str) -> list[str]:
    """The texts of all processes, in order."""
    folder = f"manyheads/text/{next(_MEETINGS)}"
    _service().key_value_set(f"{folder}/{jax.process_index()}", text)
    return [_awaited(f"{folder}/{index}") for index in range(jax.process_count())]
