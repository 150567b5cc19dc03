"""The loss against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config.changes import rule_of
from train.config.load import load
from train.loss import LossConfig, cross_entropy
from transformer.errors import ConfigError
from transformer.resume import OnResume

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(3 * RNG.normal(size=(2, 5, 7)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, 7, (2, 5)), jnp.int32)
WEIGHTS = jnp.asarray(RNG.integers(0, 2, (2, 5)), jnp.float32)


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.2), (1e-2, 0.2)])
def test_values_and_gradient(z_loss, smoothing):
    config = LossConfig(z_loss=z_loss, label_smoothing=smoothing)

    def by_definition(logits):
        log_p = jax.nn.log_softmax(logits)
        labels = (1 - smoothing) * jax.nn.one_hot(TARGETS, 7) + smoothing / 7
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return jnp.sum(WEIGHTS * (-jnp.sum(labels * log_p, -1) + z_loss * log_z**2))

    def ours(logits):
        return cross_entropy(logits, TARGETS, WEIGHTS, config).loss

    expected, got = jax.value_and_grad(by_definition)(LOGITS), jax.value_and_grad(ours)(LOGITS)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


def test_nll_leaves_the_additions_out():
    plain = cross_entropy(LOGITS, TARGETS, WEIGHTS, LossConfig())
    added = cross_entropy(LOGITS, TARGETS, WEIGHTS, LossConfig(z_loss=0.1, label_smoothing=0.1))
    assert plain.loss == plain.nll == added.nll
    assert added.loss != added.nll
    assert plain.weight == WEIGHTS.sum()


def test_the_size_of_chunks_is_auto_a_number_or_none_and_may_change(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("name: run\nloss: {chunk: 512}\n")
    assert load(file).loss.chunk == 512
    for text, value in (("auto", "auto"), ("null", None), ("2048", 2048)):
        assert load(file, ["--loss.chunk", text]).loss.chunk == value
    for wrong in (0, -1, "whole", 1.5, True):
        with pytest.raises(ConfigError, match="^chunk: got .*; allowed: "):
            LossConfig(chunk=wrong)
    assert rule_of(LossConfig, "chunk") is OnResume.FREE and rule_of(LossConfig, "z_loss") is OnResume.ASK
