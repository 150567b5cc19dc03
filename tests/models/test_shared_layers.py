"""Layers that share their parameters: as often as they are applied, they are the layers of a deeper model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.config import RunConfig
from train.objectives import Masked
from train.optimizer import OptimizerConfig
from train.parallel.mesh import MeshConfig
from transformer.errors import ConfigError
from transformer.huggingface import checkpoint
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.families import count_parameters, make_model

SHARED = BertConfig(
    vocab_size=40, max_length=12, num_layers=4, embed_dim=16, attention=SoftmaxConfig(num_heads=2), dropout=0.0,
    attention_dropout=0.0, init_std=0.3, distinct_layers=2,
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 9)), jnp.int32)


def loss_and_gradient(config, params):
    graphdef = nnx.split(make_model(config, nnx.Rngs(0)))[0]

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params)(TOKENS).logits).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


def flat(state):
    return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


@pytest.mark.parametrize("scan", [True, False])
def test_shared_layers_are_those_of_a_deeper_model_with_equal_ones(scan):
    shared = dataclasses.replace(SHARED, scan_layers=scan)
    whole = dataclasses.replace(SHARED, distinct_layers=None)
    params = nnx.state(make_model(shared, nnx.Rngs(0)), nnx.Param)
    deep = nnx.from_flat_state(
        {
            path: leaf.replace(jnp.repeat(leaf.get_value(), 2, 0)) if path[:2] == ("layers", "blocks") else leaf
            for path, leaf in nnx.to_flat_state(params)
        }
    )
    assert count_parameters(whole) / count_parameters(shared) > 1
    (one, gradient), (other, expected) = loss_and_gradient(shared, params), loss_and_gradient(whole, deep)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    expected = flat(expected)
    for path, found in flat(gradient).items():
        wanted = expected[path]
        if path[:2] == ("layers", "blocks"):
            wanted = wanted.reshape(2, 2, *wanted.shape[1:]).sum(1)
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-4)
    # Of single layers too.
    model = make_model(shared, nnx.Rngs(0))
    every, some = model(TOKENS, return_weights=True).weights, model(TOKENS, return_weights=((1, 3), (0, 1))).weights
    np.testing.assert_allclose(every[jnp.array([1, 3])], some, atol=1e-5)


def test_what_shared_layers_do_not_go_with_is_refused():
    with pytest.raises(ConfigError, match="distinct_layers: got 3; allowed: a divisor of num_layers \\(4\\), or null"):
        dataclasses.replace(SHARED, distinct_layers=3)
    for settings, message in (
        ({"optimizer": OptimizerConfig(layer_decay=0.9)}, "layer_decay: got 0.9; its layers share parameters"),
        (
            {"mesh": MeshConfig(strategy="pipeline", pipeline=2)},
            "strategy: got 'pipeline'; its layers share parameters",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            RunConfig(name="x", model=SHARED, objective=Masked(), length=12, **settings)


def test_albert_has_a_layer_between_embeddings_and_blocks():
    fields = {"model_type": "albert", "hidden_size": 32, "embedding_size": 32, "num_attention_heads": 2}
    with pytest.raises(Exception, match="embedding_size: got 32, which is hidden_size; supported: another number"):
        checkpoint.ARCHITECTURES["albert"].config(fields, "AlbertModel", "albert")
