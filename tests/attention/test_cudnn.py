"""What `auto` gives to cuDNN, `jax.nn.dot_product_attention` accepts, and masks as we do; no GPU is needed to ask it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as kernel

from transformer.attention.backends import fused
from transformer.attention.dispatch import BACKENDS, PREFERENCE, choose_backend
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.mods import Mod
from transformer.attention.spec.shapes import AttentionShapes
from transformer.attention.spec.spec import AttentionSpec, Dropout, Score
from transformer.randomness import seeds_of

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
    "two windows": (causal() & window(left=3) & window(left=5), False),
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
        "num_kv_heads": N, "head_dim": H, "value_dim": H, "spec": spec,
    }  # fmt: skip
    return AttentionShapes(**(given | changes))


@pytest.fixture
def calls(monkeypatch):
    """cuDNN's own arguments, of calls that pass all of JAX's checks."""
    made = []

    def record(query, key, value, bias=None, mask=None, *args, **options):
        made.append((bias, mask, options["mask_type"], options["sliding_window_length"]))
        return kernel.dot_product_attention(query, key, value, bias, mask, *args, **options)

    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr("jax._src.nn.functions.cudnn_dot_product_attention", record)
    return made


def trace(request):
    """Forward and backward by `fused`, as far as JAX looks at them before it compiles."""
    r = request
    shapes = [(r.batch_size, r.num_queries, r.num_heads, r.head_dim)]
    shapes += [(r.batch_size, r.num_keys, r.num_kv_heads, dim) for dim in (r.head_dim, r.value_dim)]
    run = functools.partial(fused.fused, implementation="cudnn")
    jax.eval_shape(
        jax.value_and_grad(lambda q, k, v: run(q, k, v, r.spec).astype(jnp.float32).sum(), (0, 1, 2)),
        *[jax.ShapeDtypeStruct(shape, r.dtype) for shape in shapes],
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_keys", [T, T + 8])
def test_each_mask_that_is_accepted_means_the_same_to_cudnn(calls, name, num_keys):
    mask, fits = MASKS[name]
    if num_keys != T:
        windows = ("left", "both", "causal, left", "causal, both", "causal, itself and the right", "left alone")
        fits = fits and name not in (*windows, "two windows, one of them closed")
        if name in ("segments", "padding", "explicit"):
            return
    asked = request(mask, num_keys=num_keys)
    reason = BACKENDS["cudnn"].supports(asked)
    assert (reason is None) == fits, reason
    assert choose_backend("auto", asked) == ("cudnn" if fits else "xla")
    if not fits:
        with pytest.raises(ValueError, match="causal"):
            choose_backend("cudnn", asked)
        return
    trace(asked)
    (bias, array, kind, length), *_ = calls
    assert bias is None and array is None
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
    with pytest.raises(ValueError, match="left=3, right=2"):
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
    "wider heads": ({"head_dim": 136, "value_dim": 136}, "xla"),
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
