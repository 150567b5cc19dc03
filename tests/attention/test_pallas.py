"""JAX's own kernels, interpreted: they compute what the equation says, on one device and on eight."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from benchmarks.attention import ahead
from transformer.attention.backends import pallas
from transformer.attention.backends.pallas import Band, pallas_interpret, supports_pallas
from transformer.attention.backends.reference import reference
from transformer.attention.dispatch import BackendError, attend, choose_backend
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.mods import Mod
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec, Dropout, Score
from transformer.randomness import seeds_of

B, N, H = 2, 4, 8
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling takes nearly all of the time here."""


def documents(length):
    """Two packed rows, one of them with padding behind."""
    row = jnp.arange(length)
    return jnp.stack([1 + row // 13, jnp.where(row < length - 7, 1 + row // 20, 0)]).astype(jnp.int32)


def packed(length):
    return AttentionMask.causal() & AttentionMask.segments(documents(length))


MASKS = {
    "none": lambda T: AttentionMask.none(),
    "causal": lambda T: AttentionMask.causal(),
    "packed": packed,
    "packed, both ways": lambda T: AttentionMask.segments(documents(T)),
    "window": lambda T: AttentionMask.causal() & AttentionMask.window(left=9),
    # Row 0 sees nothing at all.
    "padding": lambda T: AttentionMask.padding(jnp.arange(T) < jnp.array([[0], [T - 5]])),
}
ON_GPU = ("none", "causal", "packed", "packed, both ways")
CASES = [
    # Every mask with every number of key/value heads; every mask and every number with a soft-cap and without.
    *(("tpu", name, K, (2.0, None)[(i + j) % 2]) for i, name in enumerate(MASKS) for j, K in enumerate((4, 2, 1))),
    *(("gpu", name, K, None) for name in ON_GPU for K in ((4, 2, 1) if name == "packed" else (2,))),
]


def inputs(T, S=None, num_kv_heads=2, value_dim=H, dtype=jnp.float32, batch=B):
    rng = np.random.default_rng(0)
    S = T if S is None else S
    shapes = ((batch, T, N, H), (batch, S, num_kv_heads, H), (batch, S, num_kv_heads, value_dim))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def values_and_gradients(function, arrays, mask, score, options=None):
    def run(arrays):
        def loss(arrays):
            out = function(*arrays, AttentionSpec(mask, score))
            wide = out.astype(jnp.float32)
            return jnp.sum(jnp.sin(wide) * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return out, gradients

    return jax.jit(run).lower(arrays).compile(compiler_options=options)(arrays)


def compare(platform, arrays, mask, score=None, atol=2e-5):
    score = Score(0.3) if score is None else score
    interpreted = functools.partial(pallas_interpret, platform=platform)
    ours = values_and_gradients(interpreted, arrays, mask, score, QUICK)
    truth = values_and_gradients(reference, arrays, mask, score, QUICK)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), *jax.tree.map(in_float32, (ours, truth)))
    return ours


def in_float32(x):
    return np.asarray(x, np.float32)


@pytest.mark.parametrize(("platform", "name", "num_kv_heads", "soft_cap"), CASES)
def test_values_and_gradients(platform, name, num_kv_heads, soft_cap):
    compare(platform, inputs(40, num_kv_heads=num_kv_heads), MASKS[name](40), Score(0.3, soft_cap))


@pytest.mark.parametrize(
    ("T", "S", "mask"),
    [
        # Blocks on both sides of the band that are never touched.
        (300, 300, AttentionMask.window(left=20, right=30)),
        # Fewer queries than keys and more of them: whole blocks of keys that nothing sees, of queries that see nothing.
        (130, 400, AttentionMask.window(left=10, right=10).shift_queries(150)),
        (400, 130, AttentionMask.causal(-3) & AttentionMask.window(left=60)),
    ],
)
def test_bands_over_several_blocks(monkeypatch, T, S, mask):
    monkeypatch.setattr(pallas, "TPU_BLOCKS", (128,))
    compare("tpu", inputs(T, S), mask)


def test_segments_of_their_own_for_keys_and_other_widths_of_values():
    q_ids, k_ids = documents(40), documents(60)[::-1]
    mask = AttentionMask.segments(q_ids, k_ids) & AttentionMask.prefix(jnp.array([30, 50]))
    compare("tpu", inputs(40, 60, value_dim=12), mask, Score(-1.7, 3.0))


def test_several_blocks_of_the_gpu_kernel():
    compare("gpu", inputs(150), packed(150), Score(-1.7))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_bfloat16(platform):
    out, gradients = compare(platform, inputs(40, dtype=jnp.bfloat16), packed(40), atol=4e-2)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(jnp.bfloat16)}


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradients():
    for mask in (AttentionMask.padding(jnp.zeros((B, 40), bool)), AttentionMask.causal(-40)):
        out, gradients = values_and_gradients(
            functools.partial(pallas_interpret, platform="tpu"), inputs(40), mask, Score(0.3), QUICK
        )
        assert not any(np.any(x) for x in (out, *gradients))


def test_the_gpu_kernel_gives_zeros_in_padding():
    out, (dq, dk, dv) = compare("gpu", inputs(40), packed(40))
    assert not any(np.any(x[1, 33:]) for x in (out, dq, dk, dv))


@contextlib.contextmanager
def mesh_of(**sizes):
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    rules = (("batch", "data"), ("heads", "tensor"), ("kv_heads", "tensor"))
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        yield


@pytest.mark.parametrize(
    ("platform", "num_kv_heads", "batch"),
    # As many key/value heads as devices along the heads, fewer of them, and a batch that does not divide.
    [("tpu", 4, 2), ("tpu", 2, 3), ("gpu", 2, 2)],
)
def test_eight_devices_compute_what_one_does(platform, num_kv_heads, batch):
    arrays = inputs(40, num_kv_heads=num_kv_heads, batch=batch)
    mask = AttentionMask.causal() & AttentionMask.segments(jnp.resize(documents(40), (batch, 40)))
    interpreted = functools.partial(pallas_interpret, platform=platform)
    truth = values_and_gradients(reference, arrays, mask, Score(0.3), QUICK)
    with mesh_of(data=2, tensor=4):
        ours = values_and_gradients(interpreted, arrays, mask, Score(0.3), QUICK)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), ours, truth)


def test_each_device_gets_its_share():
    arrays = inputs(128)
    with mesh_of(data=2, tensor=2):
        run = jax.jit(lambda *x: pallas_interpret(*x, AttentionSpec(packed(128), Score(0.3)), platform="gpu"))
        text = run.lower(*arrays).as_text()
    # Of a batch of two and four heads.
    assert "tensor<1x128x2x8xf32>" in text


def request(mask=None, score=None, dropout=None, **changes):
    mask = AttentionMask.causal() if mask is None else mask
    defaults = {
        "platform": "tpu", "dtype": jnp.bfloat16, "batch_size": 2,
        "num_queries": 256, "num_keys": 256, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 64, "value_dim": 64, "compute_capability": 8.0, "spec": AttentionSpec(mask, score or Score(0.125), dropout),
    }  # fmt: skip
    return AttentionShapes(**(defaults | changes))


IDS = jnp.ones((1, 256), jnp.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": jnp.float32, "head_dim": 192, "value_dim": 128, "num_keys": 131},
        {"score": Score(0.1, 30.0)},
        {"mask": AttentionMask.causal(4) & AttentionMask.window(left=3) & AttentionMask.padding(IDS > 0)},
        {"mask": AttentionMask.segments(IDS, IDS + 1) & AttentionMask.prefix(7)},
        {"platform": "gpu"},
        {"platform": "gpu", "dtype": jnp.float16, "mask": AttentionMask.segments(IDS), "num_queries": 9, "num_keys": 9},
    ],
)
def test_supports(changes):
    assert supports_pallas(request(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "cpu"}, "kernels for GPUs and TPUs, and this is cpu"),
        ({"dropout": Dropout(seeds_of(jax.random.key(0), 2), 0.1)}, "no dropout"),
        ({"score": Score(0.1, bias_BNTS=jnp.zeros((1, 1, 1, 1)))}, "no bias"),
        ({"score": Score(0.1, mod=Mod.score(lambda s, b, h, q, k: s, jnp.float32))}, "no score_mod"),
        ({"mask": AttentionMask.explicit(jnp.ones((1, 1, 256, 256), bool))}, "this one has Explicit"),
        ({"mask": AttentionMask.window(left=9) | AttentionMask.sinks(1)}, "this one has Either"),
        ({"mask": AttentionMask.causal(jnp.array([3]))}, "offset as a plain number"),
        ({"mask": AttentionMask.segments(IDS) & AttentionMask.segments(IDS)}, "has several"),
        ({"dtype": jnp.float16}, "bfloat16 or float32 on a TPU, and q is"),
        ({"num_queries": 64}, "at least 128 positions, and 64"),
        ({"num_keys": 64}, "at least 128 positions, and 64"),
        ({"platform": "gpu", "dtype": jnp.float32}, "bfloat16 or float16 on a GPU, and q is"),
        ({"platform": "gpu", "score": Score(0.1, 30.0)}, "no logit soft-cap"),
        ({"platform": "gpu", "value_dim": 32}, "they are 32 and 64"),
        ({"platform": "gpu", "head_dim": 320, "value_dim": 320}, "at most 256, and this is 320"),
        ({"platform": "gpu", "num_keys": 512}, "there are 512 and 256"),
        ({"platform": "gpu", "mask": AttentionMask.window(left=8)}, "no window"),
        ({"platform": "gpu", "mask": AttentionMask.causal(2)}, "without an offset"),
        ({"platform": "gpu", "mask": AttentionMask.padding(IDS > 0)}, "does not support padding masks"),
        ({"platform": "gpu", "mask": AttentionMask.segments(IDS, IDS + 0)}, "one array of segment numbers"),
    ],
)
def test_reasons(changes, reason):
    given = supports_pallas(request(**changes))
    assert given is not None and reason in given
    with pytest.raises(BackendError, match="'pallas' cannot do this"):
        choose_backend("pallas", request(**changes))


def test_a_jax_without_the_gpu_kernel(monkeypatch):
    monkeypatch.setattr(pallas, "_gpu_kernel", lambda: None)
    assert "no longer ships" in str(supports_pallas(request(platform="gpu")))
    assert supports_pallas(request()) is None


def test_auto_takes_it_on_a_tpu():
    assert choose_backend("auto", request()) == "pallas"
    assert choose_backend("auto", request(num_queries=1)) == "xla"
    # On a GPU where cuDNN has no packed documents, and the array of all weights is large.
    long = request(platform="gpu", num_queries=8192, num_keys=8192, mask=packed(8))
    assert choose_backend("auto", long) == "pallas"
    assert choose_backend("auto", dataclasses.replace(long, compute_capability=7.5)) == "blockwise"


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(BackendError, match="pallas.*this is cpu"):
        attend(*inputs(8), backend="pallas")
    with pytest.raises(ValueError, match="this is cpu"):
        pallas_interpret(*inputs(8), AttentionSpec(AttentionMask.none(), Score(1.0)), platform="cpu")
    score = Score(1.0, bias_BNTS=jnp.zeros((1, 1, 1, 1)))
    with pytest.raises(ValueError, match="no bias"):
        pallas_interpret(*inputs(8), AttentionSpec(AttentionMask.none(), score), platform="tpu")


def test_a_band_is_what_all_terms_leave():
    mask = (
        AttentionMask.causal(2) & AttentionMask.window(left=5) & AttentionMask.window(left=7, right=1).shift_queries(3)
    )
    assert Band.of(mask) == Band(4, 2)
    assert Band.of(AttentionMask.padding(IDS > 0)) == Band()
    assert Band(2, -3).is_empty(9, 9) and Band(None, -9).is_empty(9, 9) and Band(-9, None).is_empty(9, 9)
    assert not Band(0, 0).is_empty(9, 9) and not Band().is_empty(1, 1)


@pytest.mark.parametrize(
    ("length", "block"), [(1, 128), (128, 128), (250, 256), (300, 128), (640, 128), (1920, 512), (4096, 512)]
)
def test_a_block_pads_little(length, block):
    assert pallas._tpu_block(length) == block


def test_compiling_ahead_gives_a_reason_where_it_cannot():
    assert "cannot be started" in ahead.compile_ahead("tpu", python="no-such-python")
    assert ahead.compile_ahead("gpu", python="false") == "it ended with status 1 and no answer"
    with pytest.raises(ValueError, match="allowed: tpu, gpu"):
        ahead.compile_ahead("cpu")
