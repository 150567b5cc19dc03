"""DeBERTa's checkpoints: what is refused by name, the two names of its head, and a model of ours as one of them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.changed import changed
from tests.huggingface.ours import BERT, on_one_device, written
from transformer.errors import UserError
from transformer.huggingface import checkpoint
from transformer.huggingface.deberta import _RENAMED
from transformer.layers.feed_forward import DenseConfig
from transformer.mixers.disentangled import DisentangledConfig
from transformer.models.heads import (
    ClassificationHeadConfig,
    EmbeddingHeadConfig,
    MaskedHeadConfig,
    TokensHeadConfig,
)

V3 = dataclasses.replace(
    BERT, token_types=0, norm_eps=1e-7, head=MaskedHeadConfig(), mlp=DenseConfig(dim=24, activation="gelu_exact"),
    attention=DisentangledConfig(num_heads=2, max_distance=20, num_buckets=8),
)  # fmt: skip
V2 = changed(
    V3, position_embedding="learned", head=ClassificationHeadConfig(num_labels=3, activation="gelu_exact"),
    attention={"share_projections": False, "num_buckets": None, "norm_embeddings": False},
)  # fmt: skip


def rewritten(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "config",
    [
        V3,
        V2,
        changed(V3, head=TokensHeadConfig(num_labels=4), attention={"position_to_content": False}),
        changed(V2, head=EmbeddingHeadConfig(), attention={"content_to_position": False}, token_types=2),
    ],
    ids=["v3", "v2", "content to position", "position to content"],
)
def test_a_model_of_ours_comes_back_bit_for_bit(config, tmp_path):
    params = written(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deberta-v2"
    read = checkpoint.read(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read.params(on_one_device(read.config))))
    assert not read.architecture.differences(config) and not read.notes


def test_the_head_has_two_names(tmp_path):
    """Microsoft's files have the names that transformers writes with `legacy: false`, and no name of a class."""
    params = written(V3, tmp_path)
    path = tmp_path / "model.safetensors"
    old = {ours: new for new, ours in _RENAMED.items()}
    tensors = {old.get(name, name): tensor for name, tensor in load_file(path).items()}
    assert "lm_predictions.lm_head.bias" in tensors
    tensors["mask_predictions.dense.bias"] = np.zeros(3, np.float32)
    save_file(tensors, path)
    rewritten(tmp_path, architectures=None)
    read = checkpoint.read(tmp_path)
    assert read.name == "DebertaV2ForMaskedLM" and read.config.head == MaskedHeadConfig()
    assert read.notes == ["left out, which DebertaV2ForMaskedLM does not use: mask_predictions.dense"]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read.params(on_one_device(read.config))))
    assert checkpoint.read(tmp_path, head="embedding").config.head == EmbeddingHeadConfig()
    # A file with both has two heads.
    save_file(tensors | {_RENAMED[name]: 2 * tensor for name, tensor in tensors.items() if name in _RENAMED}, path)
    both = checkpoint.read(tmp_path)
    assert "left out, which DebertaV2ForMaskedLM does not use: lm_predictions.lm_head" in both.notes[0]
    found = both.params(on_one_device(both.config))["masked_head"]["bias"]
    np.testing.assert_array_equal(found[...], 2 * params["masked_head"]["bias"][...])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_attention": False}, "relative_attention: got False; supported: True"),
        ({"conv_kernel_size": 3, "conv_act": "gelu"}, "conv_kernel_size: got 3; supported: 0"),
        ({"embedding_size": 8}, "embedding_size: got 8; supported: 16"),
        ({"attention_head_size": 4}, "attention_head_size: got 4; supported: 8"),
        ({"pooler_hidden_size": 12}, "pooler_hidden_size: got 12; supported: 16"),
        ({"pos_att_type": "c2p|p2p"}, r"pos_att_type: got 'c2p\|p2p'; supported: c2p, p2c"),
        ({"pos_att_type": {"c2p": 1}}, "pos_att_type: got {'c2p': 1}; supported: c2p, p2c"),
        ({"pos_att_type": []}, "pos_att_type: got none; supported: c2p, p2c, or both"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd: got 'batch_norm'; supported: none, layer_norm"),
        ({"position_buckets": 7}, "num_buckets: got 7; allowed: an even number"),
        ({"position_buckets": 40}, "max_distance: got 20; with 40 num_buckets allowed: 22 or more"),
        ({"position_buckets": "many"}, "position_buckets: got 'many'; allowed: a whole number"),
        ({"share_att_key": "yes"}, "share_att_key: got 'yes'; allowed: true or false"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: got False; supported: True"),
        ({"legacy": 2}, "legacy: got 2; allowed: true or false"),
        ({"share_att_key": False}, "missing: deberta.encoder.layer.0.attention.self.pos_key_proj.weight"),
        ({"norm_rel_ebd": None}, r"unknown: deberta.encoder.LayerNorm.weight \[16\]"),
        (
            {"position_buckets": 4},
            r"misshapen: deberta.encoder.rel_embeddings.weight is \[16, 16\], by config.json \[8",
        ),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    written(V3, tmp_path)
    rewritten(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        checkpoint.read(tmp_path)


def test_fields_of_the_pooler(tmp_path):
    written(V2, tmp_path)
    rewritten(tmp_path, pooler_dropout=0.2, pooler_hidden_act="tanh")
    read = checkpoint.read(tmp_path)
    assert read.config.head.activation == "tanh"
    assert read.notes == ["pooler_dropout is 0.2 there; here nothing is dropped before the pooler"]
    rewritten(tmp_path, pooler_hidden_act="silu")
    with pytest.raises(UserError, match="pooler_hidden_act: got 'silu'; supported: gelu, tanh, relu"):
        checkpoint.read(tmp_path)


def test_what_it_has_no_field_for():
    hybrid = changed(V3, pattern=(V3.attention, BERT.attention))
    with pytest.raises(UserError, match="it does not support a pattern of mixers that differ"):
        checkpoint.architecture_of(hybrid, "deberta-v2")
    with pytest.raises(UserError, match="it does not support attention of kind softmax"):
        checkpoint.architecture_of(changed(V3, attention=BERT.attention), "deberta-v2")
    with pytest.raises(UserError, match="attention.bias False"):
        checkpoint.architecture_of(changed(V3, attention={"bias": False}))
