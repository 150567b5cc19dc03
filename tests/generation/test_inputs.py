"""What decoding is given and cannot take is refused in one line: which prompt, which value, and what is allowed."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.made import made
from transformer.errors import UserError
from transformer.generation.generate import Generator
from transformer.generation.inputs import check_count, check_rows, check_seed
from transformer.generation.translator import Translator
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig
from transformer.models.recurrent import RecurrentTranslator
from transformer.models.recurrent_config import RecurrentConfig

CONFIG = GPTConfig(vocab_size=16, max_length=12, num_layers=1, embed_dim=8, attention=SoftmaxConfig(num_heads=2))

ROWS = [
    ([[-1, 5]], r"prompt 1: token 1: token id -1 is outside .* of 16; allowed: 0 to 15"),
    ([[1], [5, 3, -7]], r"prompt 2: token 3: token id -7"),
    ([[1], [16]], r"prompt 2: token 1: token id 16 .*allowed: 0 to 15"),
    ([[1], []], "prompt 2 is empty"),
    ([[1, 2.0]], r"prompt 1: token 2 is 2\.0, of type float; expected a whole number"),
    ([[1, True]], "prompt 1: token 2 is True, of type bool"),
    ([[1, None]], "prompt 1: token 2 is None"),
    ([["a", "b"]], "prompt 1: token 1 is 'a', of type str"),
    ([np.array([1.5])], "prompt 1: token 1 is .*1.5"),
    ([np.array([True])], "prompt 1: token 1 is .*True"),
    (["some text"], "prompt 1: got the text 'some text'; expected token ids: encode it"),
    ([1, 2, 3], r"prompt 1: got 1; expected a list of token ids \(a batch of one is a list in a list\)"),
    ([None], "prompt 1: got None"),
    ([{1, 2}], "prompt 1: got {1, 2}"),
    ([[[1, 2]]], r"prompt 1: token 1 is \[1, 2\], of type list"),
    ([np.ones((2, 2), int)], "prompt 1: got array"),
    ("text", "prompts: got 'text'; expected a list of prompts"),
    (None, "prompts: got None"),
    (7, "prompts: got 7"),
    (["x" * 100], r"prompt 1: got the text 'x{36}\.\.\.;"),
]


@pytest.mark.parametrize(("rows", "message"), ROWS, ids=[str(number) for number in range(len(ROWS))])
def test_rows_that_are_no_ids(rows, message):
    with pytest.raises(UserError, match=message) as caught:
        check_rows("prompt", rows, 16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 15]],
        ((1, 2), (3,)),
        np.ones((2, 3), np.int32),
        jnp.ones((2, 3), jnp.int32),
        [np.array([3], np.uint16)],
        [range(3)],
    ],
)
def test_rows_of_any_kind_of_list(rows):
    check_rows("prompt", rows, 16)


def test_without_a_vocabulary_any_whole_number_from_0_on_is_an_id():
    check_rows("source", [[10**9]], None)
    with pytest.raises(UserError, match="source 1: token 1: token id -1 .*allowed: 0 or more"):
        check_rows("source", [[-1]], None)


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "3", None])
def test_counts(value):
    with pytest.raises(UserError, match=r"chunk: got .*; allowed: a whole number, 1 or more"):
        check_count("chunk", value)
    check_count("chunk", np.int64(1))


@pytest.mark.parametrize("value", [-1, 2**32, 0.5, True, "3", None])
def test_seeds(value):
    with pytest.raises(UserError, match=r"seed: got .*; allowed: a whole number, 0 to 2\*\*32 - 1"):
        check_seed(value)
    for allowed in (0, 2**32 - 1, np.uint32(7)):
        check_seed(allowed)


@pytest.fixture(scope="module")
def generator():
    return Generator(CONFIG, end_of_text=0), made(lambda rngs: GPT(CONFIG, rngs=rngs))[1]


# Without the suite's own checker of types, as a user calls it.
generate, search = inspect.unwrap(Generator.generate), inspect.unwrap(Generator.search)
translate = inspect.unwrap(Translator.translate)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: got none; expected at least one"),
        ([[-1, 5]], {}, "prompt 1: token 1: token id -1"),
        ([[1]], {"max_tokens": 0}, "max_tokens: got 0; allowed"),
        ([[1]], {"max_tokens": 2.0}, "max_tokens: got 2.0; allowed"),
        ([[1]], {"max_tokens": True}, "max_tokens: got True; allowed"),
        ([[1], [1] * 12], {}, "prompt 2 has 12 tokens; .* context of 12; shorten it to at most 11"),
        ([[1], [1] * 9], {"max_tokens": 4}, "prompt 2 has 9 tokens; .*ask for at most 3"),
    ],
)
def test_what_a_generator_refuses(generator, prompts, options, message):
    writer, params = generator
    # At once, and not only when the first token is asked for.
    for method in (generate, search):
        with pytest.raises(UserError, match=message):
            method(writer, params, prompts, **{"max_tokens": 3} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk: got 0"),
        ({"chunk": -1}, "chunk: got -1"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 1.5}, "seed: got"),
    ],
)
def test_how_a_generator_cannot_draw(generator, options, message):
    writer, params = generator
    with pytest.raises(UserError, match=message):
        generate(writer, params, [[1]], max_tokens=3, **options)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (
            [[3], [-1, 5]],
            {},
            "source 2: token 1: token id -1 is outside the model's vocabulary of 11; allowed: 0 to 10",
        ),
        ([[1, 2.5]], {}, "source 1: token 2 is 2.5, of type float"),
        (["text"], {}, "source 1: got the text 'text'"),
        ("text", {}, "sources: got 'text'"),
        ([[1]], {"max_tokens": 1.5}, "max_tokens: got 1.5"),
        ([[1]], {"max_tokens": False}, "max_tokens: got False"),
        ([[1]], {"max_ratio": float("nan")}, "max_ratio: got nan"),
        ([[1]], {"max_ratio": float("inf")}, "max_ratio: got inf"),
        ([[1]], {"max_ratio": "2"}, "max_ratio: got '2'"),
        ([[1]], {"seed": -1}, "seed: got -1"),
    ],
)
def test_what_a_translator_refuses(sources, options, message):
    config = RecurrentConfig(source_vocab_size=11, vocab_size=12, embed_dim=8, hidden_dim=16, max_length=20)
    translator = Translator(lambda rngs: RecurrentTranslator(config, rngs=rngs), start_token=0, end_of_text=1)
    with pytest.raises(UserError, match=message):
        translate(translator, nnx.State({}), sources, **options)
