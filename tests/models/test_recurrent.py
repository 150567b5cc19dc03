"""The recurrent translator's properties, for both styles and every kind of attention."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from tests.alignment.kinds import KINDS
from tests.changed import changed as with_fields
from tests.made import made
from train.parallel.mesh import MeshConfig, batch_sharding, make_mesh, shardings_of, use_mesh
from transformer.errors import ConfigError
from transformer.models.families import count_parameters, make_model
from transformer.models.recurrent import flops_per_token
from transformer.models.recurrent_config import RecurrentConfig

B, S, T, SOURCE_V, V = 3, 7, 6, 23, 19
BAHDANAU = RecurrentConfig(
    source_vocab_size=SOURCE_V, vocab_size=V, embed_dim=8, hidden_dim=12, encoder_dim=6,
    attention=KINDS["additive"], init_std=0.3,
)  # fmt: skip
LUONG = dataclasses.replace(BAHDANAU, cell="lstm", style="luong", attention=KINDS["general"], num_layers=2)
STYLES = {"bahdanau": BAHDANAU, "luong": LUONG}
SHAPES = {
    **STYLES,
    "tanh": dataclasses.replace(BAHDANAU, readout="tanh", bidirectional=False),
    "bahdanau_lstm": dataclasses.replace(BAHDANAU, cell="lstm", num_layers=2),
    "luong_gru": dataclasses.replace(LUONG, cell="gru", input_feeding=False),
    "one_way": dataclasses.replace(LUONG, bidirectional=False, encoder_dim=None),
    "mapped": dataclasses.replace(LUONG, encoder_dim=5),
    "remat": dataclasses.replace(LUONG, remat="full"),
}
# Each kind in one of the styles, by turns: a kind knows its query alone.
STYLE_AND_KIND = list(zip(itertools.cycle(STYLES), KINDS))
RNG = np.random.default_rng(0)
SOURCE = jnp.asarray(RNG.integers(0, SOURCE_V, (B, S)), jnp.int32)
TARGET = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)
SOURCE_SEGMENTS = jnp.asarray(np.arange(S) < np.array([[7], [4], [1]]), jnp.int32)
SEGMENTS = jnp.asarray(np.arange(T) < np.array([[6], [3], [5]]), jnp.int32)
PADDED = {"source_segments_BS": SOURCE_SEGMENTS, "segments_BT": SEGMENTS}


@functools.cache
def make(config):
    return made(functools.partial(make_model, config), std=0.3)


def of_kind(style, kind, **changes):
    return dataclasses.replace(STYLES[style], attention=KINDS[kind], num_layers=1, **changes)


@functools.cache
def forward(config, return_weights):
    graphdef = make(config)[0]
    return jax.jit(
        lambda params, *tokens, **options: nnx.merge(graphdef, params)(
            *tokens, return_weights=return_weights, **options
        )
    )  # fmt: skip


def run(config, source=SOURCE, target=TARGET, *, return_weights=False, **options):
    """Logits and weights of the model, on the host."""
    out = forward(config, return_weights)(make(config)[1], source, target, **options)
    return types.SimpleNamespace(logits=np.asarray(out.logits), weights=jax.device_get(out.weights))


def changed(tokens, place, value=0):
    """The same tokens with others at a place."""
    tokens = np.array(tokens)
    tokens[place] = value
    return jnp.asarray(tokens)


# Other tokens where there is padding.
OTHER_SOURCE = changed(SOURCE, np.asarray(SOURCE_SEGMENTS) == 0, SOURCE_V - 1)
OTHER_TARGET = changed(TARGET, np.asarray(SEGMENTS) == 0, V - 1)


@functools.cache
def backward(config):
    graphdef = make(config)[0]

    def loss(params, source, target, weights, options):
        logits = nnx.merge(graphdef, params)(source, target, **options).logits
        return jnp.sum(jnp.where(weights[..., None] != 0, jnp.square(logits), 0))

    return jax.jit(jax.grad(loss))


def gradient(config, source=SOURCE, target=TARGET, **options):
    weights = options.get("segments_BT", np.ones((B, T), np.float32))
    return jax.device_get(backward(config)(make(config)[1], source, target, weights, options))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_float32_and_the_future_has_no_influence(shape):
    # The programs of the other shapes are those that their steps are compared with.
    options = PADDED if shape in STYLES else {"return_weights": True, **PADDED}
    logits = run(SHAPES[shape], **options).logits
    assert logits.shape == (B, T, V)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    after = run(SHAPES[shape], target=changed(TARGET, np.s_[:, 4:]), **options).logits
    np.testing.assert_array_equal(logits[:, :4], after[:, :4])
    assert np.abs(logits[:, 4:] - after[:, 4:]).max() > 1e-3
    other_source = changed(SOURCE, np.s_[:, -1])
    assert np.abs(logits - run(SHAPES[shape], source=other_source, **options).logits).max() > 1e-5


def check_steps(config, *, also_without_weights=False):
    out = run(config, return_weights=True, **PADDED)
    graphdef, params = make(config)

    @jax.jit
    def step_by_step(params):
        model = nnx.merge(graphdef, params)
        memory = model.encode(SOURCE, source_segments_BS=SOURCE_SEGMENTS)
        first_state = model.begin(memory, T)
        assert all(leaf.shape[0] == B for leaf in jax.tree.leaves((memory, first_state)))

        def step(state, token):
            logits, state, weights = model.step(token, state, memory, return_weights=True)
            return state, (logits, weights)

        plain = model.step(TARGET[:, 0], first_state, memory)[0] if also_without_weights else None
        return jax.lax.scan(step, first_state, TARGET.T)[1], plain

    (logits, weights), plain = jax.device_get(step_by_step(params))
    for t in range(T):
        real = np.asarray(SEGMENTS)[:, t] != 0
        np.testing.assert_allclose(logits[t][real], out.logits[:, t][real], atol=2e-5)
        assert (weights is None) == (out.weights is None)
        if weights is not None:
            np.testing.assert_allclose(weights[t][real], out.weights[0, :, 0, t][real], atol=2e-5)
    if also_without_weights:
        np.testing.assert_allclose(plain, out.logits[:, 0], atol=2e-5)


@pytest.mark.parametrize(("style", "kind"), STYLE_AND_KIND)
def test_steps_equal_teacher_forcing(style, kind):
    check_steps(of_kind(style, kind), also_without_weights=kind in ("additive", "dot", "delta", "none"))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in STYLES])
def test_steps_equal_teacher_forcing_in_every_shape(shape):
    check_steps(SHAPES[shape])


@pytest.mark.parametrize(("style", "kind"), STYLE_AND_KIND)
def test_padding_has_no_influence(style, kind):
    config = of_kind(style, kind)
    real = np.asarray(SEGMENTS != 0)
    out = run(config, return_weights=True, **PADDED)
    other = run(config, OTHER_SOURCE, OTHER_TARGET, return_weights=True, **PADDED)
    np.testing.assert_array_equal(out.logits[real], other.logits[real])
    if out.weights is not None:
        assert not (np.asarray(out.weights) * np.asarray(SOURCE_SEGMENTS == 0)[None, :, None, None]).any()
    # A row by itself, without padding.
    alone = run(config, np.asarray(SOURCE)[1:2, :4], np.asarray(TARGET)[1:2, :3])
    np.testing.assert_allclose(out.logits[1, :3], alone.logits[0], atol=2e-5)


DROPPED = {kind: {"dropout": 0.1} for kind in ("dot", "general", "hard")}


@pytest.mark.parametrize(("style", "kind"), STYLE_AND_KIND)
def test_every_parameter_learns_and_padding_does_not(style, kind):
    # Dropout, and what hard attention draws.
    options = {"key": jax.random.key(3), **PADDED} if kind in DROPPED else PADDED
    config = of_kind(style, kind, **DROPPED.get(kind, {}))
    expected = gradient(config, **options)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
    got = gradient(config, OTHER_SOURCE, OTHER_TARGET, **options)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    for table, tokens, segments in (("source_embed", SOURCE, SOURCE_SEGMENTS), ("embed", TARGET, SEGMENTS)):
        rows = np.asarray(got[table]["table"][...])
        unseen = np.setdiff1d(np.arange(len(rows)), np.asarray(tokens)[np.asarray(segments) != 0])
        assert not rows[unseen].any()


@pytest.mark.parametrize(("style", "kind"), [case for case in STYLE_AND_KIND if case[1] not in ("none", "delta")])
def test_weights_are_distributions(style, kind):
    weights = np.asarray(run(of_kind(style, kind), return_weights=True, **PADDED).weights)
    assert weights.shape == (1, B, 1, T, S)
    if kind.startswith("local"):
        # Gaussian weights are not normalised again, and a step behind the source sees none of it.
        assert (weights.sum(-1) <= 1 + 1e-5).all()
    else:
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    if kind == "hard":
        assert set(np.unique(weights)) == {0, 1}


@pytest.mark.parametrize("style", STYLES)
def test_looking_at_weights_leaves_the_output_alone(style):
    plain, looked_at = run(STYLES[style], **PADDED), run(STYLES[style], return_weights=True, **PADDED)
    assert plain.weights is None
    np.testing.assert_allclose(plain.logits, looked_at.logits, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "delta"])
def test_attention_without_weights_gives_none(kind):
    assert run(of_kind("luong", kind), return_weights=True, **PADDED).weights is None


def test_hard_attention_draws_with_a_key_alone():
    config = of_kind("bahdanau", "hard")
    plain = run(config).logits
    np.testing.assert_array_equal(plain, run(config).logits)
    first, again, other = (run(config, key=jax.random.key(seed)).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("style", STYLES)
def test_dropout_needs_a_key_and_follows_it(style):
    config = dataclasses.replace(STYLES[style], dropout=0.3)
    np.testing.assert_array_equal(run(config, **PADDED).logits, run(STYLES[style], **PADDED).logits)
    first, again, other = (run(config, key=jax.random.key(seed), **PADDED).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("style", STYLES)
def test_a_small_batch_is_learned_by_heart(style):
    config = dataclasses.replace(STYLES[style], embed_dim=16, hidden_dim=32, encoder_dim=16, num_layers=1)
    graphdef, params = make(config)
    # One vector: an optimizer's program for each array would take longer to compile than the model's.
    vector, unravel = ravel_pytree(params)
    optimizer = optax.adam(2e-2)
    inputs = jnp.pad(TARGET[:, :-1], ((0, 0), (1, 0)))

    def loss(vector):
        logits = nnx.merge(graphdef, unravel(vector))(SOURCE, inputs, **PADDED).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, TARGET)
        return jnp.where(SEGMENTS != 0, losses, 0).sum() / SEGMENTS.sum().astype(jnp.float32)

    @jax.jit
    def train(vector):
        def step(carry, _):
            vector, state = carry
            value, gradient = jax.value_and_grad(loss)(vector)
            # optax raises a float to an integer's power.
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(vector, updates), state), value

        return jax.lax.scan(step, (vector, optimizer.init(vector)), length=60)[1]

    losses = train(vector)
    assert float(losses[0]) > 2
    assert float(losses[-1]) < 0.02


def test_rematerialisation_changes_no_gradient():
    config = of_kind("luong", "general", dropout=0.1)
    expected, got = (
        gradient(dataclasses.replace(config, remat=remat), key=jax.random.key(3), **PADDED)
        for remat in ("none", "full")
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, expected)


@pytest.mark.parametrize(("style", "kind"), STYLE_AND_KIND)
def test_bfloat16_computes_close_to_float32(style, kind):
    config = of_kind(style, kind)
    narrow = dataclasses.replace(config, dtype="bfloat16")
    got, expected = (run(c, return_weights=True, **PADDED).logits for c in (narrow, config))
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < (0.3 if kind == "hard" else 0.05)


@pytest.mark.parametrize(("style", "devices"), [("bahdanau", 2), ("luong", 8)])
def test_many_devices_compute_what_one_does(style, devices):
    # Every dim can be cut into eight.
    sizes = {"source_vocab_size": 24, "vocab_size": 32, "hidden_dim": 16, "encoder_dim": 8, "num_layers": 1}
    attention = dataclasses.replace(STYLES[style].attention, **({"dim": 8} if style == "bahdanau" else {}))
    graphdef, params = make(dataclasses.replace(STYLES[style], attention=attention, **sizes))
    batch = np.concatenate([SOURCE] * 8), np.concatenate([TARGET] * 8)

    def loss(params, source, target):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(source, target).logits))

    expected = jax.jit(jax.value_and_grad(loss))(params, *batch)
    config = MeshConfig(strategy="fsdp")
    mesh = make_mesh(config, jax.devices()[:devices])
    with use_mesh(mesh, config.rules):
        params = jax.device_put(params, shardings_of(params, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh, config.rules))
        got = jax.jit(jax.value_and_grad(loss))(params, *batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), got, expected)


def test_packed_rows_are_refused():
    model = nnx.merge(*make(BAHDANAU))
    with pytest.raises(ValueError, match="source_segments: got segment 2"):
        model.encode(SOURCE, source_segments_BS=SOURCE_SEGMENTS * 2)
    with pytest.raises(ValueError, match="segments: got segment 3"):
        model(SOURCE, TARGET, segments_BT=SEGMENTS * 3)


def test_parameters_and_flops_are_counted_from_the_shapes():
    c = dataclasses.replace(BAHDANAU, readout="tanh")
    encoder = 2 * 3 * 6 * (8 + 6)
    decoder = 3 * 12 * (8 + 12 + 12)
    matrices = encoder + decoder + 12 * 10 + 12 * 10 + (12 + 12 + 8) * 8 + 8 * V
    biases = 2 * 18 + 36 + 10 + 8 + V
    first_state, lookups, vector = 6 * 12 + 12, 8 * (SOURCE_V + V), 10
    assert count_parameters(c) == matrices + biases + first_state + lookups + vector
    assert flops_per_token(c, 40) == 2 * (matrices + 40 * (10 + 12))
    # Local attention sees 5 states, and scores them by a product with W in between.
    local = dataclasses.replace(c, attention=KINDS["local_m"])
    assert flops_per_token(local, 40) == 2 * (matrices - 2 * 12 * 10 + 12 * 12 + 5 * 2 * 12)
    luong = 2 * 4 * 6 * (8 + 6 + 12 + 6) + 4 * 12 * (8 + 12 + 12 + 12 + 12) + 12 * 12 + 24 * 12 + 12 * V
    assert flops_per_token(LUONG, 40) == 2 * (luong + 2 * 40 * 12)
    assert count_parameters(LUONG) == luong + 2 * 2 * 4 * 6 + 2 * 4 * 12 + V + lookups


@pytest.mark.parametrize(
    ("config", "changes", "field"),
    [
        (BAHDANAU, {"hidden_dim": 0}, "hidden_dim"),
        (BAHDANAU, {"source_vocab_size": 0}, "source_vocab_size"),
        (BAHDANAU, {"dropout": 1.0}, "dropout"),
        (BAHDANAU, {"attention": KINDS["dot"], "encoder_dim": 12}, "attention.kind"),
        (LUONG, {"hidden_dim": 13, "encoder_dim": None}, "hidden_dim"),
        (LUONG, {"attention": "dot"}, "attention"),
    ],
)
def test_configs_that_cannot_be_are_refused(config, changes, field):
    with pytest.raises(ConfigError) as caught:
        with_fields(config, **changes)
    assert caught.value.field == field
