"""Blocks written out and blocks in loops compute what the equation says, for every mask, score and length."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from transformer.attention.backends import blockwise, loops
from transformer.attention.dispatch import attend
from transformer.attention.spec.mask import AttentionMask
from transformer.attention.spec.tile import Blocks, Grid, Span

B, N, K, H, C = 2, 4, 2, 8, 6
LENGTHS = [(1, 1), (1, 40), (33, 17), (40, 1)]

MASKS = {
    "none": lambda T, S: AttentionMask.none(),
    "causal": lambda T, S: AttentionMask.causal(),
    "window": lambda T, S: AttentionMask.causal() & AttentionMask.window(left=5),
    "two-sided window": lambda T, S: AttentionMask.window(left=3, right=2),
    "dilated": lambda T, S: AttentionMask.causal() & AttentionMask.window(left=12) & AttentionMask.dilated(3),
    "sinks": lambda T, S: AttentionMask.causal() & (AttentionMask.window(left=4) | AttentionMask.sinks(2)),
    "global": lambda T, S: AttentionMask.window(2, 2) | AttentionMask.global_tokens(3),
    "prefix": lambda T, S: AttentionMask.causal() | AttentionMask.prefix(jnp.array([3, 7])),
    "padding": lambda T, S: AttentionMask.padding(jnp.arange(S) < jnp.array([[S // 2], [S]])),
    "segments": lambda T, S: (
        AttentionMask.causal() & AttentionMask.segments(_segments(T), _segments(S))
    ),
    "explicit": lambda T, S: AttentionMask.explicit(jnp.array(np.random.default_rng(1).random((B, N, T, S)) > 0.5)),
    "block sparse": lambda T, S: AttentionMask.block_sparse(jnp.array(np.random.default_rng(2).random((5, 5)) > 0.5), 8),
    "mask_mod": lambda T, S: AttentionMask.mod(lambda b, h, q, k: (q >= k) & (k % 3 != h) & (q - k < 9 + b)),
    "mask_mod with an array": lambda T, S: AttentionMask.mod(_by_document(T, S)),
}  # fmt: skip


def _segments(length):
    row = jnp.arange(length)
    return jnp.stack([1 + row // 7, jnp.where(row < length - length // 4, 1 + row // 20, 0)]).astype(jnp.int32)


def _by_document(T, S):
    documents = _segments(max(T, S))
    return lambda b, h, q, k: documents[b, q] == documents[b, k]


def inputs(T, S, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, C))]


def explicit(mask, rows, heads, queries, keys):
    """The same pairs as an array, so that the truth of all masks is one program."""
    seen = mask.materialize(queries, keys, batch_size=rows, num_heads=heads)
    shape = (rows, heads, queries, keys)
    return AttentionMask.explicit(jnp.ones(shape, bool) if seen is None else jnp.broadcast_to(seen, shape))


WAYS = ["written out", "looped"]


@pytest.fixture(params=WAYS)
def small_blocks(request, monkeypatch):
    """Blocks of which even short lengths need several."""
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    monkeypatch.setattr(loops, "BLOCK", 16)
    if request.param == "looped":
        monkeypatch.setattr(blockwise, "MAX_BLOCKS", 0)
    return request.param


def values_and_gradients(backend, arrays, mask, learned=(), options=()):
    def loss(arrays, learned):
        made = {name: make(*learned) for name, make in options}
        out = attend(*arrays, mask, backend=backend, **made)[0]
        return jnp.sum(
            jnp.sin(out.astype(jnp.float32)) * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        ), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(arrays, learned)


@functools.partial(jax.jit, static_argnames="options")
def truth_of(arrays, mask, learned, options):
    return values_and_gradients("reference", arrays, mask, learned, options)


def compare(arrays, mask, learned=(), options=()):
    """With options (name, function of what is learned)."""
    ours = values_and_gradients("blockwise", arrays, mask, learned, options)
    queries, keys = arrays[0].shape[1], arrays[1].shape[1]
    truth = truth_of(arrays, explicit(mask, B, N, queries, keys), learned, options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-5), ours, truth)


# The tests below have these in loops.
ELSEWHERE = ("none", "causal", "window", "two-sided window")


@pytest.mark.parametrize(
    ("small_blocks", "name"),
    [(way, name) for way in WAYS for name in MASKS if way == "written out" or name not in ELSEWHERE],
    indirect=["small_blocks"],
)
def test_every_mask(small_blocks, name):
    compare(inputs(40, 40), MASKS[name](40, 40))


@pytest.mark.parametrize(
    ("small_blocks", "T", "S", "name"),
    [
        (way, *lengths, ("none", "padding")[(turn + place) % 2])
        for turn, way in enumerate(WAYS)
        for place, lengths in enumerate(LENGTHS)
    ],
    indirect=["small_blocks"],
)
def test_lengths_that_no_block_divides(small_blocks, T, S, name):
    window = MASKS["two-sided window"](T, S)
    compare(inputs(T, S), AttentionMask.none() if name == "none" else MASKS["padding"](T, S) & window)


def near_and_far(slopes, table):
    far = jnp.array([3, 5, 7, 9])
    return lambda score, b, h, q, k: jnp.where(
        q - k < far[h], score - slopes[h] * jnp.abs(q - k).astype(score.dtype), score * table[q - k + 40]
    )


def test_a_score_mod_and_what_it_learns(small_blocks):
    learned = jnp.linspace(0.1, 0.5, N), jnp.sin(jnp.arange(80.0))
    compare(inputs(40, 40), AttentionMask.causal(), learned, (("score_mod", near_and_far),))


BIAS = (("bias_BNTS", lambda bias: bias), ("logit_soft_cap", lambda bias: 5.0))


@pytest.mark.parametrize(
    ("small_blocks", "shape"),
    [
        ("written out", (B, N, 40, 40)), ("written out", (1, 1, 40, 1)),
        ("looped", (1, N, 40, 40)), ("looped", (B, 1, 1, 40)), ("looped", (1, 1, 40, 1)),
    ],
    indirect=["small_blocks"],
)  # fmt: skip
def test_bias_and_its_gradient(small_blocks, shape):
    bias = jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)
    compare(inputs(40, 40), MASKS["window"](40, 40), (bias,), BIAS)


def test_dropout_drops_the_same_weights_in_both_passes(small_blocks):
    """Dropout makes the output linear in v with a fixed matrix: its gradient is that matrix's transpose."""
    q, k, v = inputs(40, 40)

    @jax.jit
    def both(v):
        def run(v):
            key = jax.random.key(1)
            return attend(q, k, v, AttentionMask.causal(), backend="blockwise", dropout_rate=0.5, dropout_key=key)[0]

        out, pull = jax.vjp(run, v)
        return out, jnp.cos(out), pull(jnp.cos(out))[0], attend(q, k, v, AttentionMask.causal())[0]

    out, dout, dv, plain = jax.device_get(both(v))
    np.testing.assert_allclose(np.vdot(out, dout), np.vdot(v, dv), rtol=1e-4)
    assert not np.allclose(out, plain, atol=1e-2)


def test_dropout_keeps_the_mean_and_gives_true_gradients(small_blocks):
    q, k, v = (x[:1, :20, :2] for x in inputs(20, 20))

    @jax.jit
    def run(q, seed):
        key = jax.random.key(seed)
        return attend(q, k, v, backend="blockwise", dropout_rate=0.3, dropout_key=key)[0]

    plain = jax.jit(attend)(q, k, v)[0]
    mean = jax.jit(lambda: jnp.mean(jax.vmap(lambda seed: run(q, seed))(jnp.arange(2000)), axis=0))()
    np.testing.assert_allclose(mean, plain, atol=0.06)
    check_grads(lambda q: run(jnp.asarray(q), 0), (q,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_large_logits_and_rows_without_a_key(small_blocks):
    q, k, v = inputs(40, 40)
    mask = AttentionMask.explicit((jnp.arange(40) % 5 != 0)[None, None, :, None] & jnp.ones((1, 1, 40, 40), bool))
    (_, out), gradients = values_and_gradients("blockwise", [q * 1e4, k * 1e4, v], mask)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, gradients)))
    assert not np.any(out[:, ::5])


def test_a_program_for_many_queries_has_no_array_of_all_pairs():
    T = 8192
    shape = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)

    def loss(q, k, v):
        return attend(q, k, v, AttentionMask.causal(), backend="blockwise")[0].sum()

    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < T * T * 4 / 10


@pytest.mark.parametrize("name", MASKS)
def test_a_tile_that_is_called_empty_is_empty(name):
    mask = MASKS[name](40, 40).padded(48, 48)
    visible = np.asarray(mask.visible(Grid(Span(0, B), Span(0, N), Blocks(16, 3), Blocks(8, 6))))
    assert visible.shape == (3, 6)
    assert np.all(visible >= some_allowed(mask, 16, 8))


def some_allowed(mask, queries, keys):
    """Of each tile of so many queries and keys, out of 48, whether any pair is allowed in it."""
    allowed = np.asarray(explicit(mask, B, N, 48, 48).materialize(48, 48)).any((0, 1))
    return allowed.reshape(48 // queries, queries, 48 // keys, keys).any((1, 3))


@pytest.mark.parametrize("name", ["causal", "window", "two-sided window", "mask_mod", "block sparse", "segments"])
def test_empty_tiles_are_found(name):
    mask = MASKS[name](40, 40).padded(48, 48)
    grid = Grid(Span(0, B), Span(0, N), Blocks(8, 6), Blocks(8, 6))
    visible = np.asarray(mask.visible(grid))
    # Never a tile too few; for masks of positions alone, none too many.
    assert np.all(visible >= some_allowed(mask, 8, 8))
    assert not visible.all()


def test_a_mod_that_gives_no_boolean_or_no_number_is_refused():
    with pytest.raises(ValueError, match="mask_mod"):
        AttentionMask.mod(lambda b, h, q, k: jnp.ones(3, bool))
    with pytest.raises(ValueError, match="score_mod"):
        attend(*inputs(4, 4), score_mod=lambda score, b, h, q, k: q)
