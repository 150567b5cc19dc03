"""Weights of some layers and heads: the same as among all of them, and without the others' T×S arrays."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from tests.changed import changed
from transformer.attention.dispatch import attend
from transformer.attention.spec.mask import AttentionMask
from transformer.layers.position import RotaryConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.mixers.state import KVCache
from transformer.models.gpt import GPT, GPTConfig

B, T, S, N, H = 2, 24, 20, 6, 8
LAYERS, HEADS = (2, 0), (3, 1)
CONFIG = GPTConfig(
    vocab_size=40,
    max_length=32,
    num_layers=3,
    embed_dim=32,
    attention=SoftmaxConfig(num_heads=4, num_kv_heads=2),
    init_std=0.3,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (B, T)), jnp.int32)


def inputs(num_kv_heads):
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, S, num_kv_heads, H), (B, S, num_kv_heads, H))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def per_head_mask():
    return AttentionMask.explicit(jnp.array(np.random.default_rng(1).random((B, N, T, S)) > 0.3))


@pytest.mark.parametrize("bias_heads", [None, 1, N])
@pytest.mark.parametrize("mask", [AttentionMask.none, AttentionMask.causal, per_head_mask])
@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
def test_chosen_heads_are_those_among_all(num_kv_heads, mask, bias_heads):
    q, k, v = inputs(num_kv_heads)
    bias = bias_heads and jnp.asarray(np.random.default_rng(2).normal(size=(B, bias_heads, T, 1)), jnp.float32)
    plain, none = attend(q, k, v, mask(), bias, logit_soft_cap=3.0)
    _, every = attend(q, k, v, mask(), bias, logit_soft_cap=3.0, return_weights=True)
    for heads in ((4,), (5, 0, 2)):
        out, chosen = attend(q, k, v, mask(), bias, logit_soft_cap=3.0, return_weights=heads)
        np.testing.assert_array_equal(out, plain)
        np.testing.assert_allclose(chosen, np.asarray(every)[:, list(heads)], atol=1e-6)
    assert none is None
    assert attend(q, k, v, mask(), bias, logit_soft_cap=3.0, return_weights=())[1] is None


@pytest.mark.parametrize("head", [-1, N])
def test_a_head_that_does_not_exist(head):
    with pytest.raises(ValueError, match=f"head {head} does not exist; allowed in return_weights: 0 to 5"):
        attend(*inputs(2), return_weights=(0, head))


@functools.cache
def model(**changes):
    return GPT(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"scan_layers": False}, {"remat": "full"}, {"attention": changed(CONFIG.attention, position=RotaryConfig())}],
)
def test_chosen_layers_and_heads_are_those_among_all(changes):
    plain, every = model(**changes)(TOKENS), model(**changes)(TOKENS, return_weights=True)
    chosen = model(**changes)(TOKENS, return_weights=(LAYERS, HEADS))
    assert chosen.weights.shape == (2, B, 2, T, T)
    np.testing.assert_allclose(chosen.weights, np.asarray(every.weights)[list(LAYERS)][:, :, list(HEADS)], atol=1e-5)
    np.testing.assert_allclose(chosen.logits, plain.logits, atol=1e-4)
    assert plain.weights is None


def test_a_model_with_its_blocks_apart_gives_them_too():
    every = model()(TOKENS, return_weights=True).weights
    apart = model().unstacked()
    np.testing.assert_allclose(apart(TOKENS, return_weights=True).weights, every, atol=1e-5)
    chosen = apart(TOKENS, return_weights=(LAYERS, HEADS)).weights
    np.testing.assert_allclose(chosen, np.asarray(every)[list(LAYERS)][:, :, list(HEADS)], atol=1e-5)


def test_the_states_are_the_same():
    plain = model()(TOKENS, states=model().make_states(B, 32))
    chosen = model()(TOKENS, states=model().make_states(B, 32), return_weights=(LAYERS, HEADS))
    assert len(chosen.states) == 3 and all(isinstance(state, KVCache) for state in chosen.states)
    for got, expected in zip(jax.tree.leaves(chosen.states), jax.tree.leaves(plain.states), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert chosen.weights.shape == (2, B, 2, T, 32)


@pytest.mark.parametrize("layers", [(3,), (0, -1)])
def test_a_layer_that_does_not_exist(layers):
    with pytest.raises(ValueError, match="return_weights: got layers .*; allowed: 0 to 2"):
        model()(TOKENS, return_weights=(layers, (0,)))


LONG = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
SQUARE = 1024 * 1024


def forward(choice, tokens):
    output = model(max_length=1024)(tokens, return_weights=choice)
    return output.logits, output.weights


def arrays_of(jaxpr):
    """Every array that a program makes, those inside its loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def most_squares(choice):
    """How many heads' T×S numbers the largest array of a forward pass holds."""
    arrays = arrays_of(jax.make_jaxpr(functools.partial(forward, choice))(LONG).jaxpr)
    return max(array.size / SQUARE for array in arrays if jnp.issubdtype(array.dtype, jnp.floating))


def test_nothing_of_size_t_by_s_is_made_for_the_others():
    assert most_squares(False) < 1
    assert most_squares(True) == 3 * 4
    assert most_squares(((1,), (2,))) == 1
    assert most_squares((LAYERS, HEADS)) == 2 * 2


def test_compiled_memory_grows_with_what_is_chosen_alone():
    def squares(choice):
        analysis = jax.jit(functools.partial(forward, choice)).lower(LONG).compile().memory_analysis()
        return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / (4 * SQUARE)

    plain = squares(False)
    assert squares(((1,), (2,))) < plain + 4
    assert squares(True) > plain + 3 * 4
