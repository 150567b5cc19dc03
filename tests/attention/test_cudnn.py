"""What `auto` gives to cuDNN, JAX's function for it accepts, and masks as we do; no GPU is needed to ask it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as kernel
from jax.extend.core import jaxprs_in_params

from transformer.attention.backends import cudnn
from transformer.attention.dispatch import BACKENDS, PREFERENCE, choose_backend, compute_capability
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.mods import Mod
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec, Dropout, Score
from transformer.randomness import seeds_of
from transformer.stack import REMAT_POLICIES

B, T, N, H = 2, 16, 2, 16
causal, window = AttentionMask.causal, AttentionMask.window

MASKS = {
    "none": (AttentionMask.none(), True),
    "causal": (causal(), True),
    "left": (window(left=3), False),
    "right": (window(right=3), False),
    "open": (window(), True),
    "both": (window(left=3, right=2), False),
    "left alone": (window(left=3, right=0), True),
    "right closed": (window(right=0), True),
    "causal, left": (causal() & window(left=3), True),
    "causal, right": (causal() & window(right=3), True),
    "causal, both": (window(left=3, right=2) & causal(), True),
    "causal, itself and the right": (causal() & window(left=0, right=2), True),
    "two windows": (causal() & window(left=3) & window(left=5), True),
    "two windows, one of them closed": (window(left=3, right=2) & window(right=0), True),
    "moved": (causal().shift_queries(1), False),
    "a window moved": (causal() & window(left=3).shift_queries(1), False),
    "dilated": (AttentionMask.dilated(2), False),
    "prefix": (causal() | AttentionMask.prefix(3), False),
    "sinks": (causal() & (window(left=3) | AttentionMask.sinks(2)), False),
    "segments": (causal() & AttentionMask.segments(jnp.ones((B, T), jnp.int32)), False),
    "padding": (AttentionMask.padding(jnp.ones((B, T), bool)), False),
    "explicit": (AttentionMask.explicit(jnp.ones((1, 1, T, T), bool)), False),
    "mod": (AttentionMask.mod(lambda b, h, q, k: q >= k), False),
}


def request(mask=None, *, bias=None, soft_cap=None, mod=None, dropout=None, **changes):
    spec = AttentionSpec(AttentionMask.none() if mask is None else mask, Score(H**-0.5, soft_cap, bias, mod), dropout)
    given = {
        "platform": "gpu", "dtype": jnp.bfloat16, "batch_size": B, "num_queries": T, "num_keys": T, "num_heads": N,
        "num_kv_heads": N, "head_dim": H, "value_dim": H, "spec": spec, "compute_capability": 9.0,
    }  # fmt: skip
    return AttentionShapes(**(given | changes))


@pytest.fixture
def calls(monkeypatch):
    """cuDNN's own arguments, of calls that pass all of JAX's checks."""
    made = []

    function = kernel.dot_product_attention

    def record(query, key, value, **options):
        made.append(options)
        return function(query, key, value, **options)

    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda wanted: True)
    monkeypatch.setattr(kernel, "dot_product_attention", record)
    return made


def trace(request):
    """Forward and backward by `cudnn`, as far as JAX looks at them before it compiles."""
    r = request
    shapes = [(r.batch_size, r.num_queries, r.num_heads, r.head_dim)]
    shapes += [(r.batch_size, r.num_keys, r.num_kv_heads, dim) for dim in (r.head_dim, r.value_dim)]
    jax.eval_shape(
        jax.value_and_grad(lambda q, k, v: cudnn.cudnn(q, k, v, r.spec).astype(jnp.float32).sum(), (0, 1, 2)),
        *[jax.ShapeDtypeStruct(shape, r.dtype) for shape in shapes],
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_keys", [T, T + 8])
def test_each_mask_that_is_accepted_means_the_same_to_cudnn(calls, name, num_keys):
    mask, fits = MASKS[name]
    if num_keys != T:
        windows = ("left", "both", "causal, left", "causal, both", "causal, itself and the right", "left alone")
        fits = fits and name not in (*windows, "two windows", "two windows, one of them closed")
        if name in ("segments", "padding", "explicit"):
            return
    asked = request(mask, num_keys=num_keys)
    reason = BACKENDS["cudnn"].supports(asked)
    assert (reason is None) == fits, reason
    assert choose_backend("auto", asked) == ("cudnn" if fits else "xla")
    if not fits:
        with pytest.raises(ValueError, match="causal|windows need|lengths of packed documents"):
            choose_backend("cudnn", asked)
        return
    trace(asked)
    kind, length = calls[0]["mask_type"], calls[0]["sliding_window_length"]
    assert calls[0].keys() == {"mask_type", "sliding_window_length", "scale", "qkv_layout"}
    queries, keys = np.arange(T)[:, None], np.arange(num_keys)
    allowed = np.ones((T, num_keys), bool)
    # What cuDNN does: up to the query with a causal mask, and of those the last ones; only then has it a window.
    if kind is kernel.MaskType.CAUSAL:
        allowed &= keys <= queries
    assert length is None or kind is kernel.MaskType.CAUSAL
    if length is not None:
        allowed &= queries - keys < length
    ours = mask.materialize(T, num_keys, batch_size=B, num_heads=N)
    ours = True if ours is None else ours[0, 0]
    np.testing.assert_array_equal(allowed, np.broadcast_to(ours, allowed.shape))


def test_a_window_to_the_right_is_refused_by_its_widths():
    with pytest.raises(ValueError, match="this one sees 2 keys on the right"):
        choose_backend("cudnn", request(window(left=3, right=2)))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_keys", [T, T + 8])
def test_xla_means_the_same_too(name, num_keys):
    if num_keys != T and name in ("segments", "padding", "explicit"):
        return
    mask = MASKS[name][0]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, size, N, H)), jnp.float32) for size in (T, num_keys, num_keys))
    spec = AttentionSpec(mask, Score(H**-0.5))
    run = jax.jit(lambda name, *x: BACKENDS[name].attend(*x, spec), static_argnums=0)
    np.testing.assert_allclose(run("xla", q, k, v), run("reference", q, k, v), atol=2e-6)


OTHERS = {
    "float16": ({"dtype": jnp.float16}, "cudnn"),
    "float32": ({"dtype": jnp.float32}, "xla"),
    "heads that share keys": ({"num_heads": 4, "num_kv_heads": 2}, "cudnn"),
    "heads that share one key": ({"num_heads": 4, "num_kv_heads": 1}, "cudnn"),
    "an odd length": ({"num_queries": 15, "num_keys": 15}, "xla"),
    "an odd number of keys": ({"num_keys": 15}, "xla"),
    "one query": ({"num_queries": 1}, "xla"),
    "wide heads": ({"head_dim": 128, "value_dim": 128}, "cudnn"),
    "wider heads": ({"head_dim": 256, "value_dim": 256}, "cudnn"),
    "wider heads on an A100": ({"head_dim": 256, "value_dim": 256, "compute_capability": 8.0}, "xla"),
    "an A100": ({"compute_capability": 8.0}, "cudnn"),
    "a V100": ({"compute_capability": 7.0}, "xla"),
    "heads that are too wide": ({"head_dim": 264, "value_dim": 264}, "xla"),
    "heads of no multiple of 8": ({"head_dim": 12, "value_dim": 12}, "xla"),
    "values of another width": ({"value_dim": 8}, "blockwise"),
    "bias": ({"bias": jnp.zeros((1, 1, T, T), jnp.bfloat16)}, "xla"),
    "soft cap": ({"soft_cap": 5.0}, "blockwise"),
    "score_mod": ({"mod": Mod.score(lambda s, b, h, q, k: s, jnp.float32)}, "blockwise"),
    "dropout": ({"dropout": Dropout(seeds_of(jax.random.key(0), 2), 0.1)}, "blockwise"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_decides(calls, name):
    changes, expected = OTHERS[name]
    asked = request(**changes)
    assert choose_backend("auto", asked) == expected
    assert (BACKENDS["cudnn"].supports(asked) is None) == (expected == "cudnn")
    if expected == "cudnn":
        trace(asked)
        assert len(calls) >= 1
    assert PREFERENCE["gpu"][0] == "cudnn"


PACKED = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0], [1] * 16, [1] * 5 + [2] * 11, [0] * 16])
LENGTHS = np.array([[3, 2, 5, 0], [16, 0, 0, 0], [5, 11, 0, 0], [0, 0, 0, 0]], np.int32)


def packed(lengths=LENGTHS):
    return AttentionMask.segments(jnp.asarray(PACKED), lengths_BM=jnp.asarray(lengths))


def between(q_lengths, k_lengths):
    """Of queries to keys with documents of their own, whatever they are."""
    ids = jnp.asarray(PACKED)
    return AttentionMask.segments(ids, ids, lengths_BM=jnp.asarray(q_lengths), k_lengths_BM=jnp.asarray(k_lengths))


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 11, 2)])
def test_keys_that_heads_share_are_repeated_where_jax_miscounts_their_offsets(calls, monkeypatch, version):
    monkeypatch.setattr(jax, "__version_info__", version)
    heads = {}

    def look(query, key, value, **options):
        heads.update(q=query.shape[2], k=key.shape[2], v=value.shape[2])
        return query

    monkeypatch.setattr(kernel, "dot_product_attention", look)
    spec = AttentionSpec(causal() & packed(), Score(H**-0.5))
    q, k = (jax.ShapeDtypeStruct((4, T, heads, H), jnp.bfloat16) for heads in (4, 2))
    jax.eval_shape(lambda q, k, v: cudnn.cudnn(q, k, v, spec), q, k, k)
    assert heads == ({"q": 4, "k": 4, "v": 4} if version < (0, 11) else {"q": 4, "k": 2, "v": 2})


def test_lengths_of_one_row_are_those_of_all(calls):
    mask = AttentionMask.segments(jnp.asarray(PACKED[:1]), lengths_BM=jnp.asarray(LENGTHS[:1]))
    asked = request(causal() & mask, batch_size=4)
    assert choose_backend("auto", asked) == "cudnn"
    trace(asked)
    assert calls[0]["q_seqlen"].shape == (4, 4)


def test_packed_documents_are_the_same_to_cudnn(calls):
    """Each begins where it should; the kernel is told of none that is empty, and of one in every row."""
    asked = request(causal() & packed(), batch_size=4)
    assert choose_backend("auto", asked) == "cudnn"
    seen = {}

    def look(q, k, v):
        out = cudnn.cudnn(q, k, v, asked.spec)
        seen.update(calls[-1])
        return out

    jax.eval_shape(look, *[jax.ShapeDtypeStruct((4, T, N, H), jnp.bfloat16)] * 3)
    assert seen["mask_type"] is kernel.MaskType.PADDING_CAUSAL
    assert seen["q_seqlen"].shape == (4, 4) and seen["q_offsets"].shape == (4, 5)
    lengths = np.asarray(cudnn._some(jnp.asarray(LENGTHS)))
    np.testing.assert_array_equal(lengths[3], [1, 0, 0, 0])
    starts = np.asarray(cudnn._starts(jnp.asarray(lengths)))
    np.testing.assert_array_equal(
        starts, [[0, 3, 5, -1, -1], [0, -1, -1, -1, -1], [0, 5, -1, -1, -1], [0, -1, -1, -1, -1]]
    )
    for row in range(3):
        for start, length, number in zip(starts[row], LENGTHS[row], range(1, 5), strict=False):
            np.testing.assert_array_equal(
                np.flatnonzero(PACKED[row] == number), np.arange(start, start + length) if length else []
            )


@pytest.mark.parametrize("num_documents", [1, 4])
def test_what_the_kernel_leaves_unwritten_is_zero(monkeypatch, num_documents):
    """It writes neither outputs nor gradients of positions that belong to no document: whatever is there must not be seen."""
    lengths = LENGTHS if num_documents > 1 else LENGTHS.sum(1, keepdims=True)
    mask = packed(lengths)
    covered = np.arange(T) < LENGTHS.sum(1, keepdims=True)

    @jax.custom_vjp
    def leaves(x):
        return x

    def wild(x):
        return jnp.where(covered[..., None, None], x, jnp.nan)

    leaves.defvjp(lambda x: (wild(x), None), lambda _, dx: (wild(dx),))

    def kernel_of_nan(query, key, value, **_):
        return leaves(leaves(query) + leaves(key) + leaves(value))

    monkeypatch.setattr(kernel, "dot_product_attention", kernel_of_nan)
    spec = AttentionSpec(mask, Score(H**-0.5))
    arrays = [jnp.ones((4, T, N, H), jnp.bfloat16)] * 3
    run = jax.value_and_grad(lambda *x: cudnn.cudnn(*x, spec).astype(jnp.float32).sum(), (0, 1, 2))
    value, gradients = jax.jit(run)(*arrays)
    assert float(value) == 3 * covered.sum() * N * H
    for gradient in gradients:
        np.testing.assert_array_equal(
            gradient.astype(jnp.float32), np.broadcast_to(covered[..., None, None], gradient.shape)
        )


@pytest.mark.parametrize(
    ("mask", "changes", "expected"),
    [
        (packed(), {"compute_capability": 8.0}, "a GPU of the Hopper generation or newer for packed documents"),
        (packed(LENGTHS.sum(1, keepdims=True)), {"compute_capability": 8.0}, None),
        (packed(), {}, None),
        (causal() & packed() & window(left=3), {}, "no window within packed or padded rows"),
        (packed() & packed(), {}, "this mask has several"),
        (packed(np.pad(LENGTHS, ((0, 0), (0, 60)))), {}, "with more than 48 documents in a row, and there is room for 64"),
        (between(LENGTHS, LENGTHS), {}, "only if queries and keys have the same ones"),
        (between(LENGTHS.sum(1, keepdims=True), LENGTHS.sum(1, keepdims=True) - 1), {}, None),
    ],
)  # fmt: skip
def test_which_packed_rows_it_takes(mask, changes, expected):
    reason = BACKENDS["cudnn"].supports(request(mask, batch_size=4, **changes))
    assert reason is None if expected is None else expected in reason


def test_large_arrays_of_weights_are_avoided():
    """Counted over the rows and heads of a device, not by the length alone."""
    small, large = (
        request(dtype=jnp.float32, batch_size=rows, num_queries=1024, num_keys=1024, num_heads=16) for rows in (1, 2)
    )
    assert choose_backend("auto", small) == "xla"
    assert choose_backend("auto", large) != "xla"
    assert choose_backend("auto", dataclasses.replace(large, devices=2)) == "xla"
    assert choose_backend("xla", large) == "xla"


@pytest.mark.parametrize(
    ("kind", "expected"), [("NVIDIA H100 80GB HBM3", 9.0), ("NVIDIA A100-SXM4-80GB", 8.0), ("cpu", 0.0)]
)
def test_the_compute_capability_of_an_absent_gpu_is_known_by_its_name(monkeypatch, kind, expected):
    class Mesh:
        abstract_device = type("Device", (), {"device_kind": kind})

    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", Mesh)
    assert compute_capability() == expected


def counted(jaxpr, name):
    """How often an operation is in a program, whatever it is within."""
    inner = [sub for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    return sum(equation.primitive.name == name for equation in jaxpr.eqns) + sum(counted(sub, name) for sub in inner)


@pytest.mark.parametrize(("policy", "times"), [("light", 1), ("full", 2)])
def test_light_rematerialisation_does_not_run_the_kernel_twice(calls, policy, times):
    asked = request(causal() & packed(), batch_size=4)
    arrays = [jax.ShapeDtypeStruct((4, T, N, H), jnp.bfloat16)] * 3

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES[policy])
    def block(q, k, v):
        return jnp.sin(cudnn.cudnn(jnp.cos(q), k, v, asked.spec))

    run = jax.grad(lambda *x: block(*x).astype(jnp.float32).sum(), (0, 1, 2))
    assert counted(jax.make_jaxpr(run)(*arrays).jaxpr, "dot_product_attention_fwd_wrapper") == times
