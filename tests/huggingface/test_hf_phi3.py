"""Phi-3's checkpoints: the names of LongRoPE, what is refused by name, and a model of ours as one of them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.changed import changed
from tests.huggingface.ours import LLAMA, on_one_device, written
from transformer.errors import UserError
from transformer.huggingface import checkpoint
from transformer.layers.position import RotaryConfig, RotaryScaling

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 4.0, 9.0]}
SCALING = RotaryScaling(
    kind="longrope", factor=2.0, original_length=12, short_factors=(1.0, 1.1, 1.2, 1.5),
    long_factors=(1.0, 2.0, 4.0, 9.0),
)  # fmt: skip
PHI = changed(LLAMA, attention={"position": RotaryConfig(scaling=SCALING), "window": 6})


def read_of(fields):
    return checkpoint.ARCHITECTURES["phi3"].config(fields, "Phi3ForCausalLM", "phi3")[0]


@pytest.mark.parametrize(
    "config",
    [
        PHI,
        changed(PHI, tie_embeddings=True, attention={"window": None, "position": RotaryConfig(fraction=0.5)}),
        changed(PHI, attention={"position": RotaryConfig(scaling=dataclasses.replace(SCALING, attention_factor=1.2))}),
    ],
    ids=["longrope", "part of each head", "its own attention factor"],
)
def test_a_model_of_ours_comes_back_bit_for_bit(config, tmp_path):
    params = written(config, tmp_path, model_type="phi3")
    read = checkpoint.read(tmp_path)
    assert read.name == "Phi3ForCausalLM" and not read.architecture.differences(config) and not read.notes
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read.params(on_one_device(read.config))))


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_the_names_of_longrope(name):
    """Phi-3's first files have other names of it, and the original length outside of the section."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 24}
    rope = {"rope_scaling": {"type": name, **FACTORS}, "original_max_position_embeddings": 12}
    assert read_of(sizes | rope).attention.position.scaling == SCALING
    # Without it, the length is theirs by default, whatever the section has; a factor below 1 scales nothing.
    rope = {"type": name, "factor": 0.5, "original_max_position_embeddings": 12, **FACTORS}
    plain = read_of(sizes | {"rope_scaling": rope}).attention.position.scaling
    assert plain.original_length == 4096 and plain.factor == 1 and plain.magnitude == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_factor": None}, "short_factor: got None; allowed: a list of numbers"),
        ({"long_factor": 4.0}, "long_factor: got 4.0; allowed: a list of numbers"),
        ({"long_factor": [1.0, "x", 2.0, 3.0]}, "long_factor: got 'x'; allowed: a number"),
        ({"long_factor": [1.0]}, r"long_factors: got .*; allowed: as many as short_factors \(4\)"),
        ({"attention_factor": "high"}, "attention_factor: got 'high'; allowed: a number"),
        ({"rope_type": "dynamic"}, "rope_type: got 'dynamic'; supported: default, linear, llama3, longrope, yarn"),
        ({"slowness": 2}, "rope_parameters: fields that are not known: slowness"),
    ],
)
def test_what_is_refused(change, message):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 12, **FACTORS} | change
    fields = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 24, "rope_parameters": rope}
    with pytest.raises(UserError, match=message):
        read_of(fields)


def test_factors_that_do_not_fit_its_heads():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 12, **FACTORS}
    fields = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 24, "rope_parameters": rope}
    with pytest.raises(UserError, match="it has 4 longrope factors for 8 pairs of features; allowed: one each"):
        read_of(fields)
    with pytest.raises(UserError, match="sliding_window: got 1; allowed: a whole number from 2"):
        read_of(fields | {"sliding_window": 1})
    with pytest.raises(UserError, match="original_max_position_embeddings: got 1.5; allowed: a whole number from 2"):
        read_of(fields | {"original_max_position_embeddings": 1.5})
