"""Checkpoints in both directions without transformers: layouts, names, and everything that may be wrong with one."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.changed import changed
from tests.huggingface.ours import BERT, GPT, LLAMA, MODERN, T5, on_one_device, params_of, written
from transformer.errors import UserError
from transformer.huggingface import checkpoint
from transformer.huggingface.mapping import ByHead, Matrix, Row, TableLayout, Vector
from transformer.layers.position import RotaryConfig
from transformer.mixers.fast_weights import FastWeightConfig
from transformer.models.heads import (
    ClassificationHeadConfig,
    EmbeddingHeadConfig,
    PretrainingHeadConfig,
    ReplacedHeadConfig,
    TokensHeadConfig,
)
from transformer.models.recurrent_config import RecurrentConfig


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        (Matrix(), [(6, 8)]),
        (Matrix(), [(6, 2, 4), (6, 1, 4), (6, 1, 4)]),
        (Matrix(num_in=2), [(3, 2, 5)]),
        (Matrix(transposed=False), [(6, 2, 4), (6, 2, 4)]),
        (Vector(), [(2, 4), (1, 4), (1, 4)]),
        (ByHead(), [(6, 2, 4)] * 3),
        (ByHead(), [(2, 4)] * 3),
        (TableLayout(), [(5, 3)]),
        (TableLayout(skipped=2), [(5, 3)]),
        (Row(), [(7,)]),
    ],
)
def test_layouts_give_what_they_take(layout, shapes):
    ours = [np.random.default_rng(n).normal(size=shape) for n, shape in enumerate(shapes)]
    theirs = layout.give(ours)
    assert theirs.shape == layout.shape(shapes)
    for which, one in enumerate(ours):
        assert np.array_equal(layout.take(theirs, shapes, which), one)


@pytest.mark.parametrize("config", [BERT, MODERN, GPT, T5], ids=lambda config: config.family)
def test_a_model_of_ours_comes_back_bit_for_bit(config, tmp_path):
    params = written(config, tmp_path)
    read = checkpoint.read(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read.params(on_one_device(config))))
    assert not read.architecture.differences(config)


def test_in_several_files_and_in_bfloat16(tmp_path):
    params = written(GPT, tmp_path, limit=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = checkpoint.read(tmp_path).params(on_one_device(GPT))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
    small = tmp_path / "small"
    written(GPT, small, dtype="bfloat16")
    near = checkpoint.read(small).params(on_one_device(GPT))
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(near), strict=True):
        np.testing.assert_allclose(one, other, rtol=2**-8)


def test_each_device_reads_its_own_part(tmp_path):
    """The stacks are sharded over layers as well as over other dims."""
    params = written(GPT, tmp_path)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def placed(leaf):
        names = [
            name if size % count == 0 else None
            for size, (name, count) in zip(leaf.shape, (("a", 2), ("b", 4)), strict=False)
        ]
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    read = checkpoint.read(tmp_path).params(jax.tree.map(placed, on_one_device(GPT)))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(read))


@pytest.mark.parametrize("config", [BERT, GPT, LLAMA], ids=["bert", "gpt2", "llama"])
@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "model.", "module._orig_mod.model."])
def test_wrapped_checkpoints(wrapper, config, tmp_path):
    params = written(config, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({wrapper + name: tensor for name, tensor in load_file(path).items()}, path)
    read = checkpoint.read(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read.params(on_one_device(config))))
    assert f"the names of all tensors begin with {wrapper}, which was taken off" in read.notes


def test_several_labels_at_once_are_read_and_written(tmp_path):
    config = dataclasses.replace(BERT, head=ClassificationHeadConfig(num_labels=3, multi_label=True))
    params = written(config, tmp_path)
    path = tmp_path / "config.json"
    assert json.loads(path.read_text())["problem_type"] == "multi_label_classification"
    read = checkpoint.read(tmp_path)
    assert read.config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read.params(on_one_device(config))))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": "ranking"}))
    with pytest.raises(UserError, match="problem_type: got 'ranking'; supported: 'single_label_classification', "):
        checkpoint.read(tmp_path)


def test_old_names_and_names_without_a_prefix(tmp_path):
    params = written(BERT, tmp_path)
    path = tmp_path / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(path)
    assert "embeddings.LayerNorm.weight" in tensors
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    tensors["embeddings.position_ids"] = np.arange(BERT.max_length)[None]
    save_file(tensors, str(path))
    read = checkpoint.read(tmp_path)
    assert read.config == BERT and not read.notes
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read.params(on_one_device(BERT))))


def test_a_larger_head_is_read_where_all_of_it_is_there_and_a_smaller_one_where_it_is_asked_for(tmp_path):
    written(dataclasses.replace(BERT, head=PretrainingHeadConfig()), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    assert checkpoint.read(tmp_path).config.head.kind == "pretraining"
    smaller = checkpoint.read(tmp_path, head="embedding")
    assert smaller.config.head == EmbeddingHeadConfig(pooler="tanh")
    assert smaller.notes == [
        "left out, which BertModel does not use: cls.predictions, cls.predictions.transform.LayerNorm, "
        "cls.predictions.transform.dense, cls.seq_relationship"
    ]
    with pytest.raises(UserError, match="missing: classifier.weight"):
        checkpoint.read(tmp_path, head="classification")
    with pytest.raises(UserError, match="head: got 'heart'; bert has answer, choice, classification"):
        checkpoint.read(tmp_path, head="heart")


def test_all_disagreements_are_reported_in_one_error(tmp_path):
    written(BERT, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["embeddings.word_embeddings.weight"] = np.zeros((49, BERT.embed_dim), np.float32)
    tensors["encoder.layer.2.output.dense.bias"] = np.zeros(BERT.embed_dim, np.float32)
    save_file(tensors, str(path))
    with pytest.raises(UserError) as caught:
        checkpoint.read(tmp_path)
    said = str(caught.value)
    assert "3 tensors do not agree with its config.json" in said
    assert "missing: bert.encoder.layer.1.output.dense.bias [16]" in said
    assert "misshapen: bert.embeddings.word_embeddings.weight is [49, 16], by config.json [50, 16]" in said
    assert "unknown: bert.encoder.layer.2.output.dense.bias [16]" in said


def test_tied_tensors_that_differ_are_refused(tmp_path):
    written(GPT, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": np.ones((GPT.vocab_size, GPT.embed_dim), np.float32)}, str(path))
    with pytest.raises(UserError, match="contradicts: lm_head.weight is another tensor than transformer.wte.weight"):
        checkpoint.read(tmp_path)


def test_a_number_that_is_not_finite(tmp_path):
    written(BERT, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.1.output.dense.bias"][3] = np.nan
    save_file(tensors, str(path))
    with pytest.raises(UserError, match="numbers that are not finite in layers.blocks.feed_forward.down.bias"):
        checkpoint.read(tmp_path).params(on_one_device(BERT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bret"}, r"model_type: got 'bret'; supported: bert, .* Did you mean 'bert'\?"),
        ({"model_type": None}, "model_type: got None; supported: bert"),
        (
            {"architectures": ["BertLMHeadModel"]},
            "architectures: got 'BertLMHeadModel'; supported of bert: BertForMaskedLM",
        ),
        (
            {"hidden_act": "quick_gelu", "is_decoder": True, "num_hidden_layers": 0},
            r"is_decoder: got True; supported: False; .*num_hidden_layers: got 0; .*hidden_act: got 'quick_gelu'; supported",
        ),
        ({"model_type": ["bert"]}, r"model_type: got \['bert'\]; supported"),
        ({"architectures": {"a": 1}}, r"architectures: got \{'a': 1\}; supported of bert"),
        ({"architectures": [["x"]]}, r"architectures: got \['x'\]; supported of bert"),
        ({"id2label": ["a", "b"]}, "id2label: supported: a name for each number from 0 up"),
        ({"id2label": {"x": "a"}}, "id2label: supported: a name for each number from 0 up"),
        ({"num_attention_heads": 5}, r"attention.num_heads: got 5; allowed: a divisor of embed_dim \(16\)"),
        ({"hidden_size": "wide"}, "hidden_size: got 'wide'; allowed: a whole number from 1 to"),
        (
            {"hidden_size": 10**30},
            "hidden_size: got 1000000000000000000000000000000; allowed: a whole number from 1 to",
        ),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: got 1000000; allowed: a whole number from 1 to 10,000"),
        ({"hidden_act": [["gelu"]]}, r"hidden_act: got \[\['gelu'\]\]; supported"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps: got 'small'; allowed: a number"),
        ({"initializer_range": float("nan")}, "initializer_range: got nan; allowed: a number"),
        ({"hidden_dropout_prob": {}}, "hidden_dropout_prob: got {}; allowed: a number"),
    ],
)
def test_configs_that_are_not_supported(tmp_path, change, message):
    written(BERT, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": "linear"}, "rope_scaling: got 'linear'; allowed: a mapping of fields"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor: got None; allowed: a number"),
        ({"rope_parameters": {"rope_theta": 1e4, "ramp": 2, "base": 1}}, "fields that are not known: base, ramp"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate: got False; supported: true",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type: got \['linear'\]; supported"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta: got 'x'; allowed: a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: got 'no'; allowed: true or false"),
        ({"attention_bias": 0.5}, "attention_bias: got 0.5; allowed: true or false"),
    ],
)
def test_decoders_that_are_not_supported(tmp_path, change, message):
    written(LLAMA, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": None} | change))
    with pytest.raises(UserError, match=message):
        checkpoint.read(tmp_path)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no config.json in this folder"):
        checkpoint.read(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="not a mapping of fields"):
        checkpoint.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "model_type"),
    [
        (BERT, {}, "bert"),
        (BERT, {"token_types": 0, "head": ClassificationHeadConfig(activation="relu")}, "distilbert"),
        (BERT, {"embedding_size": 8, "head": ReplacedHeadConfig()}, "electra"),
        (MODERN, {}, "modernbert"),
        (MODERN, {"head": TokensHeadConfig(dense="gelu_exact", bias=False)}, "modernbert"),
        (BERT, {"head": TokensHeadConfig()}, "bert"),
        (GPT, {}, "gpt2"),
        (GPT, {"attention": {"position": RotaryConfig(fraction=0.5)}, "parallel_residual": True}, "gpt_neox"),
        (LLAMA, {}, "llama"),
        (LLAMA, {"attention": {"window": 4}}, "mistral"),
        (LLAMA, {"attention": {"qk_norm": True}}, "qwen3"),
        (T5, {}, "t5"),
    ],
)
def test_what_a_model_is_written_as(config, changes, model_type):
    assert checkpoint.architecture_of(changed(config, **changes)).model_type == model_type


def test_layers_that_alternate_as_qwen_may_write_them():
    read = checkpoint.ARCHITECTURES["qwen2"].config
    fields = {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 28}
    full, local = "full_attention", "sliding_attention"
    with pytest.raises(
        UserError, match="layer_types: got full_attention, sliding_attention; supported: the same in all"
    ):
        read(fields | {"layer_types": [full, local]}, "Qwen2ForCausalLM", "qwen")
    for kinds, window in (([full, full], None), ([local, local], 8)):
        assert read(fields | {"layer_types": kinds}, "Qwen2ForCausalLM", "qwen")[0].attention.window == window
    assert read(fields, "Qwen2ForCausalLM", "qwen")[0].attention.window is None


def test_a_model_that_is_nothing_of_theirs():
    layered = dataclasses.replace(MODERN, head=TokensHeadConfig(dense="tanh", bias=False))
    with pytest.raises(UserError, match="the nearest, modernbert, does not support head.dense 'tanh'"):
        checkpoint.architecture_of(layered)
    sinks = changed(GPT, attention={"window": 4, "sinks": 2})
    with pytest.raises(
        UserError,
        match="cannot be written as any architecture of transformers; the nearest, gpt2, does not support attention.window 4",
    ):
        checkpoint.architecture_of(sinks)
    with pytest.raises(UserError, match="cannot be written as gpt2; it does not support norm 'rms_norm'"):
        checkpoint.architecture_of(dataclasses.replace(GPT, norm="rms_norm"), "gpt2")
    recurrent = RecurrentConfig(vocab_size=20, embed_dim=4, hidden_dim=4)
    with pytest.raises(UserError, match="no Hugging Face architecture matches family 'recurrent'"):
        checkpoint.architecture_of(recurrent)
    hybrid = dataclasses.replace(GPT, pattern=(FastWeightConfig(num_heads=2), GPT.attention))
    with pytest.raises(UserError, match="does not support a pattern of mixers that differ"):
        checkpoint.architecture_of(hybrid)
    with pytest.raises(UserError, match="Did you mean 'gpt2'"):
        checkpoint.architecture_of(GPT, "gpt")


def test_parameters_are_read_into_a_model(tmp_path):
    params = written(T5, tmp_path)
    assert dict(nnx.to_flat_state(params)).keys() == dict(nnx.to_flat_state(params_of(T5, seed=5))).keys()
