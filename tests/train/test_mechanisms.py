"""Every mechanism trains from plain data of a config: sequence mixers, alignments of a translator, heads that attend."""

from __future__ import annotations

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.devices import placed
from train.config import parse
from train.parallel.mesh import MeshConfig, batch_sharding, make_mesh, shard_batch, use_mesh
from train.program.program import batch_shapes
from train.program.state import abstract_params
from transformer.alignment.registry import ALIGNMENTS
from transformer.functional import graphdef_of
from transformer.mixers.registry import MIXERS
from transformer.models.families import make_model

V, T, B = 24, 12, 8
SMALL = {"vocab_size": V, "max_length": 16, "embed_dim": 32}
STACK = SMALL | {"num_layers": 2, "dropout": 0.0, "attention_dropout": 0.0}
MIXER_KINDS = [kind for config in MIXERS for kind in typing.get_args(typing.get_type_hints(config)["kind"])]
ALIGNMENT_KINDS = [kind for config in ALIGNMENTS for kind in typing.get_args(typing.get_type_hints(config)["kind"])]


def encoder(**head):
    data = {"model": STACK | {"family": "bert", "attention": {"num_heads": 4}, "norm_first": True, "head": head}}
    source = {"kind": "files", "path": "texts.csv", "label_field": "label"}
    return data | {"objective": {"kind": "classification"}, "data": {"sources": [source], "packing": "documents"}}


def translator(**attention):
    sizes = {"family": "recurrent", "source_vocab_size": V, "hidden_dim": 32, "encoder_dim": 16, "attention": attention}
    data = {"sources": [{"kind": "synthetic", "limit": 64}], "packing": "pad"}
    return {"model": SMALL | sizes, "objective": {"kind": "seq2seq"}, "data": data}


CONFIGS = {
    **{
        kind: {"model": STACK | {"attention": {"kind": kind} | ({} if kind == "lstmn" else {"num_heads": 4})}}
        for kind in MIXER_KINDS
    },
    "hybrid": {
        "model": STACK | {"attention": {"num_heads": 4}, "pattern": [{"kind": "gated_delta", "num_heads": 4}, {}]},
    },
    **{f"translator, {kind}": translator(kind=kind) for kind in ALIGNMENT_KINDS},
    "translator, sparsemax": translator(kind="additive", normalizer="sparsemax"),
    "translator, entmax15": translator(kind="general", normalizer="entmax15"),
    "structured": encoder(kind="structured", num_labels=3, hops=3),
    "decomposable": encoder(kind="decomposable", num_labels=3),
    "decomposable, intra": encoder(kind="decomposable", num_labels=3, intra=True),
}  # fmt: skip
# The loss at which a batch counts as learned, where it is not 0.2: what keeps the hops of a structured head apart stays.
LEARNED = {"structured": 0.5}
STACKS = [name for name in CONFIGS if not name.startswith("translator")]
EVERY = pytest.mark.parametrize("name", CONFIGS)
# Alignments that have parameters of their own, and those that read a state, keep weights on the whole source, or choose.
ON_A_MESH = [*STACKS, *(f"translator, {kind}" for kind in ("additive", "local_p", "delta", "hard"))]


@functools.cache
def config_of(name, **changes):
    data = CONFIGS[name] | {"name": "x", "length": T, "batch_size": B}
    return parse(data | {"model": data["model"] | changes}, "test.yaml")


def batch_of(name, shapes=None):
    """Random rows of the shapes that a run has, with padding behind half of them; of a pair, where it is one."""
    rng, batch = np.random.default_rng(0), {}
    valid = np.arange(T) < np.where(np.arange(B) % 2, T, T - 4)[:, None]
    for field, shape in batch_shapes(config_of(name)).items():
        rows, *_ = shape.shape
        if field.endswith("lengths"):
            batch[field] = valid.sum(1, keepdims=True).astype(np.int32)
        elif field == "labels":
            batch[field] = rng.integers(0, 3, rows).astype(np.int32)
        elif field == "weights":
            batch[field] = np.ones(shape.shape, np.float32) * (1 if shape.shape[1:] != (T,) else valid)
        elif field.endswith("segments"):
            batch[field] = valid.astype(np.int32)
        elif field.endswith("positions"):
            batch[field] = np.where(valid, np.arange(T), 0).astype(np.int32)
        elif field == "token_types":
            batch[field] = np.broadcast_to(np.arange(T) >= T // 2, (B, T)).astype(np.int32)
        else:
            batch[field] = np.where(valid, rng.integers(1, V, (B, T)), 0).astype(np.int32)
    if name.startswith("decomposable"):
        batch["token_types"] = np.broadcast_to(np.arange(T) >= T // 2, (B, T)).astype(np.int32)
    return batch


def maker(name, **changes):
    return functools.partial(make_model, config_of(name, **changes).model)


@functools.cache
def params_of(name):
    make = maker(name)
    return jax.jit(lambda: nnx.state(make(nnx.Rngs(0)), nnx.Param))()


def loss_of(name, **changes):
    """The mean loss of a batch."""
    config, graphdef = config_of(name, **changes), graphdef_of(maker(name, **changes))

    def mean(params, batch):
        sums = config.objective.loss(nnx.merge(graphdef, params), batch, config.loss)
        return sums.total() / sums.weight

    return mean


@functools.cache
def trained(name):
    """The loss of the last step on one batch, which ends where it is learned; loss and gradient of the first."""
    mean, batch = loss_of(name), batch_of(name)
    steps, rate = (200, 0.01) if name in STACKS else (100, 0.02)
    optimizer = optax.adam(rate)

    @jax.jit
    def train(params, batch):
        def step(carry):
            number, params, state, first, _ = carry
            loss, gradient = jax.value_and_grad(mean)(params, batch)
            first = jax.tree.map(lambda one, new: jnp.where(number == 0, new, one), first, (loss, gradient))
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state)
            return number + 1, optax.apply_updates(params, updates), state, first, loss

        def goes_on(carry):
            number, *_, loss = carry
            return (number < steps) & (loss > LEARNED.get(name, 0.2))

        unknown = jnp.inf, jax.tree.map(jnp.zeros_like, params)
        *_, first, last = jax.lax.while_loop(goes_on, step, (0, params, optimizer.init(params), unknown, jnp.inf))
        return last, *first

    return train(params_of(name), jax.tree.map(jnp.asarray, batch))


def expected(name):
    """Loss and gradient on one device, with the layers in a scan."""
    return trained(name)[1:]


def assert_same(got, expected):
    """Losses and gradients, those of a large scale by it: what cancels out to little is as exact as its terms are."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * max(0.1, float(np.abs(other).max())))


@EVERY
def test_it_overfits_a_batch(name):
    last, first, _ = trained(name)
    assert first > (1 if "labels" in batch_of(name) else 2)
    assert last <= LEARNED.get(name, 0.2)


@pytest.mark.parametrize("name", STACKS)
def test_a_scan_is_a_loop(name):
    loop = loss_of(name, scan_layers=False)
    assert_same(jax.jit(jax.value_and_grad(loop))(params_of(name), batch_of(name)), expected(name))


@pytest.mark.parametrize("name", ON_A_MESH)
def test_eight_devices_are_one(name):
    config = MeshConfig(strategy="fsdp_tensor", tensor=2)
    mesh = make_mesh(config)
    with use_mesh(mesh, config.rules):
        params = placed(params_of(name), abstract_params(maker(name), mesh))
        batch = shard_batch(batch_of(name), batch_sharding(mesh, config.rules))
        got = jax.jit(jax.value_and_grad(loss_of(name)))(params, batch)
    assert_same(got, expected(name))
