"""GPT's properties, in GPT-2's shape and in the modern one."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.changed import changed
from tests.made import made
from train.parallel.mesh import MeshConfig, batch_sharding, make_mesh, shardings_of, use_mesh
from transformer.attention.spec.mask import AttentionMask
from transformer.errors import ConfigError
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.position import AlibiConfig, RelativeConfig, RotaryConfig, RotaryScaling
from transformer.mixers.differential import DifferentialConfig
from transformer.mixers.fast_weights import FastWeightConfig
from transformer.mixers.latent import LatentConfig
from transformer.mixers.linear import LinearAttentionConfig
from transformer.mixers.lstmn import LSTMNConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.families import count_parameters, make_model
from transformer.models.gpt import GPT, GPTConfig, flops_per_token

B, T, V = 2, 12, 40
CLASSIC = GPTConfig(vocab_size=V, max_length=16, num_layers=2, embed_dim=32, attention=SoftmaxConfig(num_heads=4))
MODERN = dataclasses.replace(
    CLASSIC, norm="rms_norm", tie_embeddings=False, logit_soft_cap=30.0, mlp=DenseConfig(activation="swiglu", bias=False),
    attention=SoftmaxConfig(num_heads=4, num_kv_heads=2, position=RotaryConfig(), bias=False, qk_norm=True, soft_cap=50.0),
)  # fmt: skip
YARN = RotaryConfig(scaling=RotaryScaling(kind="yarn", factor=4.0, original_length=8, fast_turns=4.0))
RELATIVE = changed(CLASSIC, attention={"position": RelativeConfig(num_buckets=8, max_distance=10)})
SHAPES = {
    "classic": CLASSIC,
    "modern": MODERN,
    "sinusoidal": dataclasses.replace(CLASSIC, position_embedding="sinusoidal"),
    "yarn": changed(MODERN, attention={"position": YARN}),
    "alibi": changed(MODERN, attention={"position": AlibiConfig()}),
    "relative": RELATIVE,
    "none": dataclasses.replace(CLASSIC, position_embedding="none"),
    "latent": dataclasses.replace(CLASSIC, attention=LatentConfig(num_heads=4)),
    "lstmn": dataclasses.replace(CLASSIC, attention=LSTMNConfig(hidden_dim=24, attention_dim=8)),
    "differential": dataclasses.replace(CLASSIC, attention=DifferentialConfig(num_heads=2, position=RotaryConfig())),
    "alternating": dataclasses.replace(
        CLASSIC, num_layers=4, pattern=(changed(MODERN.attention, window=2), changed(MODERN.attention, position=YARN))
    ),
    "hybrid": dataclasses.replace(
        CLASSIC, num_layers=4, pattern=(FastWeightConfig(kind="gated_delta", num_heads=4, chunk=4), MODERN.attention)
    ),
    "linear": dataclasses.replace(CLASSIC, attention=LinearAttentionConfig(num_heads=4, chunk=4)),
}
# Where a shape sees all, half of them; and a loop in place of a scan, in half of those that can have no window.
WINDOW, SINKS, LOOP = {"attention": {"window": 3}}, {"attention": {"window": 3, "sinks": 2}}, {"scan_layers": False}
SPANS = {
    "modern": SINKS, "sinusoidal": WINDOW, "alibi": SINKS, "relative": WINDOW, "lstmn": LOOP, "differential": LOOP,
    "alternating": LOOP,
}  # fmt: skip
SPANNED = {shape: changed(config, **SPANS.get(shape, {})) for shape, config in SHAPES.items()}
# Steps of a stack as it is in training, in each form that it has; those of all others are of single layers alone.
STACKED = ("classic", "lstmn", "alternating", "hybrid")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)


@functools.cache
def make(config):
    """A model with weights large enough that every part of it matters."""
    return made(functools.partial(make_model, config))


@functools.cache
def forward(config, return_weights):
    graphdef = make(config)[0]
    return jax.jit(
        lambda params, tokens, **options: nnx.merge(graphdef, params)(tokens, return_weights=return_weights, **options)
    )


def run(config, tokens=TOKENS, *, like=None, return_weights=False, **options):
    """Logits and weights of the model, on the host."""
    out = forward(config, return_weights)(make(like or config)[1], tokens, **options)
    return types.SimpleNamespace(logits=np.asarray(out.logits), weights=jax.device_get(out.weights))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_float32_and_finite(shape):
    logits = run(SHAPES[shape]).logits
    assert logits.shape == (B, T, V)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_future_has_no_influence(shape):
    changed = np.array(TOKENS)
    changed[:, 7:] = 0
    before, after = run(SHAPES[shape]).logits, run(SHAPES[shape], jnp.asarray(changed)).logits
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


@functools.cache
def loss_and_gradient(config, like, key=None, devices=1):
    """Of eight rows, with the parameters of a model `like` this, which are divided over the devices as the rows are."""
    graphdef, params = make(config)[0], make(like)[1]
    tokens, key = np.concatenate([TOKENS] * 4), None if key is None else jax.random.key(key)

    @jax.jit
    def both(params, tokens):
        def loss(params):
            return jnp.mean(jnp.square(nnx.merge(graphdef, params)(tokens, key=key).logits))

        return jax.value_and_grad(loss)(params)

    if devices == 1:
        return both(params, tokens)
    config = MeshConfig(strategy="fsdp")
    mesh = make_mesh(config, jax.devices()[:devices])
    with use_mesh(mesh, config.rules):
        params = jax.device_put(params, shardings_of(params, mesh))
        return both(params, jax.device_put(tokens, batch_sharding(mesh, config.rules)))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("modern", {"scan_layers": False}),
        ("modern", {"remat": "full"}),
        ("modern", {"remat": "dots"}),
        ("modern", {"remat": "light"}),
        ("relative", {"scan_layers": False}),
        ("alternating", {"scan_layers": False}),
        ("hybrid", {"scan_layers": False}),
        ("hybrid", {"remat": "full"}),
        ("differential", {"scan_layers": False}),
    ],
    ids=str,
)
def test_scan_loop_and_remat_compute_the_same(shape, changes):
    config = dataclasses.replace(SHAPES[shape], dropout=0.1, attention_dropout=0.1)
    expected = loss_and_gradient(config, config, key=5)
    got = loss_and_gradient(dataclasses.replace(config, **changes), config, key=5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), got, expected)


@functools.cache
def after_five(shape):
    """A model after five tokens of both rows, after three of one and five of the other; and a step of single layers."""
    graphdef, params = make(SPANNED[shape])

    @jax.jit
    def read(tokens):
        model = nnx.merge(graphdef, params)
        whole = model(tokens[:, :5], states=model.make_states(B, 16))
        segments = (jnp.arange(6) < jnp.array([[3], [5]])).astype(jnp.int32)
        ragged = model(tokens[:, :6], states=model.make_states(B, 16), segments_BT=segments)
        return whole.logits, whole.states, ragged.states, nnx.split(model.unstacked())

    *read, unstacked = read(np.asarray(TOKENS))
    return *read, step_of(*unstacked)


def step_of(graphdef, params):
    """A program that reads one token more of each row."""
    step = jax.jit(lambda params, tokens, states: nnx.merge(graphdef, params)(tokens, states=states))
    return functools.partial(step, params)


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_equals_uncached(shape):
    first, states, _, step = after_five(shape)
    if shape in STACKED:
        step = step_of(*make(SPANNED[shape]))
    logits, tokens = [first], np.asarray(TOKENS)
    for t in range(5, T):
        out = step(tokens[:, t : t + 1], states)
        logits.append(out.logits)
        states = out.states
    np.testing.assert_allclose(np.concatenate(logits, 1), run(uncached(shape)).logits, atol=2e-5)


def uncached(shape):
    """A config that computes without states what the shape does with them."""
    return dataclasses.replace(SPANNED[shape], scan_layers=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_rows_of_different_lengths_equal_uncached_ones(shape):
    tokens, expected = np.asarray(TOKENS), run(uncached(shape)).logits
    *_, states, step = after_five(shape)
    for _ in range(4):
        places = np.asarray(states[0].length)
        out = step(tokens[np.arange(B), places][:, None], states)
        np.testing.assert_allclose(np.asarray(out.logits)[:, 0], expected[np.arange(B), places], atol=2e-5)
        states = out.states


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_equals_alone(shape):
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    positions = jnp.array([[*range(5), *range(7)], [*range(9), 0, 0, 0]])
    packed = run(SPANNED[shape], segments_BT=segments, positions_BT=positions).logits
    for row, start, stop in ((0, 0, 5), (0, 5, 12), (1, 0, 9)):
        # What comes after has no influence.
        tokens = np.zeros((B, T), np.int32)
        tokens[:, : stop - start] = TOKENS[row, start:stop]
        alone = run(uncached(shape), jnp.asarray(tokens)).logits[0, : stop - start]
        np.testing.assert_allclose(packed[row, start:stop], alone, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "devices"),
    [("modern", 8), ("alibi", 2), ("relative", 4), ("latent", 8), ("differential", 2), ("hybrid", 8), ("linear", 4)],
)
def test_many_devices_compute_what_one_does(shape, devices):
    expected, got = (loss_and_gradient(SHAPES[shape], SHAPES[shape], devices=number) for number in (1, devices))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), got, expected)


def test_layers_share_one_table_of_distances_and_learn_it():
    _, gradient = loss_and_gradient(RELATIVE, RELATIVE)
    table = np.asarray(gradient["layers"]["relative"]["table"][...])
    assert table.shape == (8, 4)
    assert np.abs(table).min() > 0


def test_sinks_are_seen_past_a_window():
    weights = run(changed(CLASSIC, attention={"window": 3, "sinks": 2}), return_weights=True).weights
    query, key = np.indices((T, T))
    seen = (key <= query) & ((query - key <= 3) | (key < 2))
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(seen, weights.shape))


@pytest.mark.parametrize("shape", ["modern", "alibi", "relative"])
def test_weights_are_distributions_and_leave_the_output_alone(shape):
    plain, looked_at = run(SHAPES[shape]), run(SHAPES[shape], return_weights=True)
    np.testing.assert_array_equal(plain.logits, looked_at.logits)
    weights = looked_at.weights
    assert weights.shape == (2, B, 4, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not np.triu(weights, 1).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_order_makes_a_difference(shape):
    config = SHAPES[shape]
    pair = jnp.array([[3, 5, 7] + [0] * (T - 3), [5, 3, 7] + [0] * (T - 3)])
    logits = run(config, pair).logits[:, 2]
    same = np.allclose(logits[0], logits[1], atol=1e-5)
    # Without positions the last token sees a set; a second layer could tell more, since causal prefixes differ.
    assert not same


def test_bfloat16_computes_close_to_float32():
    expected = run(MODERN).logits
    got = run(dataclasses.replace(MODERN, dtype="bfloat16"), like=MODERN).logits
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.03


def test_dropout_needs_a_key_and_follows_it():
    config = dataclasses.replace(CLASSIC, dropout=0.2, attention_dropout=0.2)
    plain = run(config).logits
    np.testing.assert_array_equal(plain, run(config).logits)
    first, again, other = (run(config, key=jax.random.key(seed)).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - plain).max() > 1e-3


def test_residual_projections_start_smaller_with_depth():
    config = GPTConfig(vocab_size=V, max_length=16, num_layers=8, embed_dim=64, attention=SoftmaxConfig(num_heads=4))
    blocks = nnx.merge(*jax.jit(lambda: nnx.split(GPT(config, rngs=nnx.Rngs(0))))()).layers.blocks
    for part, expected in (
        (blocks.attention.query, 0.02), (blocks.attention.out, 0.02 / 4), (blocks.feed_forward.down, 0.02 / 4),
    ):  # fmt: skip
        assert np.asarray(part.kernel[...]).std() == pytest.approx(expected, rel=0.05)


def test_gpt2_has_124_million_parameters():
    assert count_parameters(GPTConfig()) == 124_439_808


def test_relative_positions_take_a_number_a_bucket_and_head():
    assert count_parameters(RELATIVE) == count_parameters(SHAPES["none"]) + 8 * 4


def test_flops_are_counted_from_the_shapes():
    c = MODERN
    kernels = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * c.mlp.width(32)
    attention = 4 * 32 * (T + 1) / 2
    assert flops_per_token(c, T) == c.num_layers * (2 * kernels + attention) + 2 * 32 * V
    # A window of 3 sees 1, 2, 3, then 4 keys.
    windowed = flops_per_token(changed(c, attention={"window": 3}), T)
    assert flops_per_token(c, T) - windowed == pytest.approx(2 * 4 * 32 * ((T + 1) / 2 - (1 + 2 + 3 + 4 * 9) / 12))
    # And 2 sinks more.
    sunk = flops_per_token(changed(c, attention={"window": 3, "sinks": 2}), T)
    assert flops_per_token(c, T) - sunk == pytest.approx(2 * 4 * 32 * ((T + 1) / 2 - (1 + 2 + 3 + 4 + 5 + 6 * 7) / 12))
    assert flops_per_token(RELATIVE, T) == flops_per_token(CLASSIC, T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention": {"num_heads": 5}},
            r"attention.num_heads: got 5; allowed: a divisor of embed_dim \(32\), or set head_dim",
        ),
        (
            {"attention": {"head_dim": 7, "position": RotaryConfig()}},
            "attention.head_dim: got 7; rotary positions rotate pairs of features, and would rotate 7; allowed: an even number",
        ),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"attention_dropout": 1.0}, "attention_dropout: got 1.0"),
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap: got -1.0"),
        (
            {"norm": "layernorm"},
            "norm: got 'layernorm'; allowed: 'layer_norm', or 'rms_norm'. Did you mean 'layer_norm'",
        ),
        ({"mlp": {"activation": "swish"}}, "activation: got 'swish'"),
        ({"dtype": "bf16"}, "dtype: got 'bf16'; allowed: 'float32', or 'bfloat16'"),
        ({"position_embedding": "rope"}, "position_embedding: got 'rope'"),
        ({"norm": "rms_norm", "norm_bias": True}, "norm_bias: got True; rms_norm has no biases"),
        (
            {"position_embedding": "learned", "attention": {"position": AlibiConfig()}},
            r"position_embedding: got 'learned'; attention has positions of its own \(alibi\)",
        ),
        (
            {"num_layers": 3, "pattern": (LatentConfig(num_heads=4), SoftmaxConfig(num_heads=4))},
            r"num_layers: got 3; pattern has 2 mixers, which have to divide the layers \(3\)",
        ),
        (
            {
                "num_layers": 3,
                "pattern": (SoftmaxConfig(num_heads=4), LatentConfig(num_heads=4), FastWeightConfig(num_heads=5)),
            },
            "pattern.2.num_heads: got 5",
        ),
        (
            {"attention": FastWeightConfig(num_heads=4), "attention_dropout": 0.1},
            "attention_dropout: got 0.1; no layer computes a softmax; allowed: 0",
        ),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        changed(CLASSIC, **changes)


def test_an_encoder_refuses_what_looks_back_alone():
    with pytest.raises(ConfigError, match="attention.kind: got 'delta'; it reads only what came before"):
        BertConfig(embed_dim=32, attention=FastWeightConfig(num_heads=4), attention_dropout=0.0)


def test_a_hybrid_carries_a_state_that_does_not_grow():
    model = nnx.merge(*make(SHAPES["hybrid"]))
    sizes = [[leaf.size for leaf in jax.tree.leaves(model.make_states(B, length))] for length in (16, 64)]
    kinds = [type(state).__name__ for state in model.make_states(B, 16)]
    assert kinds == ["MatrixState", "KVCache"] * 2
    assert sum(a == b for a, b in zip(*sizes, strict=True)) == len(sizes[0]) - 2 * 2


def test_a_mask_of_ones_own_reaches_every_layer():
    mask = AttentionMask.mod(lambda b, h, q, k: (q - k) % 2 == 0)
    weights = run(CLASSIC, mask=mask, return_weights=True).weights
    rows, columns = np.indices((T, T))
    seen = (columns <= rows) & ((rows - columns) % 2 == 0)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(seen, weights.shape))
