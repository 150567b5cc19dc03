"""A mixture of experts: what a token becomes, who finds capacity, and what neither padding nor neighbours can change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from transformer.layers.feed_forward import ACTIVATIONS
from transformer.layers.mixture_of_experts import MixtureOfExperts, route, without_limit

D, F, E = 8, 16, 4


def layer(**changes):
    normal = nnx.initializers.normal(0.5)
    options = {"num_experts": E, "experts_per_token": 2, "kernel_init": normal, "out_init": normal, "rngs": nnx.Rngs(0)}
    return MixtureOfExperts(D, F, **(options | changes))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_definition(moe, x_BTD, valid_BT):
    """Token by token, in NumPy and float64."""
    x = np.asarray(x_BTD, np.float64)
    up, down = np.asarray(moe.up_EDF[...], np.float64), np.asarray(moe.down_EFD[...], np.float64)
    gate = None if moe.gate_EDF is None else np.asarray(moe.gate_EDF[...], np.float64)
    logits = x @ np.asarray(moe.router.kernel[...], np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    k, out = moe.experts_per_token, np.zeros_like(x)

    def function(h):
        return np.asarray(ACTIVATIONS[moe.activation][0](jnp.asarray(h, jnp.float32)), np.float64)

    for b in range(len(x)):
        valid = np.asarray(valid_BT[b])
        capacity = valid.sum()
        if moe.capacity is not None:
            capacity = min(max(np.ceil(moe.capacity * valid.sum() * k / moe.num_experts), 1), valid.sum())
        taken = np.zeros(moe.num_experts, int)
        order = np.argsort(-shares[b], axis=-1, kind="stable")[:, :k]
        for choice in range(k):
            for t in np.flatnonzero(valid):
                e = order[t, choice]
                taken[e] += 1
                if taken[e] > capacity:
                    continue
                weight = shares[b, t, e] / (shares[b, t, order[t]].sum() if k > 1 else 1)
                hidden = x[b, t] @ up[e]
                hidden = function(hidden) if gate is None else hidden * function(x[b, t] @ gate[e])
                out[b, t] += weight * (hidden @ down[e])
    return out


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("experts_per_token", [1, 2, 3])
@pytest.mark.parametrize("capacity", [None, 0.5, 1.0, 1.25])
def test_each_token_by_its_experts(capacity, experts_per_token, activation):
    moe = layer(capacity=capacity, experts_per_token=experts_per_token, activation=activation)
    x, valid = draw(3, 10, D), jnp.arange(10) < jnp.array([10, 7, 0])[:, None]
    out, _ = jax.jit(lambda x, valid: moe(x, valid))(x, valid)
    np.testing.assert_allclose(out, by_definition(moe, x, valid), atol=1e-5)


@pytest.mark.parametrize("capacity", [None, 0.5, 1.25])
def test_padding_changes_nothing(capacity):
    """Neither what it is nor how much of it there is, at the end or in between."""
    moe = layer(capacity=capacity)
    x = draw(2, 6, D)
    alone, sums = moe(x)
    padded = jnp.concatenate([x, 9 * draw(2, 7, D, seed=1)], axis=1)
    valid = jnp.broadcast_to(jnp.arange(13) < 6, (2, 13))
    out, padded_sums = moe(padded, valid)
    np.testing.assert_allclose(out[:, :6], alone, atol=1e-6)
    assert not np.asarray(out[:, 6:]).any()
    for got, expected in zip(jax.tree.leaves(padded_sums), jax.tree.leaves(sums), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    mixed = jnp.arange(13) % 2 == 0
    between = jnp.zeros((2, 13, D)).at[:, mixed].set(padded[:, :7])
    whole, _ = moe(padded[:, :7])
    spread, _ = moe(between, jnp.broadcast_to(mixed, (2, 13)))
    np.testing.assert_allclose(spread[:, mixed], whole, atol=1e-6)


def test_losses_are_those_of_the_papers():
    """The sums of two parts of a batch, by the coefficients of the whole: E Σ_e f_e P_e, the mean of log² Σ_e exp(logit_e)."""
    moe = layer(balance_loss=0.5, router_z_loss=0.25)
    x, valid = draw(4, 6, D), jnp.arange(6) < jnp.array([6, 2, 5, 3])[:, None]
    parts = [moe(x[rows], valid[rows])[1] for rows in (slice(0, 2), slice(2, 4))]
    coefficients = jax.tree.map(jnp.add, *parts).coefficients(jnp.asarray(7.0))
    logits = np.asarray(x @ moe.router.kernel[...], np.float64)[np.asarray(valid)]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    f = np.bincount(np.argsort(-p, axis=-1)[:, :2].ravel(), minlength=E) / (2 * len(p))
    expected = 0.5 * E * (f * p.mean(0)).sum() + 0.25 * np.square(np.log(np.exp(logits).sum(-1))).mean()
    np.testing.assert_allclose(sum(part.loss(coefficients) for part in parts), 7 * expected, rtol=1e-5)


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_rows_do_not_meet(capacity):
    moe = layer(capacity=capacity)
    x = draw(4, 6, D)
    together, _ = moe(x)
    for row in range(4):
        np.testing.assert_allclose(moe(x[row : row + 1])[0][0], together[row], atol=1e-6)


def test_without_a_limit_no_token_depends_on_another():
    moe = layer(capacity=0.25)
    x = draw(1, 8, D)
    limited, _ = moe(x)
    free = without_limit(moe)
    whole, _ = free(x)
    assert np.abs(np.asarray(limited - whole)).max() > 1e-2
    for t in range(8):
        np.testing.assert_allclose(free(x[:, t : t + 1])[0], whole[:, t : t + 1], atol=1e-6)


def by_arrays(moe, x_BTD, valid_BT):
    """Tokens brought to experts and back by one-hot products, an array of all pairs of a token and a slot."""
    T = x_BTD.shape[1]
    capacities = moe.capacities(T)
    experts, places, weights, _ = route(
        moe.router(x_BTD), valid_BT, jnp.asarray(capacities)[valid_BT.sum(1)], experts_per_token=moe.experts_per_token,
        balance_loss=0.0, router_z_loss=0.0,
    )  # fmt: skip
    taken = (
        jax.nn.one_hot(experts, moe.num_experts)[..., :, None]
        * jax.nn.one_hot(places, int(capacities[T]))[..., None, :]
    )
    given = jnp.einsum("BTkEC,BTD->BECD", taken, x_BTD)
    hidden = ACTIVATIONS[moe.activation][0](jnp.einsum("BECD,EDF->BECF", given, moe.up_EDF[...]))
    out = jnp.einsum("BECF,EFD->BECD", hidden, moe.down_EFD[...])
    return jnp.einsum("BTkEC,BTk,BECD->BTD", taken, weights, out)


@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("capacity", [None, 0.5, 1.25])
def test_gradients_are_those_of_one_hot_products(capacity, experts_per_token):
    graphdef, params = nnx.split(layer(capacity=capacity, experts_per_token=experts_per_token))
    x, valid = draw(3, 10, D), jnp.arange(10) < jnp.array([10, 7, 0])[:, None]

    def loss(apply):
        return lambda params, x: jnp.sum(jnp.sin(3 * apply(nnx.merge(graphdef, params), x, valid)))

    got = jax.jit(jax.value_and_grad(loss(lambda moe, *arrays: moe(*arrays)[0]), (0, 1)))(params, x)
    expected = jax.jit(jax.value_and_grad(loss(by_arrays), (0, 1)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("capacity", [None, 1.25])
def test_memory_is_linear_in_the_length(capacity):
    graphdef, params = nnx.split(layer(capacity=capacity))

    def largest(length):
        """Numbers in the largest array of the training step, with what is inside of other operations."""

        def sizes(jaxpr):
            for equation in jaxpr.eqns:
                yield from (var.aval.size for var in equation.outvars)
                for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                    inner = getattr(value, "jaxpr", value)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner)

        step = jax.grad(lambda params, x: nnx.merge(graphdef, params)(x)[0].sum(), (0, 1))
        return max(sizes(jax.make_jaxpr(step)(params, jnp.zeros((1, length, D))).jaxpr))

    # The hidden layers of the experts that each token goes to.
    assert largest(512) <= 2 * largest(256) and largest(512) <= 2 * 512 * F


@pytest.mark.parametrize("capacity", [None, 1.25])
@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"expert": 2, "tensor": 2, "data": 2}], ids=str)
def test_experts_on_devices_of_their_own(capacity, sizes):
    graphdef, params = nnx.split(layer(capacity=capacity, activation="swiglu"))
    x, valid = draw(4, 12, D), jnp.arange(12) < jnp.array([12, 7, 0, 9])[:, None]

    def run(params, x):
        return jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x, valid)[0])), (0, 1))(
            params, x
        )

    expected = jax.jit(lambda *arrays: run(*arrays))(params, x)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    rules = (("batch", "data"), ("expert", "expert"), ("mlp", "tensor" if "tensor" in sizes else None))
    rules += tuple((axis, None) for axis in ("embed", "stream", "seq"))
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        placed = jax.device_put(params, nnx.get_named_sharding(params, mesh))
        assert placed["up_EDF"].get_value().addressable_shards[0].data.shape[0] == E // sizes["expert"]
        got = jax.jit(run)(placed, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
