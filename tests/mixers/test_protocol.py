"""What every sequence mixer owes: one call, one state, and the same result however a sequence reaches it."""

from __future__ import annotations

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.changed import built
from transformer.attention.spec.mask import AttentionMask
from transformer.errors import ConfigError
from transformer.hooks import Hooks
from transformer.layers.position import AlibiConfig, RotaryConfig, RotaryScaling
from transformer.layers.relative_embedding import RelativeEmbedding
from transformer.mixers.context import Context
from transformer.mixers.differential import DifferentialConfig
from transformer.mixers.disentangled import DisentangledConfig
from transformer.mixers.fast_weights import FastWeightConfig
from transformer.mixers.latent import LatentConfig
from transformer.mixers.linear import LinearAttentionConfig
from transformer.mixers.lstmn import LSTMNConfig
from transformer.mixers.registry import MIXERS, MixerConfig, make_mixer
from transformer.mixers.softmax import SoftmaxConfig
from transformer.mixers.state import MatrixState

B, T, D, N = 2, 11, 32, 4
YARN = RotaryScaling(kind="yarn", factor=4.0, original_length=8, fast_turns=4.0)
CONFIGS = {
    "softmax": SoftmaxConfig(num_heads=N, num_kv_heads=2),
    "softmax, rotary": SoftmaxConfig(num_heads=N, num_kv_heads=1, position=RotaryConfig(theta=100.0), qk_norm=True),
    "softmax, yarn": SoftmaxConfig(num_heads=N, position=RotaryConfig(theta=100.0, scaling=YARN, fraction=0.5)),
    "softmax, alibi": SoftmaxConfig(num_heads=N, position=AlibiConfig()),
    "softmax, window": SoftmaxConfig(num_heads=N, window=3, sinks=2, soft_cap=5.0),
    "latent": LatentConfig(num_heads=N),
    "latent, window": LatentConfig(
        num_heads=N, latent_dim=6, query_latent_dim=10, rotary_dim=4, window=4, scaling=YARN
    ),
    "differential": DifferentialConfig(num_heads=2),
    "differential, rotary": DifferentialConfig(
        num_heads=2, num_kv_heads=1, position=RotaryConfig(theta=100.0), window=4
    ),
    "differential, alibi": DifferentialConfig(num_heads=2, position=AlibiConfig()),
    "disentangled, own projections": DisentangledConfig(
        num_heads=N, share_projections=False, position_to_content=False
    ),
    "disentangled": DisentangledConfig(num_heads=N),
    "linear": LinearAttentionConfig(num_heads=N, num_kv_heads=2, chunk=4),
    "linear, favor": LinearAttentionConfig(num_heads=N, feature_map="favor", chunk=5),
    "sum": FastWeightConfig(kind="sum", num_heads=N, feature_map="elu", feature_norm="sum", chunk=4),
    "gated_sum": FastWeightConfig(kind="gated_sum", num_heads=N, num_kv_heads=2, chunk=4),
    "delta": FastWeightConfig(kind="delta", num_heads=N, chunk=4),
    "gated_delta": FastWeightConfig(kind="gated_delta", num_heads=N, num_kv_heads=2, output_norm=False, chunk=5),
    "lstmn": LSTMNConfig(hidden_dim=24, attention_dim=8),
}
# One of each kind, the last: whose weights of some heads are looked at too.
CHOSEN = {config.kind: config for config in CONFIGS.values()}.values()
EVERY = pytest.mark.parametrize("name", CONFIGS)
# The stack of layers has it, and gives it to them.
DISTANCES = RelativeEmbedding(
    D, max_distance=7, num_buckets=4, norm_epsilon=1e-5, init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(1)
)
X = np.random.default_rng(0).normal(size=(B, T, D)).astype("float32")


def make(config, rngs):
    init = nnx.initializers.normal(0.3)
    return make_mixer(config, D, dropout_rate=0.0, norm_eps=1e-5, kernel_init=init, rngs=rngs)


@functools.cache
def mixer_of(config):
    return nnx.merge(*jax.jit(lambda: nnx.split(make(config, nnx.Rngs(0))))())


@functools.cache
def program(config):
    graphdef, params = nnx.split(mixer_of(config))
    call = jax.jit(lambda params, x, context: nnx.merge(graphdef, params)(x, context))
    return functools.partial(call, params)


def context_of(config, **fields):
    return Context(layer=1, relative=DISTANCES if config.kind == "disentangled" else None, **fields)


def run(config, x, **context):
    """The output, compiled, on the host; the state; and the weights."""
    out, state, weights = program(config)(x, context_of(config, **context))
    return np.asarray(out), state, None if weights is None else np.asarray(weights)


def edited(x, place, value):
    """The same input with a value at a place."""
    x = x.copy()
    x[place] = value
    return x


def test_every_kind_is_here():
    kinds = {kind for config in MIXERS for kind in typing.get_args(typing.get_type_hints(config)["kind"])}
    assert {config.kind for config in CONFIGS.values()} == kinds
    assert set(typing.get_args(MixerConfig)) == set(MIXERS)


@EVERY
def test_the_future_has_no_influence(name):
    before, _, _ = run(CONFIGS[name], X)
    after, _, _ = run(CONFIGS[name], edited(X, np.s_[:, 7:], 0.5))
    assert before.shape == X.shape
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=1e-5)
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


@EVERY
def test_cached_equals_uncached_where_rows_differ_in_length(name):
    config = CONFIGS[name]
    expected, state, _ = run(config, X)
    assert state is None
    lengths = jnp.array([2, 4])
    padding = (jnp.arange(5) < lengths[:, None]).astype(jnp.int32)
    _, state, _ = run(config, X[:, :5], state=mixer_of(config).make_state(B, 16), segments_BT=padding)
    np.testing.assert_array_equal(state.length, lengths)
    for _ in range(6):
        rows, places = np.arange(B), np.asarray(state.length)
        out, state, _ = run(config, X[rows, places][:, None], state=state)
        np.testing.assert_allclose(out[:, 0], expected[rows, places], atol=1e-4)


@EVERY
def test_a_state_takes_a_prompt_in_pieces(name):
    config = CONFIGS[name]
    expected, whole, _ = run(config, X, state=mixer_of(config).make_state(B, 16))
    state, parts = mixer_of(config).make_state(B, 16), []
    for start, stop in ((0, 5), (5, 6), (6, T)):
        out, state, _ = run(config, X[:, start:stop], state=state)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=1e-4)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


@EVERY
def test_packed_documents_are_apart(name):
    config = CONFIGS[name]
    segments = jnp.array([[1] * 4 + [2] * 6 + [0]] * B)
    positions = jnp.array([[*range(4), *range(6), 0]] * B)
    packed, _, _ = run(config, X, segments_BT=segments, positions_BT=positions)
    for start, stop in ((0, 4), (4, 10)):
        # What comes after has no influence.
        alone = edited(np.zeros_like(X), np.s_[:, : stop - start], X[:, start:stop])
        apart, _, _ = run(config, alone)
        np.testing.assert_allclose(packed[:, start:stop], apart[:, : stop - start], atol=1e-4)


@EVERY
def test_weights_are_what_reads_the_values(name):
    config = CONFIGS[name]
    heads = config.num_heads
    out, _, weights = run(config, X, return_weights=True)
    assert weights.shape == (B, heads, T, T)
    np.testing.assert_allclose(np.triu(weights[0, 0], 1), 0, atol=1e-6)
    np.testing.assert_allclose(run(config, X)[0], out, atol=1e-6)
    if config in CHOSEN:
        chosen = (heads - 1, 0)
        few = run(config, X, return_weights=chosen)[2]
        np.testing.assert_allclose(few, weights[:, list(chosen)], atol=1e-6)
    if config.kind in ("softmax", "latent", "disentangled") or name == "linear":
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-4)


@EVERY
def test_hooks_meet_its_heads(name):
    config = CONFIGS[name]
    hooks = Hooks({"heads": jnp.zeros_like}, keep=("heads",))
    out, _, _ = mixer_of(config)(jnp.asarray(X), context_of(config, hooks=hooks))
    hooks.check()
    assert hooks.kept["heads"].shape[:3] == (B, T, config.num_heads) and hooks.kept["heads"].ndim == 4
    # Nothing goes past the place to the output: here no projection has a bias that is not zero.
    np.testing.assert_array_equal(out, np.zeros_like(X))


@EVERY
def test_every_parameter_learns(name):
    graphdef, params = nnx.split(mixer_of(CONFIGS[name]))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(jnp.asarray(X), context_of(CONFIGS[name]))[0]))

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        # A bias of keys shifts all logits of a query alike.
        assert np.isfinite(leaf).all() and (np.asarray(leaf).any() or "key" in str(path)), path


@EVERY
def test_settings_that_leave_the_parameters_alone(name):
    config = CONFIGS[name]
    described = nnx.eval_shape(lambda: make(config.structure, nnx.Rngs(0)))
    shapes = [[leaf.shape for leaf in jax.tree.leaves(nnx.split(one)[1])] for one in (mixer_of(config), described)]
    assert shapes[0] == shapes[1] and config.structure.structure == config.structure


@pytest.mark.parametrize("name", ["softmax", "latent", "differential", "disentangled", "lstmn"])
def test_a_state_without_room(name):
    config = CONFIGS[name]
    with pytest.raises(ValueError, match="11 more positions do not fit; it has room for 8 in all"):
        run(config, X, state=mixer_of(config).make_state(B, 8))
    _, state, _ = run(config, X[:, :6], state=mixer_of(config).make_state(B, 8))
    with pytest.raises(ValueError, match="row 0 would hold 9 positions; it has room for 8"):
        mixer_of(config)(jnp.asarray(X[:, :3]), context_of(config, state=state))
    # Inside a program nothing can raise.
    out, state, _ = run(config, X[:, :3], state=state)
    assert np.isnan(out).all() and int(state.length[0]) == 9


@pytest.mark.parametrize("name", ["softmax", "softmax, rotary", "latent", "differential", "disentangled"])
def test_empty_slots_are_hidden_without_a_causal_mask(name):
    config = CONFIGS[name]
    expected, _, _ = run(config, X[:, :6], is_causal=False)
    got, _, _ = run(config, X[:, :6], is_causal=False, state=mixer_of(config).make_state(B, 16))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["gated_delta", "linear"])
def test_the_size_of_a_matrix_state_does_not_grow(name):
    short, long = (mixer_of(CONFIGS[name]).make_state(B, length) for length in (8, 1 << 20))
    assert isinstance(short, MatrixState) and short.matrix.shape == long.matrix.shape


@pytest.mark.parametrize("name", ["softmax", "latent", "differential"])
def test_a_mask_of_ones_own(name):
    config, mask = CONFIGS[name], AttentionMask.mod(lambda b, h, q, k: (q - k) % 2 == 0)
    weights = run(config, X, mask=mask, return_weights=True)[2]
    rows, columns = np.indices((T, T))
    np.testing.assert_array_equal(np.asarray(weights != 0).any((0, 1)), (rows >= columns) & ((rows - columns) % 2 == 0))


@pytest.mark.parametrize(
    ("name", "context", "message"),
    [
        ("delta", {"mask": AttentionMask.causal()}, "delta attention: it takes no mask in addition to"),
        ("linear", {"prefix_B": jnp.array([1, 2])}, "linear attention: it takes no prefix that all tokens see"),
        ("lstmn", {"mask": AttentionMask.causal()}, "lstmn attention: it takes no mask in addition to"),
        ("lstmn", {"prefix_B": jnp.array([1, 2])}, "lstmn attention: it takes no prefix that all tokens see"),
        ("lstmn", {"is_causal": False}, "lstmn attention: it reads only what came before"),
        ("gated_delta", {"is_causal": False}, "gated_delta attention: it reads only what came before"),
    ],
)
def test_what_a_state_of_fixed_size_cannot_do(name, context, message):
    with pytest.raises(ValueError, match=message):
        mixer_of(CONFIGS[name])(jnp.asarray(X), Context(**context))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: built(FastWeightConfig, kind="hebb"),
            "kind: got 'hebb'; allowed: 'sum', 'gated_sum', 'delta', or 'gated_delta'",
        ),
        (lambda: built(FastWeightConfig, feature_norm="l1"), "feature_norm: got 'l1'.* Did you mean 'l2'"),
        (lambda: built(LinearAttentionConfig, feature_map="dfpf"), "feature_map: got 'dfpf'.* Did you mean 'dpfp'"),
        (lambda: built(LinearAttentionConfig, chunk=0), "chunk: got 0; allowed: 1 or more"),
        (lambda: built(LSTMNConfig, hidden_dim=0), "hidden_dim: got 0; allowed: 1 or more, or null"),
        (lambda: built(LatentConfig, rotary_dim=3), "rotary_dim: got 3; allowed: an even number"),
        (lambda: built(DifferentialConfig, window=0), "window: got 0"),
        (
            lambda: built(DisentangledConfig, num_buckets=3),
            "num_buckets: got 3; allowed: an even number from 2 up, or null",
        ),
        (
            lambda: built(DisentangledConfig, max_distance=129),
            "max_distance: got 129; with 256 num_buckets allowed: 130 or",
        ),
        (
            lambda: built(DisentangledConfig, content_to_position=False, position_to_content=False),
            "content_to_position: got False; allowed: true where position_to_content is false",
        ),
        (lambda: built(RotaryConfig, theta=0.0), "theta: got 0.0; allowed: above 0"),
        (lambda: built(RotaryConfig, fraction=1.5), "fraction: got 1.5; allowed: above 0, at most 1"),
    ],
)
def test_a_config_that_exists_is_valid(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", ["linear", "softmax", "disentangled"])
def test_both_sides_are_seen_without_causality(name):
    config = CONFIGS[name]
    segments = jnp.asarray([[1] * 5 + [2] * 6] * B)
    out, _, _ = run(config, X, is_causal=False, segments_BT=segments)
    np.testing.assert_allclose(out[:, :5], run(config, X[:, :5], is_causal=False)[0], atol=1e-5)
    changed = run(config, edited(X, np.s_[:, 4], 3.0), is_causal=False, segments_BT=segments)[0]
    assert np.abs(changed[:, 0] - out[:, 0]).max() > 1e-3


def test_half_lives_spread():
    attention = mixer_of(dataclasses.replace(CONFIGS["gated_delta"]))
    np.testing.assert_allclose(jnp.exp(attention.log_half_life[...]), [4, 512], rtol=1e-5)
