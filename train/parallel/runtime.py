"""The process of a run: devices, the compilation cache, and stopping without losing work."""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax

from train.files import cache_dir
from train.parallel.processes import Peers, join
from transformer.errors import UserError, first_line

_PATIENT = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 --xla_cpu_collective_call_terminate_timeout_seconds=1800"
)
"""Virtual devices share the cores: one that has to wait for 40 seconds, XLA's limit, is not lost."""
_THREADS_PER_DEVICE = 8
"""A thread waits in each collective until all devices have come to it, and a device starts all collectives whose inputs it has.
XLA's pool has one thread per device: where two collectives are ready at once, all threads can wait in one of them for a device
that has no thread left to come to it."""

_M_ARENA_MAX = -8
"""The number of the option in glibc's malloc.h."""
_ARENAS = 2


def set_up_devices(num_cpu_devices: int | None = None, platform: str | None = None, peers: Peers | None = None) -> None:
    """Choose the devices. Call it before anything runs on one.

    Args:
        num_cpu_devices: number of virtual CPU devices, to try a sharding without the hardware.
        platform: cpu, gpu, tpu; JAX's own choice by default.
        peers: the other processes of the run, if it has any.

    Raises:
        UserError: no such device is available, or the processes could not connect.
    """
    _limit_arenas()
    if num_cpu_devices is not None:
        if num_cpu_devices < 1:
            raise UserError(f"--devices: got {num_cpu_devices}; allowed: 1 or more")
        if platform not in (None, "cpu"):
            raise UserError(f"--devices makes virtual CPU devices; it cannot be combined with --platform {platform}")
        platform = "cpu"
        make_cpu_devices(num_cpu_devices)
    if platform is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
    # orbax's messages about its internals do not concern users.
    orbax = logging.getLogger("absl")
    orbax.setLevel(logging.ERROR)
    orbax.addFilter(_without_traceback)
    # Of several files of a checkpoint that a full disk refuses, one error is raised; the others would be printed at its end.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if getattr(sys.unraisablehook, "func", None) is not _without_closed_loops:
        sys.unraisablehook = functools.partial(_without_closed_loops, sys.unraisablehook)
    if peers is not None:
        join(peers)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = platform or os.environ.get("JAX_PLATFORMS", "the default platform")
        reason = f" ({first_line(error)})" if str(error) else ""
        raise UserError(
            f"no device of platform {asked!r} here{reason}; choose another with --platform "
            "(cpu, gpu, tpu), or install jax for it: jax[cuda13], jax[tpu]"
        ) from None


def make_cpu_devices(number: int) -> None:
    """Have JAX make this number of virtual CPU devices, which must not exist yet, and give them threads enough."""
    os.environ["XLA_FLAGS"] = f"{_PATIENT} {os.environ.get('XLA_FLAGS', '')}".strip()
    threads = max(_THREADS_PER_DEVICE * number, os.cpu_count() or 1)
    os.environ.setdefault("PJRT_NPROC", str(threads))
    jax.config.update("jax_num_cpu_devices", number)


def _limit_arenas() -> None:
    """Let all threads allocate from a few arenas, where the C library is glibc and the user has not set their number.

    glibc makes up to eight for each core. The threads that write checkpoints leave each of them in fragments, and the process
    grows by some percent in a few thousand steps, though it uses no more memory.
    """
    if not os.environ.keys() & {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"}:
        set_malloc_option(_M_ARENA_MAX, _ARENAS)


def set_malloc_option(option: int, value: int) -> None:
    """Set an option of glibc's malloc.h by its number; with another C library nothing."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(option, value)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Drops orbax's logged tracebacks of exceptions that it also raises: the code that catches those says what to do."""
    record.exc_info = None
    return True


def _without_closed_loops(show: Callable[[Any], object], ignored: Any) -> None:
    """Drops what the writes of a checkpoint that had failed say later, each with a traceback; the failure itself was raised."""
    if not (isinstance(ignored.exc_value, RuntimeError) and str(ignored.exc_value) == "Event loop is closed"):
        show(ignored)


class Watchdog:
    """A context manager that ends the process, with the stacks of all its threads, when nothing says that it is alive.

    Python need not be able to run any more: a thread of the interpreter in C does it.

    Args:
        seconds: after which a process counts as hanging; 0: never.
    """

    def __init__(self, seconds: float) -> None:
        # Notebooks replace the standard error by one that this interpreter cannot write to.
        self._seconds, self._file = seconds, sys.__stderr__

    def alive(self) -> None:
        """To be called at least every `seconds`."""
        if self._seconds and self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def __enter__(self) -> Watchdog:
        self.alive()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()


class GracefulStop:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self.number: int | None = None
        """The signal that asked."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # Not sys.exit, which would wait for whatever hangs.
            os._exit(128 + number)
        self.requested, self.number = True, number
