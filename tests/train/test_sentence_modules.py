"""An embedding model of sentence-transformers: its modules in and out, and what it does with a text, against torch by hand."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from manyheads.run import Run
from tests.huggingface.ours import BERT, BERT_SPECIAL, tokenizer_json, write_bert, written
from train.commands.cli import main
from train.huggingface.export import export
from train.huggingface.import_checkpoint import import_checkpoint
from train.run.run_files import load_run
from transformer.errors import ConfigError, UserError
from transformer.models.embedding_head import (
    DenseLayerConfig,
    EmbeddingHeadConfig,
    LayerNormLayerConfig,
    NormalizeLayerConfig,
)

pytestmark = pytest.mark.usefixtures("one_device")

TEXTS = ["the cat sat", "a mat and some dogs run over the hills far away", "far"]
TANH = "torch.nn.modules.activation.Tanh"
FLAGS = {
    "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens", "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}  # fmt: skip


@pytest.fixture
def bert(tmp_path):
    write_bert(tmp_path / "bert")
    return tmp_path / "bert"


def save(folder, name, data):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data), "utf-8")


def add_modules(folder, kinds, pooling=None, **configs):
    """modules.json, and the config.json of each module."""
    modules = [
        {"idx": number, "name": str(number), "path": f"{number}_{kind}" if number else "", "type": f"x.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    save(folder, "modules.json", modules)
    save(folder, "1_Pooling/config.json", pooling or {"word_embedding_dimension": 16, FLAGS["mean"]: True})
    for place, data in configs.items():
        save(folder, f"{place.removeprefix('at_')}/config.json", data)


def add_tensors(folder, place, **tensors):
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(len(place))
    made = {name.replace("_", "."): torch.randn(shape, generator=generator) for name, shape in tensors.items()}
    (folder / place).mkdir(exist_ok=True)
    save_file(made, folder / place / "model.safetensors")
    return made


def hidden_of(folder, texts):
    """The hidden states of each text's tokens, by transformers."""
    import torch
    import transformers
    from tokenizers import Tokenizer

    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        return [model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0] for text in texts]


def pooled(x, how):
    """By the formulas of sentence-transformers' Pooling, of a text's hidden states [T, D]."""
    import torch

    if how == "weighted_mean":
        weights = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None]
        return (x * weights).sum(0) / weights.sum()
    return {
        "cls": lambda: x[0], "last": lambda: x[-1], "max": lambda: x.max(0).values, "mean": lambda: x.mean(0),
        "mean_sqrt_len": lambda: x.sum(0) / len(x) ** 0.5,
    }[how]()  # fmt: skip


def embedded(run, texts=TEXTS, **options):
    return Run(run, load_run(run)).embed(texts, **options)


def brought(folder, run, **options):
    return import_checkpoint(str(folder), run, **{"verify": False} | options)


@pytest.mark.torch
def test_dense_and_normalize_by_hand(bert, tmp_path, capsys):
    import torch

    dense = {"in_features": 16, "out_features": 8, "bias": True, "activation_function": TANH}
    add_modules(bert, ["Transformer", "Pooling", "Dense", "Normalize"], at_2_Dense=dense)
    weights = add_tensors(bert, "2_Dense", linear_weight=(8, 16), linear_bias=(8,))
    run = brought(bert, tmp_path / "run", verify=True)
    assert json.loads((run / "parity.json").read_text())["inputs"]["text"]["vectors"]["relative"] < 1e-5
    expected = [
        torch.nn.functional.normalize(
            torch.tanh(weights["linear.weight"] @ x.mean(0) + weights["linear.bias"]), dim=0
        ).numpy()
        for x in hidden_of(bert, TEXTS)
    ]
    found = embedded(run)
    assert found.shape == (3, 8)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    head = load_run(run).config.model.head
    assert head == EmbeddingHeadConfig(
        pooling="mean", pooler="tanh", layers=(DenseLayerConfig(dim=8), NormalizeLayerConfig())
    )
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    capsys.readouterr()
    out = tmp_path / "x.npy"
    assert main(["embed", str(run), "--file", str(tmp_path / "texts.txt"), "--out", str(out)]) == 0
    assert "3 texts, 8 numbers each (mean pooling)" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(out), expected, atol=1e-5)


@pytest.mark.torch
def test_several_layers_in_their_order_by_hand(bert, tmp_path):
    import torch

    first = {
        "in_features": 32,
        "out_features": 6,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    last = {
        "in_features": 6, "out_features": 5, "bias": True, "activation_function": "torch.nn.modules.activation.GELU",
        "use_residual": True,
    }  # fmt: skip
    add_modules(
        bert, ["Transformer", "Pooling", "Dense", "LayerNorm", "Dropout", "Dense"],
        {"embedding_dimension": 16, "pooling_mode": ["mean", "max"]},
        at_2_Dense=first, at_3_LayerNorm={"dimension": 6}, at_4_Dropout={"dropout": 0.2}, at_5_Dense=last,
    )  # fmt: skip
    one = add_tensors(bert, "2_Dense", linear_weight=(6, 32))
    two = add_tensors(bert, "3_LayerNorm", norm_weight=(6,), norm_bias=(6,))
    three = add_tensors(bert, "5_Dense", linear_weight=(5, 6), linear_bias=(5,), residual_weight=(5, 6))
    expected = []
    for x in hidden_of(bert, TEXTS):
        x = one["linear.weight"] @ torch.cat([x.mean(0), x.max(0).values])
        x = torch.nn.functional.layer_norm(x, (6,), two["norm.weight"], two["norm.bias"])
        y = torch.nn.functional.gelu(three["linear.weight"] @ x + three["linear.bias"])
        expected.append((y + three["residual.weight"] @ x).numpy())
    run = brought(bert, tmp_path / "run", verify=True)
    np.testing.assert_allclose(embedded(run), expected, atol=2e-5)
    # Out and in again, bit for bit.
    out = export(run, tmp_path / "out", verify=True)
    again = brought(out, tmp_path / "again")
    before, after = load_run(run), load_run(again)
    assert before.config.model == after.config.model
    assert jax.tree.all(jax.tree.map(np.array_equal, before.params, after.params))
    names = [module["type"].rpartition(".")[2] for module in json.loads((out / "modules.json").read_text())]
    assert names == ["Transformer", "Pooling", "Dense", "LayerNorm", "Dense"]
    with pytest.raises(
        UserError, match="pooling: got 'cls'; the model's layers after pooling .* need its own, mean and max"
    ):
        embedded(run, pooling="cls")


@pytest.mark.torch
@pytest.mark.parametrize("how", [*FLAGS, "several"])
def test_each_pooling_by_hand(how, bert, tmp_path):
    import torch

    names = ["cls", "max", "mean", "last"] if how == "several" else [how]
    add_modules(bert, ["Transformer", "Pooling"], {FLAGS[name]: True for name in names})
    run = brought(bert, tmp_path / "run", verify=True)
    expected = [torch.cat([pooled(x, name) for name in names]).numpy() for x in hidden_of(bert, TEXTS)]
    # Without the module Normalize, vectors are not scaled.
    np.testing.assert_allclose(embedded(run), expected, atol=1e-5)
    scaled = embedded(run, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), 1, atol=1e-6)
    out = export(run, tmp_path / "out", verify=False)
    assert load_run(brought(out, tmp_path / "again")).config.model == load_run(run).config.model


PROMPTS = {"prompts": {"query": "the cat ", "other": "dogs "}, "default_prompt_name": "other"}


@pytest.mark.torch
@pytest.mark.parametrize("include", [True, False])
def test_prompts(include, bert, tmp_path, capsys):
    add_modules(bert, ["Transformer", "Pooling"], {"pooling_mode": "mean", "include_prompt": include})
    save(bert, "config_sentence_transformers.json", PROMPTS | {"similarity_fn_name": "dot"})
    run = brought(bert, tmp_path / "run")
    said = capsys.readouterr().out
    assert "prompts: query, other; other is put before each text" in said and "compared by dot" in said
    for name, prompt, tokens in ((None, "dogs ", 1), ("query", "the cat ", 2), ("document", "", 0)):
        hidden = hidden_of(bert, [prompt + text for text in TEXTS])
        first = 0 if include or not tokens else 1 + tokens
        np.testing.assert_allclose(
            embedded(run, prompt_name=name), [x[first:].mean(0).numpy() for x in hidden], atol=1e-5
        )
    with pytest.raises(
        UserError, match="prompt_name: got 'quer'; this model has query, document, other. Did you mean 'query'"
    ):
        embedded(run, prompt_name="quer")
    out = export(run, tmp_path / "out", verify=False)
    again = brought(out, tmp_path / "again")
    kept = load_run(again).tokenizer.conventions.embedding
    assert kept == load_run(run).tokenizer.conventions.embedding and kept["similarity"] == "dot"
    (tmp_path / "texts.txt").write_text("far\n")
    capsys.readouterr()
    arguments = ["--file", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "x.npy"), "--prompt-name", "query"]
    assert main(["embed", str(again), *arguments]) == 0
    assert "(mean pooling, prompt 'the cat ')" in capsys.readouterr().out


def test_length_and_case_of_texts(tmp_path, capsys):
    folder = tmp_path / "bert"
    written(BERT, folder, extra={"pad_token_id": 0})
    tokenizer_json(folder, BERT_SPECIAL)
    about = json.loads((folder / "tokenizer.json").read_text())
    about["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(about))
    add_modules(folder, ["Transformer", "Pooling", "Normalize"])
    plain = brought(folder, tmp_path / "plain")
    save(folder, "sentence_bert_config.json", {"max_seq_length": 5, "do_lower_case": True})
    run = brought(folder, tmp_path / "run")
    assert "texts are cut after 5 tokens" in capsys.readouterr().out
    lower = embedded(plain, ["the cat sat"])
    assert np.array_equal(embedded(run, ["THE cat Sat on a mat"]), lower) and not np.array_equal(
        embedded(plain, ["THE cat Sat on a mat"]), lower
    )
    out = export(run, tmp_path / "out", verify=False)
    assert json.loads((out / "sentence_bert_config.json").read_text()) == {"max_seq_length": 5, "do_lower_case": True}
    again = load_run(brought(out, tmp_path / "again")).tokenizer
    assert again.conventions.embedding == load_run(run).tokenizer.conventions.embedding
    assert again.fingerprint() == load_run(run).tokenizer.fingerprint()
    # Newer versions write the length with the tokenizer.
    (folder / "sentence_bert_config.json").unlink()
    save(folder, "tokenizer_config.json", {"model_max_length": 7})
    assert load_run(brought(folder, tmp_path / "newer")).tokenizer.conventions.embedding == {"max_length": 7}


def test_a_body_in_a_folder_of_its_own(bert, tmp_path):
    root = tmp_path / "old"
    root.mkdir()
    bert.rename(root / "0_Transformer")
    add_modules(root, ["Transformer", "Pooling", "Normalize"])
    listed = json.loads((root / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    save(root, "modules.json", listed)
    assert load_run(brought(root, tmp_path / "run")).config.model.head.pooling == "mean"


DENSE = {"in_features": 16, "out_features": 8, "bias": True, "activation_function": TANH}
WITH_DENSE = ["Transformer", "Pooling", "Dense"]


@pytest.mark.parametrize(
    ("kinds", "files", "message"),
    [
        (["Transformer", "Pooling", "WordWeights"], {}, "modules.json: got 'WordWeights'; supported: Transformer, Pooling"),
        (["Pooling", "Transformer"], {}, "got Pooling, Transformer; supported: .*, in this order"),
        (["Transformer", "Dense", "Pooling"], {}, "got Transformer, Dense, Pooling; supported: .*, in this order"),
        (WITH_DENSE, {"2_Dense/config.json": DENSE | {"in_features": 12}}, "in_features: got 12; supported: 16"),
        (
            WITH_DENSE, {"2_Dense/config.json": DENSE | {"activation_function": "my.module.Snake"}},
            "activation_function: got 'my.module.Snake'; supported: torch.nn.modules.linear.Identity",
        ),
        (WITH_DENSE, {"2_Dense/config.json": DENSE | {"groups": 2}}, "'groups': fields that are not known"),
        (
            WITH_DENSE, {"2_Dense/config.json": DENSE | {"module_input_name": "token_embeddings"}},
            "module_input_name: got 'token_embeddings'; supported: 'sentence_embedding'",
        ),
        (WITH_DENSE, {"2_Dense/config.json": DENSE}, "2_Dense: no model.safetensors in this folder"),
        (
            WITH_DENSE, {"2_Dense/config.json": DENSE, "2_Dense/pytorch_model.bin": 1},
            "2_Dense: its weights are in pytorch_model.bin, and such files can run code",
        ),
        (["Transformer", "Pooling"], {"1_Pooling/config.json": {"pooling_mode": "median"}}, "pooling_mode: got 'median'; supp"),
        (
            ["Transformer", "Pooling"], {"1_Pooling/config.json": {"pooling_mode_median_tokens": True}},
            "'pooling_mode_median_tokens': fields that are not known; supported: pooling_mode_cls_token",
        ),
        (
            ["Transformer", "Pooling"], {"1_Pooling/config.json": {"word_embedding_dimension": 8}},
            "word_embedding_dimension: got 8; supported: 16",
        ),
        (
            ["Transformer", "Pooling"], {"config_sentence_transformers.json": PROMPTS | {"default_prompt_name": "x"}},
            "default_prompt_name: got 'x'; allowed: query, document, other",
        ),
        (
            ["Transformer", "Pooling"], {"sentence_bert_config.json": {"max_seq_length": 2}},
            "max_seq_length: got 2; allowed: a whole number from 3",
        ),
    ],
)  # fmt: skip
def test_what_would_change_vectors_is_refused_by_name(kinds, files, message, bert, tmp_path):
    add_modules(bert, kinds)
    for name, data in files.items():
        save(bert, name, data)
    with pytest.raises(UserError, match=message):
        brought(bert, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.torch
def test_tensors_that_do_not_fit_are_named_together(bert, tmp_path):
    add_modules(bert, WITH_DENSE, at_2_Dense=DENSE)
    add_tensors(bert, "2_Dense", linear_weight=(8, 15), extra_weight=(2,))
    with pytest.raises(UserError, match="3 tensors do not agree") as error:
        brought(bert, tmp_path / "run")
    for part in ("misshapen: 2_Dense/linear.weight", "missing: 2_Dense/linear.bias", "unknown: 2_Dense/extra.weight"):
        assert part in str(error.value)


def test_a_head_of_our_own_is_written_as_modules(tmp_path):
    layers = (NormalizeLayerConfig(), DenseLayerConfig(dim=6, bias=False), LayerNormLayerConfig())
    head = EmbeddingHeadConfig(pooling=("last", "cls"), layers=layers, pooler="tanh")
    from tests.huggingface.ours import params_of
    from train.huggingface.sentence_modules import with_modules, write_modules
    from transformer.huggingface import checkpoint

    config = dataclasses.replace(BERT, head=head)
    params = params_of(config)
    checkpoint.write(tmp_path, config, params)
    write_modules(tmp_path, config, params, np.float32, {})
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["pooling_mode"] == ["lasttoken", "cls"]
    assert with_modules(checkpoint.read(tmp_path), tmp_path).config == config
    with pytest.raises(ConfigError, match="pooling: got \\(\\); allowed: one or several of cls, max"):
        EmbeddingHeadConfig(pooling=())
