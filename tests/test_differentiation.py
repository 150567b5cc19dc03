"""What has a backward pass of its own has forward mode too, and second derivatives by either mode over the other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.attention.test_ring import mesh_of
from tests.changed import changed
from tests.made import made
from transformer.attention.backends import blockwise, loops
from transformer.attention.backends.pallas import pallas_interpret
from transformer.attention.dispatch import attend
from transformer.attention.linear.fast_weights import fast_weights
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.spec import AttentionSpec, Score
from transformer.differentiation import with_backward
from transformer.errors import UserError
from transformer.layers.embedding import embed_attend
from transformer.layers.feed_forward import DenseConfig, gelu_tanh
from transformer.layers.linear import dense
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.layers.norm import layer_norm, rms_norm
from transformer.layers.position import RotaryConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import Bert, BertConfig
from transformer.models.gpt import GPT, GPTConfig

MASK = AttentionMask.causal() & AttentionMask.segments(jnp.array([[1] * 5 + [2] * 11, [1] * 14 + [0] * 2]))


def softmax_attention(backend):
    def run(q, k, v, slopes):
        def score_mod(score, b, h, q, k):
            return score - slopes[h] * jnp.abs(q - k).astype(score.dtype)

        return attend(q, k, v, MASK, score_mod=score_mod, backend=backend)[0]

    return run, ((2, 16, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8), (4,))


FUNCTIONS = {
    "layer_norm": (functools.partial(layer_norm, epsilon=1e-5), ((3, 4, 8), (8,), (8,))),
    "layer_norm without bias": (functools.partial(layer_norm, epsilon=1e-5), ((3, 4, 8), (8,))),
    "rms_norm": (functools.partial(rms_norm, epsilon=1e-5), ((3, 4, 8), (8,))),
    "gelu": (gelu_tanh, ((3, 5),)),
    "dense": (dense, ((2, 3, 4), (4, 5), (5,))),
    "dense, narrower": (lambda x, kernel: dense(x, kernel, None), ((2, 3, 5), (5, 4))),
    "embed_attend": (embed_attend, ((2, 3, 4), (7, 4))),
    "fast_weights": (
        lambda q, k, v, beta: fast_weights(q, k, v, jax.nn.sigmoid(beta), chunk=4, feature_map="elu")[0],
        ((1, 10, 2, 3), (1, 10, 2, 3), (1, 10, 2, 2), (1, 10, 2)),
    ),
    "reference": softmax_attention("reference"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_and_both_second_derivatives(name):
    function, shapes = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        at, towards = ([np.asarray(0.5 * rng.normal(size=shape)) for shape in shapes] for _ in range(2))

        def loss(at):
            out = function(*at)
            return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

        def inner(at, v):
            return sum(jnp.vdot(g, u) for g, u in zip(jax.grad(loss)(at), v, strict=True))

        @jax.jit
        def derivatives(at, v):
            along = jax.jvp(loss, (at,), (v,))[1]
            # The Hessian times a vector: forward over reverse, reverse over forward, reverse over reverse.
            forward_reverse = jax.jvp(jax.grad(loss), (at,), (v,))[1]
            reverse_forward = jax.grad(lambda at: jax.jvp(loss, (at,), (v,))[1])(at)
            return along, (forward_reverse, reverse_forward, jax.grad(inner)(at, v))

        value_and_gradient = jax.jit(jax.value_and_grad(loss))
        step = 1e-5
        before, after = (
            value_and_gradient([x + sign * step * v for x, v in zip(at, towards, strict=True)]) for sign in (-1, 1)
        )
        slope, expected = jax.tree.map(lambda a, b: (a - b) / (2 * step), after, before)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
        along, products = derivatives(at, towards)
        close(along, slope)
        gradient = value_and_gradient(at)[1]
        close(along, sum(np.vdot(g, v) for g, v in zip(gradient, towards, strict=True)))
        for product in products:
            jax.tree.map(close, product, expected)


def test_every_column_of_a_jacobian_at_once():
    """Forward mode under `jax.vmap`, and the backward pass too."""
    x, scale = jnp.linspace(-1.0, 2.0, 6), jnp.linspace(0.5, 1.5, 6)

    def function(x, scale):
        return gelu_tanh(rms_norm(x[None], scale, epsilon=1e-5)[0])

    forward = jax.jit(jax.jacfwd(function, (0, 1)))(x, scale)
    reverse = jax.jit(jax.jacrev(function, (0, 1)))(x, scale)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), forward, reverse)
    hessian = jax.jit(jax.hessian(lambda x: function(x, scale).sum()))(x)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-6)
    each = jax.vmap(jax.grad(lambda x, scale: function(x, scale).sum(), (0, 1)), in_axes=(0, None))
    got = jax.jit(each)(jnp.stack([x, 2 * x]), scale)
    gradient = jax.jit(jax.grad(lambda x, scale: function(x, scale).sum(), (0, 1)))
    for row, value in enumerate((x, 2 * x)):
        wanted = gradient(value, scale)
        jax.tree.map(lambda a, b, row=row: np.testing.assert_allclose(a[row], b, atol=1e-6), got, wanted)


def test_the_backward_pass_is_the_one_given():
    def forward(x, pair, numbers):
        return {"y": x * pair[0], "z": x + numbers.astype(x.dtype)}, (x, pair[0])

    def backward(saved, dout):
        x, first = saved
        # Not the derivative, so that it shows.
        return dout["y"] * first * 10, (dout["y"] * x, None, None), None

    def function(x, first, second):
        out = with_backward(forward, backward, x, (first, None, second), jnp.arange(3))
        return jnp.sum(out["y"])

    x = jnp.array([1.0, 2.0, 3.0])
    gradients = jax.grad(function, (0, 1, 2))(x, 2 * x, x)
    jax.tree.map(np.testing.assert_allclose, gradients, (20 * x, x, 0 * x))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_without_forward_mode_says_what_to_use(compiled):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 128, 1, 16)), jnp.float32)
    variant = AttentionSpec(AttentionMask.causal(), Score(0.25))

    def loss(x):
        return pallas_interpret(x, x, x, variant, platform="tpu").sum()

    for function in (loss, jax.grad(loss)):

        def run(x, v, function=function):
            return jax.jvp(function, (x,), (v,))

        with pytest.raises(UserError, match="'pallas'.*'reference'"):
            (jax.jit(run) if compiled else run)(x, x)


SHAPE = {"vocab_size": 16, "max_length": 8, "num_layers": 1, "embed_dim": 16, "attention": SoftmaxConfig(num_heads=2)}
# Without a scan where one is not asked for: one layer is enough.
LOOP = SHAPE | {"scan_layers": False}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
MODERN = {
    "norm": "rms_norm", "mlp": DenseConfig(activation="swiglu", bias=False), "tie_embeddings": False,
    "attention": SoftmaxConfig(num_heads=2, num_kv_heads=1, bias=False, position=RotaryConfig()),
}  # fmt: skip
MODELS = {
    "gpt": (GPT, GPTConfig(**LOOP)),
    "gpt, scanned and rematerialised": (GPT, GPTConfig(**SHAPE | {"num_layers": 2, "remat": "full"})),
    "gpt, modern": (GPT, GPTConfig(**LOOP | MODERN)),
    "gpt, experts": (GPT, GPTConfig(**LOOP | {"mlp": ExpertsConfig(num_experts=2, experts_per_token=2)})),
    "bert, scanned": (
        Bert,
        BertConfig(**SHAPE | NO_DROPOUT | {"num_layers": 2, "mlp": DenseConfig(activation="gelu")}),
    ),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    list(zip(MODELS, ["reference", "blockwise", "blockwise", "reference", "blockwise"], strict=True)),
)
def test_a_models_loss(name, backend):
    kind, config = MODELS[name]
    config = changed(config, attention={"backend": backend})
    graphdef, params = made(lambda rngs: kind(config, rngs=rngs), std=0.2)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 8)))
    towards = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)

    def loss(params):
        logits = nnx.merge(graphdef, params)(tokens).logits
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1))

    def dot(a, b):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))

    @jax.jit
    def everything(params, towards):
        _, along = jax.jvp(loss, (params,), (towards,))
        gradient, product = jax.jvp(jax.grad(loss), (params,), (towards,))
        backwards = jax.grad(lambda params: dot(jax.grad(loss)(params), towards))(params)
        return along, dot(gradient, towards), product, backwards

    along, expected, product, backwards = everything(params, towards)
    np.testing.assert_allclose(along, expected, rtol=1e-4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(backwards))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4 * scale), product, backwards)


def products(backend):
    """A derivative of attention's, and of its gradient's, along one direction."""
    function, shapes = softmax_attention(backend)
    at, towards = (
        [np.random.default_rng(seed + i).normal(size=shape).astype("float32") for i, shape in enumerate(shapes)]
        for seed in (0, 10)
    )

    @jax.jit
    def run(at, v):
        def loss(at):
            return jnp.sum(jnp.sin(function(*at)))

        return jax.jvp(loss, (at,), (v,))[1], jax.jvp(jax.grad(loss), (at,), (v,))[1]

    return run(at, towards)


@pytest.fixture(scope="module")
def products_of_the_reference():
    return products("reference")


@pytest.mark.parametrize("looped", [False, True])
def test_blockwise_attention(monkeypatch, products_of_the_reference, looped):
    """Some queries see no key."""
    if looped:
        monkeypatch.setattr(blockwise, "MAX_BLOCKS", 0)
        monkeypatch.setattr(loops, "BLOCK", 8)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-4),
        products("blockwise"),
        products_of_the_reference,
    )


def test_a_ring():
    rng = np.random.default_rng(0)
    at, towards = ([jnp.asarray(rng.normal(size=(2, 32, 4, 8)), jnp.float32) for _ in range(3)] for _ in range(2))

    def products(backend):
        def loss(at):
            return jnp.sum(jnp.sin(attend(*at, AttentionMask.causal(), backend=backend)[0]))

        def run(at, v):
            return jax.jvp(loss, (at,), (v,))[1], jax.jvp(jax.grad(loss), (at,), (v,))[1]

        return jax.jit(run)(at, towards)

    expected = products("reference")
    with mesh_of(data=2, sequence=4):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), products("ring"), expected)
