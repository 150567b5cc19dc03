"""Products of groups: each way of computing them, and all their derivatives, against the definition in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers import grouped_matmul as module
from transformer.layers.grouped_matmul import WAYS, grouped_matmul, grouped_outer
from transformer.stack import REMAT_POLICIES

D, F = 3, 5
SIZES = {
    "even": [4, 4, 4], "skewed": [0, 12, 0], "an empty group": [5, 0, 7], "some in no group": [1, 6, 2],
    "none": [0, 0, 0], "first": [11, 1, 0],
}  # fmt: skip
EVERY = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of which a group has several, and not a whole number; two are multiplied at once."""
    monkeypatch.setattr(module, "LOOP_BLOCK", 4)
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "COPIED", 2 * D * F * 8)


def draw(sizes, N=12, dtype=np.float64):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(dtype) for shape in ((N, D), (len(sizes), D, F), (N, F))]
    return *map(jnp.asarray, arrays), jnp.asarray(sizes, jnp.int32)


def by_definition(x, kernel, y, sizes):
    """The products, and the sums of outer products."""
    x, kernel, y, sizes = map(np.asarray, (x, kernel, y, sizes))
    products, sums = np.zeros((len(x), kernel.shape[2])), np.zeros(kernel.shape)
    for group, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[group], end)
        products[rows], sums[group] = x[rows] @ kernel[group], x[rows].T @ y[rows]
    return products, sums


@EVERY
@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_the_definition(way, sizes):
    matmul, outer = map(jax.jit, WAYS[way])
    with jax.enable_x64(True):
        x, kernel, y, sizes = draw(sizes)
        expected = by_definition(x, kernel, y, sizes)
        np.testing.assert_allclose(matmul(x, kernel, sizes), expected[0], atol=1e-13)
        np.testing.assert_allclose(outer(x, y, sizes), expected[1], atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("N", [1, 3, 9])
def test_any_number_of_vectors(way, N):
    matmul, outer = map(jax.jit, WAYS[way])
    with jax.enable_x64(True):
        x, kernel, y, sizes = draw([0, N, 0], N)
        expected = by_definition(x, kernel, y, sizes)
        np.testing.assert_allclose(matmul(x, kernel, sizes), expected[0], atol=1e-13)
        np.testing.assert_allclose(outer(x, y, sizes), expected[1], atol=1e-13)


@EVERY
def test_gradients_are_those_of_the_definition(sizes):
    with jax.enable_x64(True):
        x, kernel, y, sizes = draw(sizes)
        groups = np.repeat(np.arange(len(sizes) + 1), [*np.asarray(sizes), len(x) - int(sizes.sum())])

        def plain(x, kernel):
            each = jnp.concatenate([kernel, jnp.zeros((1, D, F))])[groups]
            return jnp.sum(y * jnp.sin(jnp.einsum("ND,NDF->NF", x, each)))

        def ours(x, kernel):
            return jnp.sum(y * jnp.sin(grouped_matmul(x, kernel, sizes)))

        for order in (jax.grad, jax.hessian):
            got, expected = (jax.jit(order(f, (0, 1)))(x, kernel) for f in (ours, plain))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, expected)

        def twice(f):
            """Reverse over forward over reverse."""
            along = lambda *at: jax.jvp(jax.grad(f, (0, 1)), at, (x, kernel))[1][0].sum()  # noqa: E731
            return jax.jit(jax.grad(along, (0, 1)))(x, kernel)

        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), twice(ours), twice(plain))


def test_the_sum_of_outer_products_has_gradients_too():
    with jax.enable_x64(True):
        x, kernel, y, sizes = draw(SIZES["some in no group"])
        gradients = jax.grad(lambda x, y: jnp.sum(kernel * grouped_outer(x, y, sizes)), (0, 1))(x, y)
        expected_y, _ = by_definition(x, kernel, y, sizes)
        expected_x, _ = by_definition(y, kernel.swapaxes(1, 2), x, sizes)
        np.testing.assert_allclose(gradients[0], expected_x, atol=1e-13)
        np.testing.assert_allclose(gradients[1], expected_y, atol=1e-13)


def test_several_at_a_time():
    x, kernel, _, sizes = draw(SIZES["an empty group"], dtype=np.float32)
    several = jnp.stack([sizes, jnp.asarray([12, 0, 0], jnp.int32)])
    got = jax.vmap(grouped_matmul, (None, None, 0))(x, kernel, several)
    for one, alone in zip(several, got, strict=True):
        np.testing.assert_allclose(alone, grouped_matmul(x, kernel, one), atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_narrow_operands_are_summed_in_a_wider_type(way):
    N = 600
    ones = jnp.ones((N, 1), jnp.bfloat16)
    sums = jax.jit(WAYS[way][1])(ones, ones, jnp.asarray([N], jnp.int32))
    assert sums.dtype == jnp.bfloat16 and float(sums[0, 0, 0]) == N


@pytest.mark.parametrize(
    ("platform", "operation"), [("cpu", "stablehlo.while"), ("cuda", "stablehlo.scatter"), ("tpu", "chlo.ragged_dot")]
)
def test_each_platform_has_its_way(platform, operation):
    x, kernel, _, sizes = draw([4, 4, 4], dtype=np.float32)
    gradients = jax.jit(jax.grad(lambda x, kernel: grouped_matmul(x, kernel, sizes).sum(), (0, 1)))
    text = gradients.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert operation in text
    assert ("chlo.ragged_dot" in text) == (platform == "tpu")


@pytest.mark.parametrize(("remat", "products"), [("full", 3), ("dots", 2)])
def test_rematerialisation_may_save_the_products(remat, products):
    """One for the output and one for its gradient, and one more if the first is computed again."""
    x, kernel, _, sizes = draw([4, 4, 4], dtype=np.float32)
    layer = jax.checkpoint(lambda x: jnp.sin(grouped_matmul(x, kernel, sizes)).sum(), policy=REMAT_POLICIES[remat])
    traced = str(jax.make_jaxpr(jax.grad(layer))(x))
    assert traced.count("= grouped_matmul") == products


def test_operands_have_one_type():
    x, kernel, _, sizes = draw([12], dtype=np.float32)
    with pytest.raises(ValueError, match="of float32 and bfloat16; expected operands of one type"):
        grouped_matmul(x, kernel.astype(jnp.bfloat16), sizes)
