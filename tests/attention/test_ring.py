"""A sequence over many devices gives what one device gives."""

from __future__ import annotations

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.attention.test_blockwise import MASKS, explicit
from transformer.attention.backends import loops
from transformer.attention.dispatch import BackendError, attend
from transformer.attention.spec.mask import AttentionMask

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


@jax.jit
def truth_of(arrays, mask, slopes):
    return values_and_gradients("reference", arrays, mask, slopes)


# In a ring the other predicates are among those of `test_what_does_not_divide` and of a ring on any number of devices.
MASKS_OF = {
    "ring": ["dilated", "sinks", "global", "prefix", "padding", "block sparse", "mask_mod", "mask_mod with an array"],
    "ulysses": [name for name in MASKS if name != "explicit"],
}


@pytest.mark.parametrize(("backend", "name"), [(backend, name) for backend in MASKS_OF for name in MASKS_OF[backend]])
def test_eight_devices_compute_what_one_does(monkeypatch, backend, name):
    monkeypatch.setattr(loops, "BLOCK", 8)
    slopes, mask = jnp.linspace(0.1, 0.5, N), MASKS[name](T, T)
    truth = truth_of(inputs(), explicit(mask, B, N, T, T), slopes)
    sizes = {"data": 2, "sequence": 4} if backend == "ring" else {"data": 2, "sequence": 2, "tensor": 2}
    with mesh_of(**sizes):
        ours = values_and_gradients(backend, inputs(), mask, slopes)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5, rtol=3e-5), ours, truth)


def outputs(backend, arrays, mask):
    return jax.jit(lambda *arrays: attend(*arrays, mask, backend=backend)[0])(*arrays)


@pytest.mark.parametrize(("backend", "num_kv_heads"), [("ring", 1), ("ulysses", 2)])
def test_shared_key_heads(backend, num_kv_heads):
    arrays, mask = inputs(num_kv_heads), MASKS["causal"](T, T)
    truth = outputs("reference", arrays, mask)
    with mesh_of(data=2, sequence=4):
        np.testing.assert_allclose(outputs(backend, arrays, mask), truth, atol=2e-6)


@pytest.mark.parametrize("devices", [8, 1])
def test_ring_on_any_number_of_devices(devices):
    arrays, mask = inputs(), MASKS["window"](T, T)
    truth = outputs("reference", arrays, mask)
    with mesh_of(sequence=devices):
        np.testing.assert_allclose(outputs("ring", arrays, mask), truth, atol=2e-6)


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
        with pytest.raises(BackendError, match="mask_mod"):
            attend(*inputs(), MASKS["explicit"](T, T), backend="ring")
        with pytest.raises(BackendError, match="heads"):
            attend(*(x[:, :, :1] for x in inputs()), backend="ulysses")


def draw(*shapes):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("backend", "rows", "queries", "keys", "heads", "kv_heads", "name"),
    [
        ("ring", 1, 64, 64, 4, 4, "segments"),
        ("auto", 2, 64, 64, 3, 3, "causal"),
        ("auto", 2, 64, 64, 4, 1, "none"),
        ("ring", 3, 61, 61, 3, 1, "segments"),
        ("auto", 2, 30, 77, 4, 2, "none"),
        ("ring", 2, 30, 77, 4, 2, "segments"),
        ("auto", 1, 9, 5, 4, 4, "causal"),
    ],
)
def test_what_does_not_divide(monkeypatch, backend, rows, queries, keys, heads, kv_heads, name):
    """Rows, heads and a sequence that are no multiple of their devices; by name, and chosen."""
    monkeypatch.setattr(loops, "BLOCK", 8)
    arrays = draw((rows, queries, heads, H), (rows, keys, kv_heads, H), (rows, keys, kv_heads, H))
    slopes = jnp.linspace(0.1, 0.5, heads)
    numbers = jnp.asarray(np.random.default_rng(1).integers(1, 3, (rows, max(queries, keys))))
    mask = AttentionMask.none() if name == "none" else AttentionMask.causal()
    if name == "segments":
        mask &= AttentionMask.segments(jnp.sort(numbers[:, :queries]), jnp.sort(numbers[:, :keys]))
    truth = truth_of(arrays, explicit(mask, rows, heads, queries, keys), slopes)
    with mesh_of(data=2, sequence=2, tensor=2):
        ours = values_and_gradients(backend, arrays, mask, slopes)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5, rtol=3e-5), ours, truth)


def dropped(q, k, v):
    """A sum of the output's sines, and the output, with dropout."""
    key = jax.random.key(0)
    out = attend(q, k, v, AttentionMask.causal(), dropout_rate=0.25, dropout_key=key)[0]
    return jnp.sum(jnp.sin(out)), out


def test_dropout_in_a_ring(monkeypatch):
    """Each weight is dropped or scaled up, by a draw of its own, the same one forwards and backwards."""
    monkeypatch.setattr(loops, "BLOCK", 8)
    length = 64
    q, k = draw((4, length, 2, length), (4, length, 2, length))
    # Of values that are the identity the output is the weights.
    v = jnp.broadcast_to(jnp.eye(length)[:, None], (4, length, 2, length))
    whole = np.asarray(outputs("reference", (q, k, v), AttentionMask.causal()))
    with mesh_of(data=2, sequence=2, tensor=2):
        lowered = jax.jit(jax.value_and_grad(dropped, (0, 1, 2), has_aux=True)).lower(q, k, v)
        run = lowered.compile()
        (_, got), gradient = jax.device_get(run(q, k, v))
        np.testing.assert_array_equal(got, run(q, k, v)[0][1])
        np.testing.assert_array_equal(got, jax.jit(dropped)(q, k, v)[1])
    assert "collective_permute" in lowered.as_text()
    seen = np.broadcast_to(np.tril(np.ones((length, length), bool))[:, None], whole.shape) & (whole > 1e-6)
    kept = got[seen] > 0
    assert abs(kept.mean() - 0.75) < 0.01
    np.testing.assert_allclose(got[seen][kept], whole[seen][kept] / 0.75, rtol=1e-4)
    # No two rows or heads, on whatever devices, have one draw.
    patterns = {(got[b, :, h] > 0).tobytes() for b in range(4) for h in range(2)}
    assert len(patterns) == 8
    # The draw is a constant of the gradient: that of the same weights, multiplied by it.
    factor = jnp.where(got > 0, 1 / 0.75, 0).transpose(0, 2, 1, 3)

    def expected(q, k, v):
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) * length**-0.5
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -1e30))
        return jnp.sum(jnp.sin(jnp.einsum("bnts,bsnh->btnh", weights * factor, v)))

    wanted = jax.jit(jax.grad(expected, (0, 1, 2)))(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-3), gradient, wanted)


def goes_round(function, *arrays):
    return "ppermute" in str(jax.make_jaxpr(function)(*arrays))


OPTIONS = {
    "logit_soft_cap": 5.0, "scale": 0.3, "dropout_rate": 0.1,
    "score_mod": lambda score, b, h, q, k: score - (q - k).astype(score.dtype),
}  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "option"), list(zip([name for name in MASKS if name != "explicit"], itertools.cycle(OPTIONS)))
)
def test_auto_never_leaves_the_ring(mask, option):
    options = {option: OPTIONS[option]}
    if option == "dropout_rate":
        options["dropout_key"] = jax.random.key(0)
    with mesh_of(sequence=4, data=2):
        assert goes_round(lambda *x: attend(*x, MASKS[mask](T, T), **options)[0], *inputs())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bias_BNTS": jnp.zeros((1, 1, T, T))}, "bias: write it as a score_mod.*'blockwise'"),
        ({"mask": MASKS["explicit"](T, T)}, "explicit mask: write it as a mask_mod.*'blockwise'"),
    ],
)
def test_auto_says_what_it_cannot_do_on_a_sequence_that_lies_apart(given, message):
    with mesh_of(sequence=4, data=2):
        with pytest.raises(BackendError, match=message):
            attend(*inputs(), **given)
        # By name it is gathered.
        out = jax.jit(lambda *x: attend(*x, **given, backend="blockwise")[0])(*inputs())
        np.testing.assert_allclose(
            out, jax.jit(lambda *x: attend(*x, **given, backend="reference")[0])(*inputs()), atol=1e-5
        )


def test_a_few_queries_need_no_ring():
    """As in decoding: there is nothing to lay apart."""
    q, k, v = inputs()
    with mesh_of(sequence=4, data=2):
        assert not goes_round(lambda *x: attend(*x, AttentionMask.causal(offset=20))[0], q[:, :1], k, v)
        # Whatever the mask is.
        jax.eval_shape(lambda *x: attend(*x, MASKS["explicit"](1, T))[0], q[:, :1], k, v)
