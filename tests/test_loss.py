"""The loss in chunks, against whole logits in float64, on one device and on eight; and what its programs hold and send."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.made import made
from train.config import RunConfig
from train.loss import LossConfig
from train.parallel.mesh import MeshConfig, make_mesh, use_mesh
from train.program.hlo import Module
from train.program.program import Program
from train.program.step import make_eval_step
from transformer import loss as module
from transformer.loss import Projection, token_cross_entropy
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig

# No other dim of a program has this size, or a multiple of it.
B, T, D, V = 8, 12, 16, 56
RNG = np.random.default_rng(0)
HIDDEN, TABLE, BIAS = (RNG.normal(size=shape) for shape in ((B, T, D), (V, D), (V,)))
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
WEIGHTS = (RNG.random((B, T)) < 0.7).astype(np.float32) * np.linspace(0.5, 2, B, dtype=np.float32)[:, None]

VARIANTS = {
    "table": {},
    "kernel and bias": {"is_table": False, "has_bias": True},
    "table and bias, soft cap": {"has_bias": True, "soft_cap": 3.0},
    "z-loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.2, "is_table": False},
    "all": {"z_loss": 0.1, "label_smoothing": 0.2, "soft_cap": 2.0, "has_bias": True},
}


def arguments(dtype, is_table=True, has_bias=False):
    kernel = TABLE if is_table else TABLE.T
    return [jnp.asarray(x, dtype) for x in (HIDDEN, kernel, BIAS)[: 3 if has_bias else 2]]


def ours(is_table=True, has_bias=False, soft_cap=None, dtype=None, **options):
    """A function of hidden states, kernel and bias."""

    def sums(hidden, kernel, bias=None):
        projection = Projection(
            kernel=kernel, is_table=is_table, bias_V=bias, dtype=dtype or hidden.dtype, soft_cap=soft_cap
        )
        return token_cross_entropy(hidden, projection, jnp.asarray(TARGETS), jnp.asarray(WEIGHTS), **options)

    return sums


def by_definition(is_table=True, has_bias=False, soft_cap=None, z_loss=0.0, label_smoothing=0.0):
    def sums(hidden, kernel, bias=None):
        logits = hidden @ (kernel.T if is_table else kernel)
        logits = logits if bias is None else logits + bias
        logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
        log_p, log_z = jax.nn.log_softmax(logits), jax.nn.logsumexp(logits, axis=-1)
        labels = jax.nn.one_hot(TARGETS, V, dtype=logits.dtype)
        weights = jnp.asarray(WEIGHTS, logits.dtype)
        nll = -jnp.sum(labels * log_p, -1)
        smooth = -jnp.mean(log_p, -1)
        loss = (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * log_z**2
        return jnp.sum(weights * loss), jnp.sum(weights * nll)

    return sums


@functools.cache
def expected(name):
    """Loss, likelihood and gradients in float64, as NumPy."""
    with jax.enable_x64(True):
        args = arguments(jnp.float64, **shape_of(name))
        wrt = tuple(range(len(args)))
        return jax.device_get(jax.jit(jax.value_and_grad(by_definition(**VARIANTS[name]), wrt, has_aux=True))(*args))


def shape_of(name):
    return {key: value for key, value in VARIANTS[name].items() if key in ("is_table", "has_bias")}


def found(name, dtype=jnp.float32, **options):
    args = arguments(dtype, **shape_of(name))
    wrt = tuple(range(len(args)))
    return jax.jit(jax.value_and_grad(ours(**VARIANTS[name], **options), wrt, has_aux=True))(*args)


def close(got, wanted, tolerance):
    """Of every array the largest error, relative to its largest element."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape
        assert np.abs(np.asarray(one, np.float64) - other).max() <= tolerance * np.abs(other).max()


# One chunk; several; several of which the last is not full; of one token.
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunk", [None, 24, 37])
def test_values_and_gradients(name, chunk):
    close(found(name, chunk=chunk), expected(name), 3e-6)


def test_chunks_of_one_token_and_automatic_ones(monkeypatch):
    close(found("all", chunk=1), expected("all"), 3e-6)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(module, "CHUNK_BYTES", 128 * V * 4)
    close(found("all"), expected("all"), 3e-6)


@pytest.mark.parametrize("chunk", [None, 24])
def test_in_bfloat16_the_logits_are_not_rounded(chunk):
    """The same as of float64 products of the rounded operands, but for the rounding of the gradients."""
    args = [x.astype(jnp.bfloat16) for x in arguments(jnp.float32, has_bias=True)[:2]]
    kernel = args[1].astype(jnp.float32)
    (loss, nll), (dhidden, dkernel) = jax.jit(
        jax.value_and_grad(ours(dtype=jnp.bfloat16, chunk=chunk), (0, 1), has_aux=True)
    )(args[0], kernel)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in args]
        value, gradients = jax.jit(jax.value_and_grad(by_definition(), (0, 1), has_aux=True))(*wide)
        value, gradients = jax.device_get((value, gradients))
    assert (loss.dtype, dhidden.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    close((loss, nll), value, 1e-6)
    close((dhidden, dkernel), gradients, 4e-3)


def test_only_the_loss_has_a_gradient():
    args = arguments(jnp.float32)
    both = jax.grad(lambda *args: sum(ours()(*args)))(*args)
    alone = jax.grad(lambda *args: ours()(*args)[0])(*args)
    np.testing.assert_array_equal(both, alone)
    # The backward pass multiplies by the gradient that arrives.
    twice = jax.grad(lambda *args: 2 * ours()(*args)[0])(*args)
    np.testing.assert_array_equal(twice, 2 * alone)


@pytest.mark.parametrize("chunk", [None, 37])
def test_forward_mode_and_second_derivatives(chunk):
    with jax.enable_x64(True):
        options = VARIANTS["all"]
        args = arguments(jnp.float64, has_bias=True)
        towards = [jnp.asarray(RNG.normal(size=x.shape)) for x in args]

        @jax.jit
        def derivatives(args, towards):
            def products(function):
                def loss(args):
                    return function(*args)[0]

                along = jax.jvp(loss, (args,), (towards,))[1]
                forward = jax.jvp(jax.grad(loss), (args,), (towards,))[1]
                inner = jax.grad(lambda args: sum(map(jnp.vdot, jax.grad(loss)(args), towards)))(args)
                return along, forward, inner

            return products(ours(**options, chunk=chunk)), products(by_definition(**options))

        got, wanted = jax.device_get(derivatives(args, towards))
        close(got, wanted, 1e-9)


MESHES = {
    "dp": MeshConfig(strategy="dp"),
    "fsdp": MeshConfig(strategy="fsdp"),
    "fsdp and tensor": MeshConfig(strategy="fsdp_tensor", data=2, fsdp=2, tensor=2),
    "tensor": MeshConfig(strategy="tensor"),
    "context and tensor": MeshConfig(strategy="context", context=2, tensor=2, data=2),
}


def sharded(name, mesh_config, **options):
    """The compiled value and gradients of a variant on all devices, and its arguments."""
    mesh, shape = make_mesh(mesh_config), {"is_table": True, "has_bias": False} | shape_of(name)
    with use_mesh(mesh, mesh_config.rules):
        axes = ("vocab", "embed") if shape["is_table"] else ("embed", "vocab")
        rules = dict(mesh_config.rules)
        spec = jax.sharding.PartitionSpec
        layouts = [spec(rules["batch"], rules["seq"]), spec(*(rules[axis] for axis in axes)), spec(rules["vocab"])]
        args = arguments(jnp.float32, **shape)
        layouts = [jax.sharding.NamedSharding(mesh, one) for one in layouts[: len(args)]]
        wrt = tuple(range(len(args)))
        function = jax.value_and_grad(ours(**VARIANTS[name], **options), wrt, has_aux=True)
        program = jax.jit(function, in_shardings=layouts, out_shardings=(None, tuple(layouts)))
        placed = [jax.device_put(x, layout) for x, layout in zip(args, layouts, strict=True)]
        return program.lower(*placed).compile(), placed


@pytest.mark.parametrize(("mesh", "name"), [
    ("dp", "table"), ("fsdp", "all"), ("fsdp and tensor", "all"), ("fsdp and tensor", "smoothing"),
    ("tensor", "kernel and bias"), ("context and tensor", "all"),
])  # fmt: skip
def test_eight_devices(mesh, name):
    """The kernel is gathered before the loop and its gradient summed after it; in the loop only numbers of tokens are sent."""
    program, args = sharded(name, MESHES[mesh], chunk=5)
    close(program(*args), expected(name), 3e-6)
    found = Module(program.as_text()).collectives()
    # Three numbers of each token, in one exchange.
    assert all(one.count == 1 or one.sent <= 3 * 2 * 5 * 4 for one in found), found
    if mesh == "fsdp":
        whole = sorted(one.kind for one in found if one.sent >= V * D * 4 * 7 / 8)
        assert whole == ["all-gather", "reduce-scatter"], found


def test_what_the_devices_do_not_divide():
    """One row, and a vocabulary that is not a multiple of the devices: everything is replicated, and right."""
    config = MeshConfig(strategy="fsdp", fsdp=2, tensor=4)
    hidden, table = arguments(jnp.float32)
    hidden, table = hidden[:1, :5], table[:55]
    targets, weights = jnp.asarray(np.minimum(TARGETS[:1, :5], 54)), jnp.ones((1, 5))

    def loss(hidden, table):
        return token_cross_entropy(hidden, Projection(kernel=table, is_table=True), targets, weights, chunk=2)[0]

    wanted = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, table)
    with use_mesh(make_mesh(config), config.rules):
        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, table)
    close(got, jax.device_get(wanted), 1e-6)


MODEL = GPTConfig(vocab_size=V, max_length=T, num_layers=1, embed_dim=D, attention=SoftmaxConfig(num_heads=2))
BATCH = {"tokens": TARGETS, "targets": TARGETS, "weights": WEIGHTS}


def large(text, tokens, width=V):
    """The arrays of a program with at least `tokens` tokens and the vocabulary (the widths of a device)."""
    shapes = {shape.dims for _, _, one in Module(text).executed() for shape in one.shapes}
    return {dims for dims in shapes if width in dims and np.prod(dims) >= tokens * width}


@pytest.mark.parametrize("mesh", [MeshConfig(strategy="dp"), MeshConfig(strategy="fsdp", fsdp=4, tensor=2)])
def test_a_training_step_has_no_logits_beyond_a_chunk(mesh):
    devices = 8 if mesh.fsdp else 1
    own_tokens, width = B * T // (4 if mesh.fsdp else 1), V // (mesh.tensor or 1)
    for chunk in (own_tokens // 2, None):
        config = RunConfig(
            name="test", batch_size=B, model=MODEL, mesh=mesh, loss=LossConfig(chunk=chunk), length=T
        )  # fmt: skip
        real = make_mesh(mesh, jax.devices()[:devices])
        with use_mesh(real, mesh.rules):
            text = Program(config, real).lower().compile().as_text()
        # The table and its gradient have fewer elements than all logits.
        assert bool(large(text, own_tokens, width)) == (chunk is None)
        assert all(one.sent < V * D for one in Module(text).collectives() if one.count > 1)


def test_evaluation_has_no_gradients_and_no_logits_beyond_a_chunk():
    graphdef, params = made(lambda rngs: GPT(dataclasses.replace(MODEL, num_layers=1), rngs=rngs))
    # The terms that training adds are not a part of it.
    step = make_eval_step(graphdef, loss=LossConfig(chunk=16, z_loss=0.1, label_smoothing=0.1))
    text = step.lower(params, BATCH).compile().as_text()
    assert not large(text, 17) and large(text, 16)
    (sums, _), logits = step(params, BATCH), nnx.merge(graphdef, params)(jnp.asarray(TARGETS)).logits
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums.loss, np.sum(nll * WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(sums.weight, WEIGHTS.sum(), rtol=1e-6)
    traced = str(step.trace(params, BATCH).jaxpr)
    assert f"f32[{V},{D}]" in traced and "linear_with_transpose" not in traced
