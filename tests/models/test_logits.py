"""Logits are accumulated in float32 and not rounded, whichever head gives them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.made import made
from transformer.huggingface.encoders import head_of
from transformer.layers.linear import Linear
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import Bert, BertConfig
from transformer.models.encoder_decoder import EncoderDecoder, T5Config, VaswaniConfig
from transformer.models.gpt import GPT, GPTConfig
from transformer.models.recurrent import RecurrentTranslator
from transformer.models.recurrent_config import RecurrentConfig

SMALL = {
    "vocab_size": 64,
    "max_length": 8,
    "num_layers": 1,
    "embed_dim": 32,
    "attention": SoftmaxConfig(num_heads=2),
    "dtype": "bfloat16",
}
BERT = BertConfig(**SMALL)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 64, (4, 8)))
PAIR = (TOKENS, TOKENS)

MODELS = {
    "gpt": (GPT, GPTConfig(**SMALL), (TOKENS,)),
    "gpt, untied": (GPT, GPTConfig(**SMALL, tie_embeddings=False), (TOKENS,)),
    "vaswani": (EncoderDecoder, VaswaniConfig(**SMALL), PAIR),
    "vaswani, with a bias": (EncoderDecoder, VaswaniConfig(**SMALL, tie_embeddings=False, output_bias=True), PAIR),
    "t5, untied": (EncoderDecoder, T5Config(**SMALL), PAIR),
    "recurrent": (
        RecurrentTranslator,
        RecurrentConfig(vocab_size=64, max_length=8, embed_dim=32, hidden_dim=32, dtype="bfloat16"), PAIR,
    ),
} | {
    f"bert, {head}": (Bert, dataclasses.replace(BERT, head=head_of(head, 64)), (TOKENS,))
    for head in ("masked", "pretraining", "replaced", "classification", "tokens", "answer", "choice")
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_not_rounded_to_the_compute_type(name):
    kind, config, inputs = MODELS[name]
    graphdef, params = made(lambda rngs: kind(config, rngs=rngs))
    output = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))(params, *inputs)
    for logits in (output.logits, output.pooled_logits):
        if logits is not None:
            assert logits.dtype == jnp.float32
            rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
            # One number in 65,536 is one that bfloat16 has too.
            assert np.mean(np.asarray(rounded == logits)) < 0.3


def head(dtype, use_bias=True):
    rngs = nnx.Rngs(0)
    linear = Linear((16,), (48,), axes=("embed", "vocab"), use_bias=use_bias, kernel_init=nnx.initializers.normal(0.3),
                    dtype=dtype, rngs=rngs)  # fmt: skip
    if use_bias:
        linear.bias.set_value(jax.random.normal(jax.random.key(1), (48,)))
    return linear


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 16)), jnp.float32)


def test_they_are_the_products_of_what_is_in_the_compute_type():
    linear, x = head(jnp.bfloat16), X.astype(jnp.bfloat16)
    kernel = np.asarray(linear.kernel[...].astype(jnp.bfloat16), np.float64)
    expected = np.asarray(x, np.float64) @ kernel + np.asarray(linear.bias[...], np.float64)
    np.testing.assert_allclose(linear.logits(x), expected, atol=1e-5)
    assert np.abs(np.asarray(linear(x), np.float64) - expected).max() > 1e-3


def test_in_float32_nothing_changes():
    linear = head(jnp.float32)

    def products(method):
        def loss(x, params):
            return jnp.sum(jnp.sin(getattr(nnx.merge(graphdef, params), method)(x)))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(X, params)

    graphdef, params = nnx.split(linear)
    jax.tree.map(np.testing.assert_array_equal, products("logits"), products("__call__"))


def test_the_backward_pass_multiplies_in_the_compute_type():
    graphdef, params = nnx.split(head(jnp.bfloat16))

    def loss(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params).logits(x)))

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, X.astype(jnp.bfloat16))
    dots = [eqn for eqn in traced.eqns if eqn.primitive.name == "dot_general"]
    operands = {var.aval.dtype for eqn in dots for var in eqn.invars}
    assert operands == {jnp.dtype(jnp.bfloat16)}
    gradient, _ = jax.grad(loss, (0, 1))(params, X.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
