"""A map with an adapter is what it was at first, and equals one kernel always."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.errors import UserError
from transformer.layers.adapter import Adapter, AdapterConfig
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.linear import Linear, join
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.adapted import adapt, make_adapted
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.gpt import GPTConfig
from transformer.models.recurrent_config import RecurrentConfig

RNG = np.random.default_rng(0)
MODEL = GPTConfig(
    vocab_size=32,
    max_length=8,
    num_layers=3,
    embed_dim=16,
    attention=SoftmaxConfig(num_heads=2),
    mlp=DenseConfig(activation="swiglu"),
)
TOKENS = jnp.asarray(RNG.integers(0, 32, (2, 8)), jnp.int32)
KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def out_map(kind="lora", *, learned=True, **options):
    """From heads to the stream, with an adapter that has learned something."""
    normal = nnx.initializers.normal(1.0)
    dtype = options.pop("dtype", jnp.float32)
    linear = Linear(
        (2, 3), (5,), axes=("heads", "head_dim", "embed"), kernel_init=normal, dtype=dtype, rngs=nnx.Rngs(0)
    )
    linear.bias.set_value(draw(5))
    linear.adapter = Adapter(linear.kernel, 2, AdapterConfig(kind=kind, rank=2, **options), rngs=nnx.Rngs(1))
    if learned:
        for variable in jax.tree.leaves(linear.adapter, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
            variable.set_value(variable[...] + 0.3 * draw(*variable.shape))
    return linear


@KINDS
def test_at_first_it_is_the_plain_map(kind):
    linear = out_map(kind, learned=False)
    x = draw(4, 2, 3)
    bare = out_map(kind, learned=False)
    bare.adapter = None
    bare.bias.set_value(linear.bias[...])
    np.testing.assert_allclose(linear(x), bare(x), rtol=1e-6, atol=1e-6)
    a = linear.adapter.lora_a
    assert a.shape == (2, 3, 2) and a.get_metadata("out_sharding") == ("heads", "head_dim", None)
    assert linear.adapter.lora_b.get_metadata("out_sharding") == (None, "embed")
    assert 0.5 / np.sqrt(6) < float(jnp.abs(a[...]).max()) < 1 / np.sqrt(6)
    assert not linear.adapter.lora_b[...].any()


@KINDS
def test_it_is_the_papers_formula(kind):
    linear = out_map(kind, alpha=6.0)
    x, a = draw(4, 2, 3), linear.adapter
    kernel = linear.kernel[...].reshape(6, 5) + 3.0 * a.lora_a[...].reshape(6, 2) @ a.lora_b[...]
    if kind == "dora":
        kernel = kernel / jnp.linalg.norm(kernel, axis=0) * a.magnitude[...]
    expected = x.reshape(4, 6) @ kernel + linear.bias[...]
    np.testing.assert_allclose(linear(x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(linear.plain()(x), expected, rtol=1e-4, atol=1e-4)
    assert linear.plain().adapter is None and linear.adapter is not None


def test_the_norm_is_a_constant_of_the_gradient():
    linear = out_map("dora")
    graphdef, params = nnx.split(linear)
    x, dy = draw(7, 2, 3), draw(7, 5)
    grads = jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(x) * dy))(params)
    norm = jnp.linalg.norm(linear.kernel[...].reshape(6, 5) + 8 * _product(linear.adapter), axis=0)

    def fixed(b):
        a = linear.adapter.lora_a[...].reshape(6, 2)
        return jnp.sum(x.reshape(7, 6) @ (8 * a @ b) * (linear.adapter.magnitude[...] / norm) * dy)

    np.testing.assert_allclose(
        grads["adapter"]["lora_b"][...], jax.grad(fixed)(linear.adapter.lora_b[...]), rtol=1e-4, atol=1e-4
    )


def _product(adapter):
    return adapter.lora_a[...].reshape(6, 2) @ adapter.lora_b[...]


@KINDS
def test_it_drops_what_the_adapter_reads_and_nothing_else(kind):
    x = draw(500, 2, 3)
    linear, other = out_map(kind, dropout=0.5), out_map(kind, dropout=0.5)
    other.adapter.number = 1
    still = linear(x)
    first, second = linear(x, jax.random.key(0)), other(x, jax.random.key(0))
    assert not np.allclose(first, still) and not np.allclose(first, second)
    # Dropout keeps the mean.
    runs = [linear(x[:3], jax.random.key(seed)) for seed in range(200)]
    np.testing.assert_allclose(np.mean(runs, axis=0), still[:3], atol=1.5)
    without = out_map(kind)
    np.testing.assert_array_equal(without(x, jax.random.key(0)), without(x))


@KINDS
def test_a_narrow_type_computes_narrow(kind):
    linear = out_map(kind, dtype=jnp.bfloat16)
    y = linear(draw(4, 2, 3))
    assert y.dtype == jnp.bfloat16
    assert linear.plain().kernel.dtype == jnp.float32


def test_a_high_rank_may_be_scaled_by_its_root():
    assert AdapterConfig(rank=16, alpha=8.0).scale == 0.5
    assert AdapterConfig(rank=16, alpha=8.0, rank_stabilized=True).scale == 2.0


def test_joined_maps_are_merged_first():
    normal = nnx.initializers.normal(1.0)
    maps = [
        Linear((4,), (heads, 3), axes=("embed", "heads", "head_dim"), kernel_init=normal, rngs=nnx.Rngs(heads))
        for heads in (2, 1)
    ]
    maps[0].adapter = Adapter(maps[0].kernel, 1, AdapterConfig(rank=2), rngs=nnx.Rngs(0))
    maps[0].adapter.lora_b.set_value(draw(2, 2, 3))
    x = draw(5, 4)
    both = join(maps)
    assert both.adapter is None
    np.testing.assert_allclose(both(x), jnp.concatenate([m(x) for m in maps], axis=1), rtol=1e-4, atol=1e-4)


@functools.cache
def adapted(kind, **changes):
    """A model with adapters that have learned something."""
    model = make_adapted(GPTConfig(**vars(MODEL) | changes), AdapterConfig(kind=kind, rank=2), nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, moved))


@KINDS
def test_blocks_apart_and_layers_in_a_loop_give_the_same(kind):
    model = adapted(kind)
    expected = model(TOKENS).logits
    np.testing.assert_allclose(model.unstacked()(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(adapted(kind, scan_layers=False)(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(adapted(kind, remat="full")(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_a_fresh_model_is_the_plain_one(kind):
    model = make_adapted(MODEL, AdapterConfig(kind=kind), nnx.Rngs(3))
    np.testing.assert_allclose(model(TOKENS).logits, make_model(MODEL, nnx.Rngs(3))(TOKENS).logits, atol=1e-6)


def test_layers_drop_by_keys_of_their_own():
    config = AdapterConfig(rank=2, dropout=0.5, targets=("down",))
    model = make_adapted(MODEL, config, nnx.Rngs(0))
    for name in ("lora_a", "lora_b"):
        getattr(model.layers.blocks.feed_forward.down.adapter, name).set_value(
            jnp.ones_like(getattr(model.layers.blocks.feed_forward.down.adapter, name)[...])
        )
    one, again, other = (model(TOKENS, key=jax.random.key(seed)).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


def test_targets():
    def names(**options):
        model = make_model(MODEL, nnx.Rngs(0))
        adapt(model, AdapterConfig(**options), nnx.Rngs(0))
        return {path[-1] for path, module in nnx.iter_modules(model) if getattr(module, "adapter", None) is not None}

    assert names() == {"query", "key", "value", "out", "up", "gate", "down"}
    assert names(targets=("query", "value")) == {"query", "value"}
    with pytest.raises(
        UserError,
        match=r"adapter.targets: 'valu' is not a linear layer .* there are down, gate, .*Did you mean 'value'",
    ):
        names(targets=("valu",))


def test_heads_and_routers_are_no_targets():
    config = BertConfig(
        vocab_size=32,
        max_length=8,
        num_layers=2,
        embed_dim=16,
        attention=SoftmaxConfig(num_heads=2),
        mlp=ExpertsConfig(num_experts=2),
    )
    model = make_adapted(config, AdapterConfig(), nnx.Rngs(0))
    places = {path for path, module in nnx.iter_modules(model) if isinstance(module, Adapter)}
    assert {path[:3] for path in places} == {("layers", "blocks", "attention")}
    with pytest.raises(UserError, match="adapter: RecurrentTranslator has no blocks"):
        nnx.eval_shape(lambda: make_adapted(RecurrentConfig(), AdapterConfig(), nnx.Rngs(0)))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}], ids=str)
def test_invalid_adapter_settings_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: got "):
        AdapterConfig(**wrong)
