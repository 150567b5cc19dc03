"""Loss spikes: which losses are, and runs that skip their updates or go back to a checkpoint before them."""

from __future__ import annotations

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.stops import asked_to_stop
from train.commands.cli import main
from train.config import load
from train.examine.verify_resume import compare
from train.run.loop import train
from train.run.order import Order
from train.run.run_files import read_metrics
from train.run.skipped import read_skipped
from train.stability import StabilityConfig, moments_after, z_score
from transformer.errors import ConfigError, UserError

pytestmark = pytest.mark.usefixtures("one_device")
ROLLBACK = StabilityConfig(spike_threshold=1.0, spike_window=3, on_spike="rollback", max_rollbacks=20)


def test_moments_are_those_of_all_losses_and_then_exponential():
    losses, moments = np.random.default_rng(0).normal(4, 1, 20).astype(np.float32), jnp.zeros(2)
    mean, variance = 0.0, 0.0
    for count, loss in enumerate(losses):
        z = float(z_score(jnp.float32(loss), moments, jnp.int32(count), 8))
        assert z == (0 if count < 8 else pytest.approx((loss - mean) / math.sqrt(variance), rel=1e-4))
        moments = moments_after(jnp.float32(loss), moments, jnp.int32(count), 8)
        weight = max(1 / (count + 1), 1 / 8)
        mean, variance = mean + weight * (loss - mean), (1 - weight) * (variance + weight * (loss - mean) ** 2)
        np.testing.assert_allclose(moments, [mean, variance], rtol=1e-4)
        if count < 8:
            np.testing.assert_allclose(
                moments, [losses[: count + 1].mean(), losses[: count + 1].var()], rtol=1e-3, atol=1e-5
            )


def test_losses_that_hardly_differ_have_no_spikes():
    assert float(z_score(jnp.float32(2.0002), jnp.array([2.0, 0.0]), jnp.int32(50), 8)) < 1
    assert float(z_score(jnp.float32(0.0), jnp.zeros(2), jnp.int32(50), 8)) == 0
    assert not float(z_score(jnp.float32(jnp.nan), jnp.zeros(2), jnp.int32(50), 8)) <= 6


def test_an_order_passes_over_batches():
    order = Order()
    assert [order.batch(step) for step in (1, 2, 9)] == [0, 1, 8]
    # Step 6 took batch 5: step 5 now takes batch 6.
    order = order.rolled_back(4, 6)
    assert [order.batch(step) for step in (4, 5, 6)] == [3, 6, 7]
    again = order.rolled_back(4, 6)
    assert [again.batch(step) for step in (4, 5)] == [3, 8]
    later = order.rolled_back(8, 11)
    assert [later.batch(step) for step in (5, 8, 9)] == [6, 9, 13]
    # Before what had been passed over: from step 3 on every batch up to that of step 11 is.
    assert [later.rolled_back(2, 11).batch(step) for step in (2, 3)] == [1, later.batch(11) + 1]
    assert Order.from_data(json.loads(json.dumps(later.passed))) == later


@pytest.fixture(scope="module")
def config(config_file):
    """Its losses vary by chance, so that some are spikes by a low threshold."""
    arguments = [
        "--steps",
        "20",
        "--checkpoint.every",
        "3",
        "--evaluation.every",
        "6",
        "--optimizer.learning-rate",
        "1e-5",
    ]
    return load(config_file, arguments)


def steps_of(directory):
    return read_metrics(directory)["train/loss"]


def test_a_spike_is_skipped_and_recorded(config, tmp_path, capsys):
    run = dataclasses.replace(config, run_dir=str(tmp_path), stability=dataclasses.replace(ROLLBACK, on_spike="skip"))
    train(run)
    records = read_skipped(tmp_path)
    assert records, "the threshold is so low that there are spikes"
    metrics = read_metrics(tmp_path)
    over = [step for step, z in metrics["train/loss_z"].items() if z > 1.0]
    assert [record["step"] for record in records] == over
    assert {record["reason"] for record in records} == {"spike"} and "is a spike (z-score" in capsys.readouterr().out
    first = records[0]
    assert len(first["examples"]) == len(first["texts"]) == 8 and "value_" in first["texts"][0]
    assert first["loss"] == metrics["train/loss"][first["step"]]


def test_a_rollback_passes_over_batches_and_is_the_same_after_a_restart(config, tmp_path, capsys):
    whole, parts = (dataclasses.replace(config, run_dir=str(tmp_path / name), stability=ROLLBACK) for name in "ab")
    train(whole)
    said = capsys.readouterr().out
    assert "rolled back to the checkpoint of step" in said
    records = read_skipped(whole.directory)
    back = [record for record in records if record["rolled_back_to"] is not None]
    assert back and all(record["rolled_back_to"] < record["step"] for record in back)
    # No step that counts is a spike, but for those before the first checkpoint, and the last, whose update is skipped.
    assert all(z <= 1 for step, z in read_metrics(whole.directory)["train/loss_z"].items() if 3 < step < 20)
    assert list(steps_of(whole.directory)) == list(range(1, 21))
    # The batch that was skipped can be looked at.
    spike = back[-1]
    assert main(["replay", str(whole.directory), "--step", str(spike["step"])]) in (0, 1)
    said = capsys.readouterr().out
    assert f"loss {spike['loss']!r}" in said and f"example {spike['examples'][0]}:" in said
    for looks in (5, 6):
        with asked_to_stop(looks=looks):
            assert train(parts).interrupted
    train(parts)
    assert read_skipped(whole.directory) == read_skipped(parts.directory)
    assert compare(whole.directory, parts.directory, exact=True) == []


def test_too_many_rollbacks_end_the_run(config, tmp_path):
    limited = dataclasses.replace(ROLLBACK, spike_threshold=1e-6, max_rollbacks=2)
    with pytest.raises(UserError, match=r"the loss spikes again after 2 rollbacks to the checkpoint of step \d+"):
        train(dataclasses.replace(config, run_dir=str(tmp_path), stability=limited, steps=60))


@pytest.mark.parametrize(
    "wrong", [{"spike_threshold": 0.0}, {"spike_window": 1}, {"max_rollbacks": 0}, {"spike_threshold": math.inf}]
)
def test_wrong_settings(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        StabilityConfig(**wrong)


def test_a_record_that_a_kill_truncated_is_passed_over(tmp_path):
    (tmp_path / "skipped.jsonl").write_text('{"step": 3, "rolled_back_to": null}\n{"step": 5, "rol')
    assert [record["step"] for record in read_skipped(tmp_path)] == [3]
    assert read_skipped(tmp_path / "none") == []
