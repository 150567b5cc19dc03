"""A sequence over many devices gives what one device gives."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.attention.test_blockwise import MASKS
from transformer.attention import loops
from transformer.attention.dispatch import BackendError, attend

B, T, N, K, H = 2, 64, 4, 4, 8
RULES = (("batch", "data"), ("seq", "sequence"), ("heads", "tensor"), ("kv_heads", "tensor"))


@contextlib.contextmanager
def mesh_of(rules=RULES, **sizes):
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    known = tuple((axis, name if name in sizes else None) for axis, name in rules)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(known):
        yield mesh


def inputs(num_kv_heads=K, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, num_kv_heads, H), (B, T, num_kv_heads, H))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def values_and_gradients(backend, arrays, mask, slopes):
    @jax.jit
    def run(arrays, slopes):
        def loss(arrays, slopes):
            def score_mod(score, b, h, q, k):
                return score - slopes[h] * jnp.abs(q - k).astype(score.dtype)

            out = attend(*arrays, mask, score_mod=score_mod, backend=backend)[0]
            return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays, slopes)

    return run(arrays, slopes)


@pytest.mark.parametrize("backend", ["ring", "ulysses"])
@pytest.mark.parametrize("name", [name for name in MASKS if name != "explicit"])
def test_eight_devices_compute_what_one_does(monkeypatch, backend, name):
    monkeypatch.setattr(loops, "BLOCK", 8)
    slopes, mask = jnp.linspace(0.1, 0.5, N), MASKS[name](T, T)
    truth = values_and_gradients("reference", inputs(), mask, slopes)
    sizes = {"data": 2, "sequence": 4} if backend == "ring" else {"data": 2, "sequence": 2, "tensor": 2}
    with mesh_of(**sizes):
        ours = values_and_gradients(backend, inputs(), mask, slopes)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5, rtol=3e-5), ours, truth)


@pytest.mark.parametrize("backend", ["ring", "ulysses"])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_shared_key_heads(backend, num_kv_heads):
    arrays, mask = inputs(num_kv_heads), MASKS["causal"](T, T)
    truth = attend(*arrays, mask, backend="reference")[0]
    with mesh_of(data=2, sequence=4):
        np.testing.assert_allclose(jax.jit(lambda *x: attend(*x, mask, backend=backend)[0])(*arrays), truth, atol=2e-6)


@pytest.mark.parametrize("sizes", [{"sequence": 8}, {"sequence": 1}, {"data": 2, "sequence": 2, "tensor": 2}])
def test_ring_on_any_number_of_devices(sizes):
    arrays, mask = inputs(), MASKS["window"](T, T)
    truth = attend(*arrays, mask, backend="reference")[0]
    with mesh_of(**sizes):
        np.testing.assert_allclose(jax.jit(lambda *x: attend(*x, mask, backend="ring")[0])(*arrays), truth, atol=2e-6)


def test_each_of_eight_devices_holds_an_eighth():
    length, mask = 4096, MASKS["causal"](T, T)

    def temporaries(backend, **sizes):
        with mesh_of(**sizes) as mesh:
            layout = NamedSharding(mesh, PartitionSpec(None, "sequence"))
            shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32, sharding=layout)
            run = jax.jit(jax.grad(lambda *x: attend(*x, mask, backend=backend)[0].sum(), (0, 1, 2)))
            compiled = run.lower(shape, shape, shape).compile()
            return compiled.memory_analysis(), compiled.as_text()

    memory, text = temporaries("ring", sequence=8)
    one_share = length * 16 * 4 / 8
    assert memory.argument_size_in_bytes == 3 * one_share
    # Chunks that travel, their gradients and sums in float32: shares, and never the whole sequence of anything.
    assert memory.temp_size_in_bytes < 40 * one_share + 4 * loops.BLOCK**2 * 4
    assert "all-gather" not in text and "collective-permute" in text


def test_ulysses_goes_by_all_to_all():
    arrays = inputs()
    with mesh_of(sequence=4) as mesh:
        layout = NamedSharding(mesh, PartitionSpec(None, "sequence"))
        arrays = [jax.device_put(x, layout) for x in arrays]
        text = jax.jit(lambda *x: attend(*x, backend="ulysses")[0]).lower(*arrays).compile().as_text()
    assert "all-to-all" in text and "all-gather" not in text


def test_auto_takes_the_ring_where_the_sequence_lies_apart():
    arrays = inputs()
    with mesh_of(sequence=8):
        text = jax.jit(lambda *x: attend(*x)[0]).lower(*arrays).as_text()
    assert "collective_permute" in text


def test_auto_takes_no_ring_on_a_sequence_axis_of_one_device():
    with mesh_of(data=8, sequence=1):
        text = jax.jit(lambda *x: attend(*x)[0]).lower(*inputs()).as_text()
        assert "collective_permute" not in text and "manual_computation" not in text


@pytest.mark.parametrize("backend", ["ring", "ulysses"])
def test_no_sequence_axis(backend):
    with pytest.raises(BackendError, match="'seq'"):
        attend(*inputs(), backend=backend)
    with mesh_of(data=8), pytest.raises(BackendError, match="'seq'"):
        attend(*inputs(), backend=backend)


def test_what_a_ring_cannot_do_is_said():
    with mesh_of(sequence=8):
        with pytest.raises(BackendError, match="16 chunks"):
            attend(*(x[:, :40] for x in inputs()), backend="ring")
        with pytest.raises(BackendError, match="mask_mod"):
            attend(*inputs(), MASKS["explicit"](T, T), backend="ring")
        with pytest.raises(BackendError, match="heads"):
            attend(*(x[:, :, :1] for x in inputs()), backend="ulysses")
