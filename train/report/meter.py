"""Transfers a step's metrics to the host, and measures the speed of a run.

Metrics are read one step late, so that the devices never wait for the host.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import optax

from train.parallel.hardware import peak_memory, utilization


@dataclasses.dataclass(frozen=True)
class Reading:
    """Metrics of a step, on the host."""

    step: int
    values: dict[str, float | None]
    skipped_in_row: int
    examples: np.ndarray

    @property
    def is_spike(self) -> bool:
        """Whether the update was skipped though its loss and gradient are finite."""
        return self.skipped_in_row > 0 and all(
            math.isfinite(self.values[name] or 0.0) for name in ("loss", "grad_norm")
        )


class Meter:
    """Holds metrics until they can be read without stalling the devices, and times the steps.

    Args:
        schedule: step → learning rate.
        flops_per_prediction: FLOPs of a training step for each token or row that it predicts.
        devices: the devices that share the work.
        dtype: their compute type.
    """

    def __init__(
        self, schedule: optax.Schedule, flops_per_prediction: float, devices: list[jax.Device], dtype: str
    ) -> None:
        self._schedule, self._flops_per_prediction = schedule, flops_per_prediction
        self._devices, self._dtype = devices, dtype
        self._pending: collections.deque[tuple[int, Mapping[str, jax.Array], np.ndarray]] = collections.deque()
        self._in_row = 0
        self._clock: float | None = None
        self._seconds_per_token: float | None = None
        self._waited, self._waits = 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what gets the next batch: its time counts as waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began
        self._waits += 1

    def resources(self, tokens: float) -> dict[str, float | None]:
        """What a step of this number of predictions takes: its seconds; those of waiting for data, the mean since the last call;
        and the most memory of a device so far, in bytes."""
        found = {
            "step_seconds": None if self._seconds_per_token is None else self._seconds_per_token * tokens,
            "data_wait_seconds": self._waited / self._waits if self._waits else None,
            "peak_memory_bytes": peak_memory(self._devices),
        }
        self._waited, self._waits = 0.0, 0
        return found

    def push(self, step: int, metrics: Mapping[str, jax.Array], examples: np.ndarray) -> None:
        """Take the metrics of a step that was just dispatched to the devices."""
        self._pending.append((step, metrics, examples))

    @property
    def skipped_in_row(self) -> int:
        """How many of the newest updates that were read were skipped."""
        return self._in_row

    def forget(self) -> None:
        """Drop what waits to be read: its steps will be taken in another way."""
        self._pending.clear()
        self._in_row = 0
        self.pause()

    def pause(self) -> None:
        """Exclude the time until the next step from the speed."""
        self._clock = None

    def ready(self, keep: int) -> Iterator[Reading]:
        """Readings of all but the last `keep` steps."""
        while len(self._pending) > keep:
            step, metrics, examples = self._pending.popleft()
            values: dict[str, float | None] = {k: float(v) for k, v in jax.device_get(metrics).items()}
            self._in_row = self._in_row + 1 if values.pop("skipped") else 0
            # A skipped update leaves the schedule where it is.
            values["learning_rate"] = float(self._schedule(int(values.pop("updates") or 0)))
            # Read while the next step runs, successive metrics arrive one step time apart. The last ones before a
            # pause are read at once, so their times mean nothing.
            if keep:
                self._time(values["tokens"] or 0.0)
            values |= self._speeds()
            yield Reading(step, values, self._in_row, examples)

    def _time(self, tokens: float) -> None:
        now = time.monotonic()
        if self._clock is not None and tokens:
            latest = (now - self._clock) / tokens
            # Smoothed over about ten steps; times, not speeds, so that an early reading has little effect.
            known = self._seconds_per_token
            self._seconds_per_token = latest if known is None else 0.9 * known + 0.1 * latest
        self._clock = now

    def _speeds(self) -> dict[str, float | None]:
        if not self._seconds_per_token:
            return {"tokens_per_second": None, "mfu": None}
        speed = 1 / self._seconds_per_token
        mfu = utilization(speed * self._flops_per_prediction, self._devices, self._dtype)
        return {"tokens_per_second": speed, "mfu": mfu}
