"""Adapters as PEFT keeps them: it loads them onto the base, and computes what the merged model does."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests.changed import changed
from tests.huggingface import peers
from tests.huggingface.ours import BERT, GPT, LLAMA, MODERN, T5, written
from tests.made import made
from transformer.errors import UserError
from transformer.huggingface import checkpoint
from transformer.huggingface.adapters import to_peft
from transformer.layers.adapter import AdapterConfig, merged
from transformer.layers.position import RotaryConfig
from transformer.models.adapted import make_adapted
from transformer.models.heads import ClassificationHeadConfig

pytestmark = pytest.mark.torch

NEOX = changed(
    GPT, attention={"position": RotaryConfig(fraction=0.5)}, mlp={"activation": "gelu_exact"}, parallel_residual=True,
    tie_embeddings=False,
)  # fmt: skip
IDS = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
CLASSIFIER = dataclasses.replace(BERT, head=ClassificationHeadConfig(num_labels=3))
CASES = {
    "bert": (CLASSIFIER, {}),
    "bert, dora": (CLASSIFIER, {"kind": "dora"}),
    "bert, two maps": (CLASSIFIER, {"targets": ("query", "down")}),
    "distilbert": (changed(CLASSIFIER, token_types=0, head={"activation": "relu"}), {}),
    "modernbert": (MODERN, {}),
    "gpt2": (GPT, {}),
    "gpt2, dora": (GPT, {"kind": "dora", "targets": ("query", "value", "up")}),
    "gpt2, by the root": (GPT, {"rank_stabilized": True}),
    "gpt_neox": (NEOX, {}),
    "gpt_neox, dora": (NEOX, {"kind": "dora", "targets": ("key", "out")}),
    "llama": (LLAMA, {}),
    "t5": (T5, {}),
}


def kept(found, folder):
    folder.mkdir()
    save_file(found.tensors, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(found.config))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_merged_model_does(case, tmp_path):
    import peft
    import torch

    config, options = CASES[case]
    adapter = AdapterConfig(rank=3, alpha=5.0, **options)
    model_type = case.partition(",")[0]
    base = written(config, tmp_path / "base", model_type=model_type, extra=IDS)
    _, params = made(functools.partial(make_adapted, config, adapter), std=0.2, seed=1)
    ours = dict(nnx.to_flat_state(params))
    ours |= dict(nnx.to_flat_state(base))
    trained = {path for path in ours if "adapter" in path}
    heads = {path for path in ours if path[0] == "pooled_head"}
    # The head was trained as well: the base has another.
    ours |= {path: ours[path].replace(ours[path].get_value() * 1.5) for path in heads}
    architecture = checkpoint.architecture_of(config, model_type)
    name = architecture.class_of(config)
    values = {path: leaf.get_value() for path, leaf in ours.items()}
    found = to_peft(
        architecture.named(config, name), values, adapter, trained | heads, model=config, base=str(tmp_path / "base")
    )
    (tmp_path / "merged").mkdir()
    plain = merged(nnx.from_flat_state(ours), adapter.scale)
    checkpoint.write(tmp_path / "merged", config, plain, model_type=model_type, extra=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # Of matrices that would be missing or surplus.
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(
            peers.loaded(name, tmp_path / "base")[0], kept(found, tmp_path / "peft")
        )
    theirs, wrong = peers.loaded(name, tmp_path / "merged")
    assert not wrong
    inputs = {"input_ids": torch.tensor(peers.tokens(3, 13, config.vocab_size))}
    if model_type == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    plain = peers.loaded(name, tmp_path / "base")[0]
    with torch.no_grad():
        got, expected, before = (model.eval()(**inputs).logits.numpy() for model in (adapted, theirs, plain))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got / scale, expected / scale, atol=2e-5)
    assert np.abs(before - expected).max() > 0.1 * scale


def test_what_peft_cannot_tell():
    adapter = AdapterConfig(rank=2)
    described = nnx.to_flat_state(jax.eval_shape(functools.partial(_adapted, adapter)))
    zeros = {path: np.zeros(leaf.shape, np.float32) for path, leaf in described}
    norms = {path for path in zeros if "attention_norm" in path}
    architecture = checkpoint.architecture_of(CLASSIFIER, "bert")
    tables = architecture.named(CLASSIFIER, "BertForSequenceClassification")
    with pytest.raises(
        UserError, match=r"attention.output.LayerNorm.weight: adapter.train_also .* export the merged model"
    ):
        to_peft(tables, zeros, adapter, norms, model=CLASSIFIER, base="base")


def _adapted(adapter):
    return nnx.state(make_adapted(CLASSIFIER, adapter, nnx.Rngs(0)), nnx.Param)
