"""Schedules have the shapes of their names, and each optimiser touches what it should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.optimizer import OptimizerConfig, decay_mask, make_optimizer, make_schedule
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig

PARAMS = nnx.state(
    GPT(
        GPTConfig(vocab_size=16, max_length=8, num_layers=2, embed_dim=16, attention=SoftmaxConfig(num_heads=2)),
        rngs=nnx.Rngs(0),
    ),
    nnx.Param,
)


def rates(num_steps=100, **options):
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, **options), num_steps)
    return np.array([float(schedule(step)) for step in range(num_steps)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
def test_every_schedule_warms_up_and_never_passes_the_peak(name):
    curve = rates(schedule=name)
    np.testing.assert_allclose(curve[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert curve.max() == pytest.approx(1.0)
    assert (np.diff(curve[10:]) <= 1e-7).all()


@pytest.mark.parametrize(("name", "last"), [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("constant", 1.0)])
def test_where_a_schedule_ends(name, last):
    assert rates(schedule=name)[-1] == pytest.approx(last, abs=0.06)


def test_wsd_is_flat_until_it_decays():
    curve = rates(schedule="wsd", decay_fraction=0.25)
    assert (curve[10:75] == 1).all()
    assert curve[80] < 1


def test_inverse_sqrt_is_the_papers():
    curve = rates(schedule="inverse_sqrt")
    np.testing.assert_allclose(curve[10:], np.sqrt(10 / np.arange(10, 100)), rtol=1e-5)


def test_gains_and_biases_do_not_decay():
    mask = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(decay_mask(PARAMS))}
    assert {leaf for path, leaf in mask.items() if "scale" in path or "bias" in path} == {False}
    assert {leaf for path, leaf in mask.items() if "kernel" in path or "table" in path} == {True}


def step(**options):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, schedule="constant", **options), 10)
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_every_optimiser_moves_every_parameter(name):
    moved = jax.tree.map(lambda update: float(jnp.abs(update).max()), step(name=name))
    assert all(0 < size < 10 for size in jax.tree.leaves(moved))


def test_muon_orthogonalises_whole_matrices_of_each_layer():
    updates = step(name="muon", weight_decay=0.0, clip_norm=None)
    kernel = updates["layers"]["blocks"]["attention"]["query"]["kernel"][...]  # [L, D, N, H]
    for layer in kernel.reshape(2, 16, 16):
        values = jnp.linalg.svd(layer, compute_uv=False)
        assert float(values.max() / values.mean()) < 1.6


def test_clipping_bounds_the_gradient():
    small = step(name="sgd", b1=0.0, weight_decay=0.0, clip_norm=1e-3)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(small)))
    assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-4)
