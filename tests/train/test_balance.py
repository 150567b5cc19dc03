"""Experts are balanced over the whole batch, whatever its parts: microbatches, devices of `pmap`, stages of a pipeline."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests.devices import placed
from train.config import RunConfig
from train.loss import LossConfig
from train.objectives import Causal, Masked
from train.optimizer import OptimizerConfig
from train.parallel.mesh import MeshConfig, make_mesh, shard_batch, use_mesh
from train.program.program import Program
from train.program.step import accumulated, make_first_pass, make_gradient, step_keys
from transformer.functional import graphdef_of
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.gpt import GPTConfig

B, T, V = 16, 8, 32
SHAPE = {
    "vocab_size": V, "max_length": T, "num_layers": 2, "embed_dim": 16, "attention": SoftmaxConfig(num_heads=2), "dropout": 0.1,
    "attention_dropout": 0.1,
}  # fmt: skip
EXPERTS = ExpertsConfig(
    num_experts=4, experts_per_token=2, dim=16, capacity_factor=1.25, balance_loss=1.0, router_z_loss=0.1
)
GPT = GPTConfig(**SHAPE, mlp=EXPERTS)
MODELS = {
    "scan": GPT,
    "loop": dataclasses.replace(GPT, scan_layers=False),
    "pattern": dataclasses.replace(
        GPT, num_layers=4, pattern=(SoftmaxConfig(num_heads=2, num_kv_heads=1), SoftmaxConfig(num_heads=2))
    ),
    "bert": BertConfig(**SHAPE, mlp=EXPERTS),
}  # fmt: skip
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, T + 1)).astype(np.int32)
# Rows of very different numbers of tokens, most of them short in some parts of the batch: means of means would show.
LENGTHS = np.where(np.arange(B) % 4 < 2, RNG.integers(1, 4, B), T)
INSIDE = np.arange(T) < LENGTHS[:, None]
BATCH = {
    "tokens": TOKENS[:, :-1],
    "targets": TOKENS[:, 1:],
    # The number of predictions is not in proportion to that of tokens.
    "weights": (INSIDE & (RNG.random((B, T)) < np.linspace(0.2, 1, B)[:, None])).astype(np.float32),
    "segments": INSIDE.astype(np.int32),
    "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    "predicted": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
}


def functions_of(model, microbatches=1):
    """Of an objective's loss: the gradient, and the first pass."""
    given = (
        graphdef_of(functools.partial(make_model, model)),
        LossConfig(),
        Masked() if model.family == "bert" else Causal(),
    )
    return make_gradient(*given), make_first_pass(*given, microbatches=microbatches)


@functools.cache
def params_of(model):
    return jax.jit(lambda: nnx.state(make_model(model, nnx.Rngs(0)), nnx.Param))()


def loss_and_gradient(model, microbatches, first_pass=None):
    """On one device, with dropout."""
    gradient, own = functions_of(model, microbatches)
    compute = jax.jit(accumulated(gradient, first_pass or own, microbatches))
    grads, sums = compute(params_of(model), BATCH, step_keys(jax.random.key(1), 0, BATCH))
    return jax.device_get((sums.total(), grads))


def differences(got, expected):
    """Of losses, relative; and of gradients, relative to the largest number of all, and of the routers'."""
    (loss, grads), (expected_loss, expected_grads) = got, expected

    def apart(grads, expected_grads):
        leaves, expected = jax.tree.leaves(grads), jax.tree.leaves(expected_grads)
        largest = max(np.abs(leaf).max() for leaf in expected)
        return max(float(np.abs(a - b).max() / largest) for a, b in zip(leaves, expected, strict=True))

    return abs(loss / expected_loss - 1), apart(grads, expected_grads), apart(routers(grads), routers(expected_grads))


def routers(params):
    """The parameters of the routers alone."""
    return [leaf for path, leaf in nnx.to_flat_state(params) if "router" in path]


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_microbatches_changes_nothing(name):
    model = MODELS[name]
    expected = loss_and_gradient(model, 1)
    for microbatches in (2, 4) if name == "scan" else (4,):
        assert max(differences(loss_and_gradient(model, microbatches), expected)) < 1e-5
    if name == "scan":
        # Balanced within each part, they would differ visibly.
        assert min(differences(loss_and_gradient(model, 4, lambda *_: None), expected)[1:]) > 1e-2


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["balance", "z"])
def test_either_loss_alone(weights):
    model = dataclasses.replace(
        GPT, mlp=dataclasses.replace(EXPERTS, balance_loss=weights[0], router_z_loss=weights[1])
    )
    assert max(differences(loss_and_gradient(model, 4), loss_and_gradient(model, 1))) < 1e-5


@pytest.mark.parametrize(
    "model",
    [
        GPTConfig(**SHAPE),
        dataclasses.replace(GPT, mlp=dataclasses.replace(EXPERTS, balance_loss=0.0, router_z_loss=0.0)),
    ],
    ids=["dense", "no losses"],
)
def test_nothing_is_computed_twice_where_nothing_is_balanced(model):
    gradient, first_pass = functions_of(model, 4)
    given = params_of(model), BATCH, step_keys(jax.random.key(1), 0, BATCH)
    with_pass, without = (
        str(jax.make_jaxpr(accumulated(gradient, one, 4))(*given)) for one in (first_pass, lambda *_: None)
    )
    assert with_pass == without


@functools.cache
def program_of(model, mesh_config, num_devices, microbatches=1):
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    config = RunConfig(
        name="test", model=model, batch_size=B, steps=10, microbatches=microbatches, mesh=mesh_config,
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )  # fmt: skip
    with use_mesh(mesh, mesh_config.rules):
        return Program(config, mesh)


@functools.cache
def initial(model):
    """A fresh state on one device."""
    program = program_of(model, MeshConfig(), 1)
    with use_mesh(program.mesh, MeshConfig().rules):
        return jax.device_get(program.init())


@functools.cache
def step_of(model, mesh_config, num_devices, microbatches=1):
    """Loss of a first step, and its first moments: its gradient by a factor."""
    program = program_of(model, mesh_config, num_devices, microbatches)
    with use_mesh(program.mesh, mesh_config.rules):
        state = placed(initial(model), program.abstract)
        state, metrics = program.train_step(state, shard_batch(BATCH, program.batch_sharding))
        return jax.device_get((metrics["loss"], state.opt_state[1][0].mu))


LAYOUTS = [
    (MeshConfig(strategy="dp"), 8, 2),
    (MeshConfig(strategy="pmap"), 8, 1),
    (MeshConfig(strategy="pmap"), 8, 2),
    (MeshConfig(strategy="pipeline", pipeline=2, pipeline_microbatches=4), 2, 1),
    (MeshConfig(strategy="pipeline", pipeline=2), 2, 2),
    (MeshConfig(strategy="pipeline", pipeline=2, schedule="1f1b", pipeline_microbatches=4), 2, 1),
    (MeshConfig(strategy="pipeline", pipeline=2, schedule="1f1b"), 2, 2),
]


@pytest.mark.parametrize(
    ("config", "num_devices", "microbatches"), LAYOUTS, ids=lambda it: getattr(it, "strategy", str(it))
)
def test_every_layout_balances_as_one_device_does(config, num_devices, microbatches):
    # Once for each schedule, every stage of the pipeline has a group of layers.
    model = MODELS["pattern"] if config.strategy == "pipeline" and microbatches == 1 else GPT
    got, expected = step_of(model, config, num_devices, microbatches), step_of(model, MeshConfig(), 1)
    assert max(differences(got, expected)) < 1e-5
