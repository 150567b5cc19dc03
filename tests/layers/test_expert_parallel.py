"""Tokens in the order of their experts, and experts on devices of their own: as on one device, whatever is sharded."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from transformer.layers.expert_parallel import Order, collect, combine, dispatch
from transformer.layers.mixture_of_experts import MixtureOfExperts

B, T, D, F, E = 8, 6, 4, 8, 4


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("parts", [1, 2])
def test_choices_are_in_the_order_of_their_experts(parts):
    """Those of no expert, and of one that is not here, have no place."""
    experts = jnp.array([[3, 0], [0, -1], [1, 3], [4, 0]])
    order = Order.of(experts, 4, 12, parts)
    assert order.sizes_E.tolist() == [3, 1, 0, 2]
    # A part has the choices of two experts.
    expected = [1, 2, 7, 4, 0, 5] + 6 * [8] if parts == 1 else [1, 2, 7, 4, 8, 8, 0, 5, 8, 8, 8, 8]
    assert order.choices_M.tolist() == expected
    places = np.asarray(order.places_Nk).reshape(-1)
    assert all(place == (expected.index(choice) if choice in expected else 12) for choice, place in enumerate(places))


def test_there_and_back():
    experts, x, weights = jnp.array([[2, 0], [0, -1], [1, 2]]), draw(3, D), draw(3, 2)
    order = Order.of(experts, 3, 6)
    np.testing.assert_array_equal(collect(dispatch(x, order), order)[1], [x[1], jnp.zeros(D)])
    is_kept = (experts >= 0)[..., None]
    np.testing.assert_allclose(
        combine(dispatch(x, order), weights, order),
        (jnp.where(is_kept, weights[..., None], 0) * x[:, None]).sum(1),
        rtol=1e-6,
    )


def close(got, expected, rtol=1e-5, atol=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=rtol, atol=atol)


def layer(**changes):
    normal = nnx.initializers.normal(0.5)
    options = {"num_experts": E, "experts_per_token": 2, "activation": "swiglu", "rngs": nnx.Rngs(0)}
    options |= {"balance_loss": 1.0, "router_z_loss": 1.0}
    return MixtureOfExperts(D, F, kernel_init=normal, out_init=normal, **(options | changes))


@contextlib.contextmanager
def on_mesh(sizes, params, **changes):
    """The parameters on a mesh with the rules of a training run."""
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    rules = {
        "batch": tuple(axis for axis in ("data", "fsdp", "expert") if axis in sizes),
        "expert": "expert", "mlp": "tensor", "embed": "fsdp", "seq": "context", "stream": "context",
    }  # fmt: skip
    rules = {axis: placed if isinstance(placed, tuple) or placed in sizes else None for axis, placed in rules.items()}
    with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple((rules | changes).items())):
        yield jax.device_put(params, nnx.get_named_sharding(params, mesh))


def step_of(graphdef):
    """Outputs, router sums and gradients."""

    def step(params, x, valid):
        def loss(params, x):
            out, sums = nnx.merge(graphdef, params)(x, valid)
            added = sums.loss(sums.coefficients(jnp.ones(())))
            return jnp.sum(jnp.sin(out).astype(jnp.float32)) + added, (out, sums)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    return step


LAYOUTS = [
    ({"data": 8}, {}),
    ({"data": 2, "expert": 4}, {}),
    ({"data": 2, "expert": 2, "tensor": 2}, {}),
    ({"fsdp": 4, "tensor": 2}, {}),
    ({"fsdp": 2, "expert": 2, "context": 2}, {}),
    # The same tokens on all devices of the experts' axis.
    ({"data": 4, "expert": 2}, {"batch": "data"}),
]


@pytest.mark.parametrize("capacity", [None, 0.5, 1.25])
@pytest.mark.parametrize(("sizes", "changes"), LAYOUTS, ids=str)
def test_eight_devices_compute_what_one_does(sizes, changes, capacity):
    graphdef, params = nnx.split(layer(capacity=capacity))
    # The first rows' tokens are alike, so they have the same experts; others are padding in part, or altogether.
    x = draw(B, T, D).at[:3].set(draw(D, seed=1))
    valid = jnp.arange(T) < jnp.array([6, 6, 6, 6, 4, 0, 5, 6])[:, None]
    step = step_of(graphdef)
    expected = jax.jit(step)(params, x, valid)
    with on_mesh(sizes, params, **changes) as placed:
        got = jax.jit(step)(placed, x, valid)
    close(got, expected)


@pytest.mark.parametrize("capacity", [None, 1.25])
@pytest.mark.parametrize("favourite", [0, 3])
def test_all_tokens_may_go_to_one_device(capacity, favourite):
    """Nothing is dropped for lack of room in a buffer."""
    moe = layer(capacity=capacity, experts_per_token=1)
    moe.router.kernel[...] = jnp.zeros((D, E)).at[:, favourite].set(5.0)
    graphdef, params = nnx.split(moe)
    x, valid = jnp.abs(draw(B, T, D)), jnp.ones((B, T), bool)
    step = step_of(graphdef)
    expected = jax.jit(step)(params, x, valid)
    with on_mesh({"data": 2, "expert": 4}, params) as placed:
        got = jax.jit(step)(placed, x, valid)
    close(got, expected)
    kept = np.asarray(got[0][1][0]).any(-1).sum(1)
    assert (kept == (T if capacity is None else np.ceil(1.25 * T / E))).all()


@pytest.mark.parametrize(("capacity", "sent"), [(None, "all_gather"), (1.25, "all_to_all")])
def test_tokens_go_to_their_experts_by_what_sends_less(capacity, sent):
    graphdef, params = nnx.split(layer(capacity=capacity, experts_per_token=1))
    x, valid = draw(B, T, D), jnp.ones((B, T), bool)
    with on_mesh({"data": 2, "expert": 4}, params) as placed:
        text = jax.jit(step_of(graphdef)).lower(placed, x, valid).as_text()
    found = {name for name in ("all_gather", "reduce_scatter", "all_to_all") if f"stablehlo.{name}" in text}
    assert found == ({"all_to_all"} if sent == "all_to_all" else {"all_gather", "reduce_scatter"})


def test_what_does_not_divide_is_whole_on_every_device():
    """One row, as in decoding, and a number of experts that the axis does not divide."""
    graphdef, params = nnx.split(layer(num_experts=3, capacity=None))
    x, valid = draw(1, T, D), jnp.ones((1, T), bool)
    step = step_of(graphdef)
    expected = jax.jit(step)(params, x, valid)
    with on_mesh({"data": 2, "expert": 4}, params, expert=None) as placed:
        got = jax.jit(step)(placed, x, valid)
    close(got, expected)


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"expert": 2, "tensor": 2, "data": 2}], ids=str)
def test_narrow_types_are_sent_as_they_are(sizes, capacity):
    graphdef, params = nnx.split(layer(capacity=capacity, dtype=jnp.bfloat16))
    x, valid = draw(B, T, D).astype(jnp.bfloat16), jnp.ones((B, T), bool)
    step = step_of(graphdef)
    expected = jax.jit(step)(params, x, valid)
    with on_mesh(sizes, params) as placed:
        got = jax.jit(step)(placed, x, valid)
    assert got[0][1][0].dtype == jnp.bfloat16
    close(got, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 2}, {"expert": 2, "data": 2, "tensor": 1}], ids=str)
def test_within_a_program_that_is_manual_over_another_axis(sizes):
    """As the stage of a pipeline is."""
    graphdef, params = nnx.split(layer(capacity=1.25))
    x, valid = draw(B, T, D), jnp.ones((B, T), bool)

    def outputs(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x, valid[: len(x)])[0]), axis=(1, 2))

    expected = jax.jit(jax.value_and_grad(lambda params: outputs(params, x).sum()))(params)
    with on_mesh({"pipeline": 2, **sizes}, params) as placed:
        by_half = jax.shard_map(
            outputs, in_specs=(PartitionSpec(), PartitionSpec("pipeline")), out_specs=PartitionSpec("pipeline"),
            axis_names={"pipeline"}, check_vma=False,
        )  # fmt: skip
        got = jax.jit(jax.value_and_grad(lambda params: by_half(params, x).sum()))(placed)
    close(got, expected)


def test_under_pmap():
    graphdef, params = nnx.split(layer(capacity=1.25))
    x = draw(B, T, D)
    step = step_of(graphdef)
    valid = jnp.ones((1, T), bool)
    got = jax.pmap(step, in_axes=(None, 0, None))(params, x[:, None], valid)
    one = jax.jit(step)
    for row in (0, B - 1):
        close(jax.tree.map(lambda a, row=row: a[row], jax.tree.leaves(got)), one(params, x[row : row + 1], valid))
