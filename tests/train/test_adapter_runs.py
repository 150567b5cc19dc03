"""Runs that train adapters: they begin with others' weights, go on, and end as plain models."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings

import numpy as np
import pytest

from tests.train.fine_tuning import by_path, classifier_of, config_of, write_texts
from tests.train.stops import asked_to_stop
from train.checkpoints.stored import StoredCheckpoints
from train.commands.cli import main
from train.config import dump, load
from train.config.sections import CheckpointConfig, EvaluationConfig
from train.data.prepared.prepare import prepare
from train.optimizer import OptimizerConfig
from train.parallel.mesh import make_mesh, use_mesh
from train.program.program import Program
from train.run.init_from import begin_from
from train.run.loop import train
from train.run.run_files import load_run
from transformer.layers.adapter import AdapterConfig, merged
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.heads import ClassificationHeadConfig

pytestmark = pytest.mark.usefixtures("one_device")

LORA, DORA = AdapterConfig(rank=4), AdapterConfig(rank=4, kind="dora")


def adapted_classifier(texts, folder, encoder, adapter=LORA, **changes):
    fields = {
        "steps": 30, "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        "evaluation": EvaluationConfig(every=0), "checkpoint": CheckpointConfig(every=10),
    }  # fmt: skip
    return classifier_of(texts, folder, init_from=str(encoder), adapter=adapter, **fields | changes)


def stored(run, step="latest"):
    return by_path(load_run(run, step).params)


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_it_begins_as_the_plain_model_does(texts, encoder, tmp_path, adapter):
    config = adapted_classifier(texts, tmp_path / "tuned", encoder, adapter)
    prepared, found = prepare(config.data, progress=False), []
    mesh = make_mesh(config.mesh)
    for one in (config, dataclasses.replace(config, adapter=None)):
        with use_mesh(mesh, config.mesh.rules):
            program = Program(one, mesh)
            params, said = begin_from(program.init().params, one, prepared)
            state = program.init(params)
            found.append((by_path(merged(state.params, adapter.scale)), said))
    (params, said), (plain, said_plain) = found
    assert params.keys() == plain.keys()
    for name, value in params.items():
        np.testing.assert_allclose(value, plain[name], rtol=1e-6, atol=1e-7)
    assert ". New, random: adapters, pooled_head. Not used: masked_head" in said
    assert said.split(" of ")[0] == said_plain.split(" of ")[0]


def test_a_run_learns_goes_on_bitwise_and_is_a_plain_model_afterwards(texts, encoder, tmp_path, capsys):
    config = adapted_classifier(texts, tmp_path / "tuned", encoder, dataclasses.replace(LORA, dropout=0.1))
    whole = train(config)
    said = capsys.readouterr().out
    assert re.search(r"starting; [\d,]+ of [\d,]+ parameters \(\d+\.\d%\) trained on 1 × cpu", said)
    assert whole.scores.accuracy > 0.8
    half = dataclasses.replace(config, run_dir=str(tmp_path / "half"))
    with asked_to_stop(looks=6):
        assert train(half).interrupted
    assert train(half).step == 30
    loaded = load_run(tmp_path / "tuned", "latest")
    assert loaded.config.adapter is None
    one, other = by_path(loaded.params), stored(tmp_path / "half")
    assert not any(".adapter." in name for name in one)
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value)
    theirs = stored(encoder, "best")
    assert np.array_equal(one["embed.table"], theirs["embed.table"])
    assert not np.array_equal(
        one["layers.blocks.attention.query.kernel"], theirs["layers.blocks.attention.query.kernel"]
    )
    checkpoints = StoredCheckpoints(tmp_path / "tuned")
    assert checkpoints.meta(30)["config"]["adapter"]["rank"] == 4

    # What begins with it begins with the plain model, whether it has adapters of its own or not.
    capsys.readouterr()
    for number, adapter in enumerate((None, DORA)):
        still = OptimizerConfig(learning_rate=1e-9)
        folder = tmp_path / f"next{number}"
        begun = train(adapted_classifier(texts, folder, tmp_path / "tuned", adapter, steps=1, optimizer=still))
        assert begun.scores.loss == pytest.approx(whole.scores.loss, rel=1e-4)
        afresh = "" if adapter is None else ". New, random: adapters\n"
        assert re.search(
            rf"weights from .*tuned, step \d+: [\d,]+ of [\d,]+ parameters{afresh}", capsys.readouterr().out
        )


def test_a_language_model_writes_with_its_adapters(whole, config_file, tmp_path, capsys):
    config = dataclasses.replace(
        load(config_file), init_from=str(whole), run_dir=str(tmp_path / "tuned"), adapter=DORA, steps=2
    )
    lora = load(config_file, ["--adapter.rank", "3", "--adapter.targets", "query", "value"]).adapter
    assert lora == AdapterConfig(rank=3, targets=("query", "value"))
    (tmp_path / "tuned.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "tuned.yaml") == config
    assert main(["train", str(tmp_path / "tuned.yaml"), "--adapter.rank", "2"]) == 0
    said = capsys.readouterr().out
    assert "── sample ──" in said and "New, random: adapters" in said
    assert main(["generate", str(tmp_path / "tuned"), "--prompt", "value_", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("value_")
    assert main(["explain", str(tmp_path / "tuned.yaml")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"adapter.rank +4 +8 +Rank", said) and "of the parameters; the others are frozen" in said
    assert (
        main(["train", str(tmp_path / "tuned.yaml"), "--adapter.targets", "querry", "--run-dir", str(tmp_path / "no")])
        == 2
    )
    assert "adapter.targets: 'querry' is not a linear layer" in capsys.readouterr().err


@pytest.mark.torch
def test_exported_for_peft_and_loaded_by_it(tmp_path, capsys):
    import peft
    import torch
    import transformers

    texts = write_texts(tmp_path / "texts.jsonl")
    plain = BertConfig(vocab_size=264, max_length=24, num_layers=2, embed_dim=32, attention=SoftmaxConfig(num_heads=2))
    first = config_of(texts, tmp_path / "first", model=plain)
    train(first)
    adapter = AdapterConfig(rank=2, targets=("query", "down"))
    classifier = dataclasses.replace(plain, head=ClassificationHeadConfig())
    tuned = classifier_of(
        texts, tmp_path / "tuned", model=classifier, adapter=adapter, init_from=str(first.directory), steps=6
    )
    train(tuned)
    run = str(tuned.directory)
    assert main(["export", str(first.directory), "--no-verify"]) == 0
    assert main(["export", run, "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["export", run, "--format", "peft"]) == 0
    said = capsys.readouterr().out
    assert f"written to {run}/peft" in said
    about = json.loads((tuned.directory / "peft" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == f"{first.directory}/huggingface" and about["task_type"] == "SEQ_CLS"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.AutoPeftModelForSequenceClassification.from_pretrained(f"{run}/peft", num_labels=2)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(f"{run}/huggingface")
    ids = torch.tensor(np.random.default_rng(0).integers(5, 264, (3, 11)))
    with torch.no_grad():
        got, expected = model.eval()(ids).logits, whole.eval()(ids).logits
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(f"{run}/peft")("good")["input_ids"]
    card = (tuned.directory / "peft" / "README.md").read_text()
    assert "library_name: peft" in card and "num_labels=2" in card
    assert "pipeline_tag: text-classification" in card

    assert main(["export", run, "--format", "peft"]) == 2
    assert "it exists already" in capsys.readouterr().err
    assert main(["export", run, "--format", "peft", "--dtype", "bfloat16", "--out", str(tmp_path / "x")]) == 2
    assert "--dtype: only with --format hf" in capsys.readouterr().err
    assert main(["export", str(first.directory), "--format", "peft"]) == 2
    assert "this run trained no adapters; --format hf" in capsys.readouterr().err
