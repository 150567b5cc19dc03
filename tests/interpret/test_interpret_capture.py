"""Attention maps of a text: what they hold, what they cost, and what cannot be asked."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from transformer.errors import UserError
from transformer.interpret import AttentionMaps, attention_maps
from transformer.interpret.capture import bytes_needed, check_memory, readable
from transformer.interpret.labels import visible
from transformer.mixers.differential import DifferentialConfig
from transformer.mixers.fast_weights import FastWeightConfig
from transformer.mixers.linear import LinearAttentionConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig

T = 7
IDS = np.random.default_rng(0).integers(0, 40, T)


@functools.cache
def model(max_length=16):
    config = GPTConfig(
        vocab_size=40,
        max_length=max_length,
        num_layers=3,
        embed_dim=32,
        attention=SoftmaxConfig(num_heads=4),
        init_std=0.3,
    )
    return GPT(config, rngs=nnx.Rngs(0))


def test_all_of_them():
    maps = attention_maps(model(), IDS)
    assert maps.weights_LNTS.shape == (3, 4, T, T)
    assert maps.weights_LNTS.dtype == np.float32
    np.testing.assert_allclose(maps.weights_LNTS.sum(-1), 1, atol=1e-5)
    assert maps.rows == maps.columns == tuple(map(str, IDS))


def test_some_of_them_with_labels():
    labels = list("abcdefg")
    maps = attention_maps(model(), IDS.tolist(), labels, layers=[2, 0, 2], heads=[3])
    assert (maps.layers, maps.heads, maps.rows) == ((0, 2), (3,), tuple(labels))
    expected = attention_maps(model(), IDS).weights_LNTS[[0, 2]][:, [3]]
    np.testing.assert_allclose(maps.weights_LNTS, expected, atol=1e-5)


def of_kinds(*mixers):
    config = GPTConfig(vocab_size=40, max_length=16, num_layers=len(mixers), embed_dim=32, pattern=mixers)
    return GPT(config, rngs=nnx.Rngs(0))


def test_layers_whose_weights_are_no_distributions_are_left_out():
    delta = FastWeightConfig(kind="delta", num_heads=4)
    hybrid = of_kinds(delta, SoftmaxConfig(num_heads=4), delta, LinearAttentionConfig(num_heads=4))
    maps = attention_maps(hybrid, IDS)
    assert maps.layers == (1, 3)
    np.testing.assert_allclose(maps.weights_LNTS.sum(-1), 1, atol=1e-4)
    with pytest.raises(
        UserError, match="layers: got 2; weights of delta attention are not distributions; allowed: 1, 3"
    ):
        attention_maps(hybrid, IDS, layers=[1, 2])
    with pytest.raises(UserError, match="weights of differential and delta attention are not distributions"):
        attention_maps(of_kinds(DifferentialConfig(num_heads=4), delta), IDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 3]}, "layers: got 3; allowed: 0 to 2"),
        ({"heads": [-1]}, "heads: got -1; allowed: 0 to 3"),
        ({"heads": []}, "heads: got none"),
        ({"tokens": []}, "no tokens"),
        ({"max_bytes": 1000}, "need 7.7 KiB, above the limit of 1000 B; one head of one layer needs 1.1 KiB"),
    ],
)
def test_what_cannot_be_captured(options, message):
    with pytest.raises(UserError, match=message):
        attention_maps(model(), options.pop("tokens", IDS), **options)


def test_labels_for_other_tokens():
    with pytest.raises(ValueError, match="2 labels for 7 tokens"):
        attention_maps(model(), IDS, ["a", "b"])
    with pytest.raises(ValueError, match="weights have shape"):
        AttentionMaps(("a",), ("a",), (0,), (0, 1), np.zeros((1, 1, 1, 1), np.float32))


def test_the_limit_says_what_would_fit():
    check_memory(12, 12, 1024, 1024, 2 << 30)
    with pytest.raises(UserError, match=r"; 8 layers of 12 heads or 12 layers of 8 heads would fit"):
        check_memory(12, 12, 1024, 1024, 1000 << 20)
    assert bytes_needed(8, 12, 1024, 1024) <= 1000 << 20 < bytes_needed(9, 12, 1024, 1024)
    assert bytes_needed(12, 8, 1024, 1024) <= 1000 << 20 < bytes_needed(12, 9, 1024, 1024)


@pytest.mark.parametrize("choice", [True, ((0,), (1,)), ((0, 1, 2), (1, 3))])
def test_the_compiler_takes_no_more_than_was_said(choice):
    length = 512
    graphdef, params = nnx.split(model(length))

    def memory(wanted):
        program = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens, return_weights=wanted))
        return program.lower(params, jax.ShapeDtypeStruct((1, length), np.int32)).compile().memory_analysis()

    plain, capture = memory(False), memory(choice)
    layers, heads = (3, 4) if choice is True else map(len, choice)
    # What is said is what comes on top of the model's own work.
    on_top = (
        capture.temp_size_in_bytes
        + capture.output_size_in_bytes
        - plain.temp_size_in_bytes
        - plain.output_size_in_bytes
    )
    assert 0 < on_top <= bytes_needed(layers, heads, length, length)


def test_readable():
    assert [readable(count) for count in (5, 2048, 3 << 20, 5 << 29)] == ["5 B", "2.0 KiB", "3.0 MiB", "2.5 GiB"]


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" the", "␣the"),
        ("a\n\t", "a↵⇥"),
        ("", "∅"),
        ("你好", "你好"),
        ("👩‍🚀", "👩‍🚀"),
        ("\u200d", "‹U+200D›"),
        ("\u202ecod", "‹U+202E›cod"),
        ("\x00", "‹U+0000›"),
        ("\u0301", "◌\u0301"),
        ("</script>", "</script>"),
    ],
)
def test_labels_hide_nothing(token, label):
    assert visible(token) == label
