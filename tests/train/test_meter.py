"""Speeds come from the steps alone, and skipped updates are counted in a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.report import meter as module
from train.report.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = {"seconds": 0.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: now["seconds"])
    return now


def take(meter, step, skipped=0.0, keep=1):
    metrics = {"loss": 1.0, "nll": 1.0, "grad_norm": 1.0, "tokens": 100.0, "skipped": skipped, "updates": step // 2}
    meter.push(step, {name: jnp.float32(value) for name, value in metrics.items()}, np.arange(2))
    return list(meter.ready(keep))


def test_speed_is_tokens_over_a_steps_time_and_pauses_do_not_count(clock):
    meter = Meter(lambda step: 0.5, 3.0, jax.devices()[:1], "float32")
    assert take(meter, 1) == []
    seen = []
    for step in range(2, 6):
        clock["seconds"] += 2.0
        seen += take(meter, step)
    assert [reading.step for reading in seen] == [1, 2, 3, 4]
    assert seen[0].values["tokens_per_second"] is None
    assert [reading.values["tokens_per_second"] for reading in seen[1:]] == pytest.approx([50.0] * 3)
    assert seen[1].values["mfu"] is None
    # What waits is read at once before a pause, and a long pause follows.
    assert next(iter(meter.ready(0))).values["tokens_per_second"] == pytest.approx(50.0)
    meter.pause()
    clock["seconds"] += 1000.0
    take(meter, 6)
    clock["seconds"] += 2.0
    take(meter, 7)
    clock["seconds"] += 2.0
    assert take(meter, 8)[0].values["tokens_per_second"] == pytest.approx(50.0)


def test_skipped_updates_are_counted_in_a_row(clock):
    meter = Meter(lambda step: 0.5, 3.0, jax.devices()[:1], "float32")
    counts = [take(meter, step, skipped, keep=0)[0].skipped_in_row for step, skipped in enumerate([0, 1, 1, 0, 1], 1)]
    assert counts == [0, 1, 2, 0, 1]
