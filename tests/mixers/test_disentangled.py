"""Disentangled attention: the paper's sum for each pair of tokens, its distances, and an encoder of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.changed import changed
from tests.made import made
from transformer.errors import ConfigError
from transformer.interpret.capture import attention_maps
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.position import RelativeConfig
from transformer.layers.relative_embedding import RelativeEmbedding, distance_rows
from transformer.mixers.context import NO_CONTEXT, Context
from transformer.mixers.disentangled import BLOCK, DisentangledAttention, DisentangledConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import Bert, BertConfig
from transformer.models.heads import TokensHeadConfig

B, D, N, H = 2, 12, 2, 6
INIT = nnx.initializers.normal(0.4)
MODEL = BertConfig(
    vocab_size=30, max_length=24, num_layers=2, embed_dim=D, mlp=DenseConfig(dim=16), token_types=0, dropout=0.0,
    attention_dropout=0.0, attention=DisentangledConfig(num_heads=N, max_distance=6, num_buckets=4),
)  # fmt: skip


def made_of(config, norm_epsilon=1e-5, **options):
    """The attention, and the table that a stack would have."""
    attention = DisentangledAttention(D, config, kernel_init=INIT, rngs=nnx.Rngs(0), **options)
    table = RelativeEmbedding(
        D, max_distance=config.max_distance, num_buckets=config.num_buckets, init=nnx.initializers.normal(1.0),
        norm_epsilon=norm_epsilon if config.norm_embeddings else None, rngs=nnx.Rngs(1),
    )  # fmt: skip
    return attention, table


def tokens_of(length):
    return jnp.asarray(np.random.default_rng(length).normal(size=(B, length, D)), jnp.float32)


def row_by_hand(distance, max_distance, num_buckets):
    """Of one distance, by the definition."""
    if num_buckets is None:
        return min(max(distance + max_distance, 0), 2 * max_distance - 1)
    exact, far = num_buckets // 2, abs(distance)
    if far > exact:
        share = np.log(far / exact) / np.log((max_distance - 1) / exact)
        far = exact + int(np.ceil(np.round(share * (exact - 1), 5)))
    return min(max(int(np.sign(distance)) * far + num_buckets, 0), 2 * num_buckets - 1)


def by_hand(attention, table, x_BTD):
    """The weights and the output, one pair of tokens after the other, in float64."""
    c = attention.config

    def project(linear, rows):
        kernel, bias = (np.asarray(part[...], np.float64) for part in (linear.kernel, linear.bias))
        return np.einsum("...D,DNH->...NH", np.asarray(rows, np.float64), kernel) + bias

    q, k, v = (project(linear, x_BTD) for linear in (attention.query, attention.key, attention.value))
    own = [(attention.position_key, attention.key), (attention.position_query, attention.query)]
    key_rows, query_rows = (project(shared if linear is None else linear, table()) for linear, shared in own)
    T = x_BTD.shape[1]
    logits = np.zeros((B, N, T, T))
    for t in range(T):
        for s in range(T):
            row = row_by_hand(t - s, c.max_distance, c.num_buckets)
            terms = [(q[:, t], k[:, s])]
            terms += [(q[:, t], key_rows[row])] if c.content_to_position else []
            terms += [(k[:, s], query_rows[row])] if c.position_to_content else []
            logits[:, :, t, s] = sum((a * b).sum(-1) for a, b in terms) / np.sqrt(H * len(terms))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("BNTS,BSNH,NHD->BTD", weights, v, np.asarray(attention.out.kernel[...], np.float64))
    return weights, out + np.asarray(attention.out.bias[...])


@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (1, {"max_distance": 6, "num_buckets": 4}),
        (9, {"max_distance": 20, "num_buckets": 8}),
        (17, {"max_distance": 9, "num_buckets": 6, "share_projections": False}),
        (17, {"max_distance": 5, "num_buckets": None, "norm_embeddings": False}),
        (11, {"max_distance": 40, "num_buckets": None, "share_projections": False, "position_to_content": False}),
        (12, {"max_distance": 4, "num_buckets": 2, "content_to_position": False}),
        (BLOCK + 9, {"max_distance": 64, "num_buckets": 16}),
    ],
)
def test_it_is_the_papers(length, fields):
    attention, table = made_of(DisentangledConfig(num_heads=N, **fields))
    x = tokens_of(length)
    weights, expected = by_hand(attention, table, x)
    out, state, got = attention(x, dataclasses.replace(NO_CONTEXT, relative=table, return_weights=True))
    assert state is None
    np.testing.assert_allclose(got, weights, atol=1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "xla", "blockwise"])
def test_every_backend_in_both_types(backend):
    plain, table = made_of(DisentangledConfig(num_heads=N, max_distance=6, num_buckets=4))
    x, context = tokens_of(10), dataclasses.replace(NO_CONTEXT, relative=table)
    expected = plain(x, context)[0]
    attention, _ = made_of(dataclasses.replace(plain.config, backend=backend))
    np.testing.assert_allclose(attention(x, context)[0], expected, atol=1e-5)
    attention, table = made_of(attention.config, dtype=jnp.bfloat16)
    table.dtype = jnp.bfloat16
    out = attention(x.astype(jnp.bfloat16), dataclasses.replace(context, relative=table))[0]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.1)


def test_rows_of_distances():
    rows = distance_rows(np.arange(-600, 601), max_distance=512, num_buckets=256)
    np.testing.assert_array_equal(rows[600 - 128 : 600 + 129], np.arange(256 - 128, 256 + 129))
    assert (np.diff(rows) >= 0).all() and set(rows) <= set(range(512)) and rows[0] == 0 and rows[-1] == 511
    table = RelativeEmbedding(D, max_distance=9, num_buckets=6, init=INIT, rngs=nnx.Rngs(0))
    distances = np.arange(-30, 31)
    np.testing.assert_array_equal(table.rows(jnp.asarray(distances)), table.rows(distances))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("buckets", "longest"), [(256, 512), (256, 1024), (32, 128), (48, 512), (8, 20), (6, 9), (4, 64), (2, 5)]
)
def test_rows_are_those_of_transformers(buckets, longest):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    distances = np.arange(-3 * longest, 3 * longest + 1)
    theirs = modeling.make_log_bucket_position(torch.tensor(distances), buckets, longest).long()
    expected = torch.clamp(theirs + buckets, 0, 2 * buckets - 1).numpy()
    np.testing.assert_array_equal(distance_rows(distances, max_distance=longest, num_buckets=buckets), expected)


def test_a_context_without_embeddings():
    attention, _ = made_of(DisentangledConfig(num_heads=N))
    with pytest.raises(ValueError, match="disentangled attention: the context has no relative embeddings"):
        attention(tokens_of(4), Context())


def test_dropout_follows_its_key():
    attention, table = made_of(DisentangledConfig(num_heads=N, max_distance=6, num_buckets=4), dropout_rate=0.4)
    first, again, other = (
        attention(tokens_of(8), Context(relative=table, is_causal=False, key=jax.random.key(seed)))[0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-3


def logits_of(config, params, tokens, **options):
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))))
    return np.asarray(jax.jit(lambda params: nnx.merge(graphdef, params)(tokens, **options).logits)(params))


@pytest.fixture(scope="module")
def params():
    return made(lambda rngs: Bert(MODEL, rngs=rngs), std=0.3)[1]


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 12)), jnp.int32)


def test_packed_documents_are_those_alone(params):
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [0]] * 2)
    positions = jnp.asarray([[*range(5), *range(6), 0]] * 2)
    packed = logits_of(MODEL, params, IDS, segments_BT=segments, positions_BT=positions)
    for start, stop in ((0, 5), (5, 11)):
        alone = logits_of(MODEL, params, IDS[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-4)


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "full"}, {"num_layers": 4, "pattern": 2}])
def test_layers_share_one_table(changes, params):
    if "pattern" in changes:
        # Layers whose parameters differ in shape share it too.
        own = dataclasses.replace(MODEL.attention, share_projections=False)
        config = changed(MODEL, num_layers=4, pattern=(MODEL.attention, own))
        params = made(lambda rngs: Bert(config, rngs=rngs), std=0.3)[1]
    else:
        config = changed(MODEL, **changes)
        np.testing.assert_allclose(logits_of(config, params, IDS), logits_of(MODEL, params, IDS), atol=1e-5)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))))
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(IDS).logits))))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert gradient["layers"]["relative"]["table"][...].shape == (8, D)
    # At 12 tokens all distances occur.
    assert (np.abs(gradient["layers"]["relative"]["table"][...]).max(-1) > 0).all()


def test_its_weights_are_shown(params):
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Bert(MODEL, rngs=nnx.Rngs(0))))
    maps = attention_maps(nnx.merge(graphdef, params), IDS[0].tolist(), layers=(1,), heads=(0,))
    np.testing.assert_allclose(maps.weights_LNTS.sum(-1), 1, atol=1e-5)


def test_absolute_positions_on_top_and_what_layers_cannot_share():
    assert MODEL.embedded_positions == "none"
    both = changed(MODEL, position_embedding="learned", head=TokensHeadConfig(num_labels=2))
    assert "positions" in made(lambda rngs: Bert(both, rngs=rngs))[1]
    others = [
        dataclasses.replace(MODEL.attention, max_distance=7),
        SoftmaxConfig(num_heads=N, position=RelativeConfig()),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="its layers share one bias or one table of embeddings by distance"):
            changed(MODEL, pattern=(MODEL.attention, other))


def test_operations_count_a_product_for_each_term():
    both, one = (DisentangledConfig(num_heads=N, position_to_content=term) for term in (True, False))
    plain = SoftmaxConfig(num_heads=N)
    lengths = {"length": 100, "causal": False}
    assert both.flops(D, **lengths) - one.flops(D, **lengths) == 2 * 100 * D
    assert one.flops(D, **lengths) - plain.flops(D, **lengths) == 2 * 100 * D
