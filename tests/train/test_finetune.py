"""Fine-tuning that states only what changes: what a config takes from the run that it begins from, and the command."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from tests.huggingface.ours import write_bert
from tests.train.fine_tuning import SMALL, classifier_of
from train.commands.cli import main
from train.config import load, parse, to_data
from train.config.complete import Base, complete
from train.config.yaml_files import dump_yaml
from train.data.prepared.prepare import prepare
from train.finetune.base import find_base
from train.huggingface.import_checkpoint import import_checkpoint
from train.objectives import (
    Causal,
    Classification,
    Contrastive,
    Masked,
    MultiLabelClassification,
    Regression,
    TokenClassification,
)
from train.run.begin import with_data
from train.run.evaluate import wilson
from train.run.init_from import check_weights
from train.run.run_files import load_run
from transformer.errors import UserError
from transformer.models.bert import BertConfig
from transformer.models.heads import ClassificationHeadConfig

pytestmark = pytest.mark.usefixtures("one_device")

LABELLED = {"kind": "files", "path": "rows.jsonl", "label_field": "class"}


def parsed(find_base=None, /, **data):
    return parse({"name": "tuned"} | data, "tuned.yaml", find_base=find_base)


def refusal(*arguments, **data):
    with pytest.raises(UserError) as caught:
        parsed(*arguments, **data)
    return str(caught.value)


# ── what a config may leave out ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (
            {"model": {"family": "bert", "head": "tokens"}, "objective": "token_classification"},
            {"model": {"family": "bert", "head": {"kind": "tokens"}}, "objective": {"kind": "token_classification"}},
        ),
        ({"objective": "prefix"}, {"objective": {"kind": "prefix"}}),
        ({"model": {"attention": "latent"}}, {"model": {"attention": {"kind": "latent"}}}),
        ({"model": {"attention": {"position": "rotary"}}}, {"model": {"attention": {"position": {"kind": "rotary"}}}}),
        ({"model": {"pattern": ["softmax", "latent"]}}, {"model": {"pattern": [{"kind": "softmax"}, {"kind": "latent"}]}}),
        ({"data": {"sources": ["synthetic", "stdlib"]}}, {"data": {"sources": [{"kind": "synthetic"}, {"kind": "stdlib"}]}}),
        ({"model": "t5"}, {"model": {"family": "t5"}}),
    ],
)  # fmt: skip
def test_a_section_may_be_its_kind_alone(short, long):
    assert complete(short) == complete(long)


def test_a_wrong_kind_is_refused_with_the_nearest():
    found = refusal(model={"family": "bert", "head": "classificaton"})
    assert (
        found.startswith("tuned.yaml: model.head: got 'classificaton'; allowed: masked, ")
        and "'classification'?" in found
    )
    assert "expected a mapping" in refusal(optimizer="adamw")


@pytest.mark.parametrize(
    ("model", "sources", "objective", "head"),
    [
        ({"head": "classification"}, [LABELLED], Classification, "classification"),
        ({"head": "classification"}, [LABELLED | {"label_kind": "number"}], Regression, "classification"),
        (
            {"head": "classification"},
            [LABELLED | {"label_kind": "classes"}],
            MultiLabelClassification,
            "classification",
        ),
        ({"head": "tokens"}, [LABELLED | {"label_kind": "tags"}], TokenClassification, "tokens"),
        ({"head": "embedding"}, [{"kind": "files", "path": "a.jsonl", "target_field": "b"}], Contrastive, "embedding"),
        ({}, [{"kind": "files", "path": "a.txt"}], Masked, "masked"),
    ],
)
def test_the_objective_follows_from_head_and_labels(model, sources, objective, head):
    config = parsed(model={"family": "bert"} | model, data={"sources": sources})
    assert isinstance(config.objective, objective) and config.model.head.kind == head
    assert config.data.packing == ("chunk" if objective is Masked else "documents")


@pytest.mark.parametrize(
    ("objective", "head"),
    [("classification", "classification"), ("token_classification", "tokens"), ("answer", "answer")],
)
def test_the_head_follows_from_the_objective(objective, head):
    kind = {"classification": "class", "token_classification": "tags", "answer": "answers"}[objective]
    source = LABELLED | {"label_kind": kind} | ({"target_field": "context"} if kind == "answers" else {})
    assert parsed(model={"family": "bert"}, objective=objective, data={"sources": [source]}).model.head.kind == head


def test_a_regression_predicts_one_number():
    config = parsed(
        model={"family": "bert"}, objective="regression", data={"sources": [LABELLED | {"label_kind": "number"}]}
    )
    assert config.model.head == ClassificationHeadConfig(num_labels=1)


def test_a_named_head_that_does_not_suit_stays_an_error():
    assert "model.head.kind: got 'masked'" in refusal(
        model={"family": "bert", "head": "masked"}, objective="classification", data={"sources": [LABELLED]}
    )


def test_epochs_and_steps_are_not_given_together():
    for steps in (20, 1000):
        assert "steps: with epochs the steps follow from the data" in refusal(epochs=2, steps=steps)
    for epochs in (0, float("inf")):
        assert f"epochs: got {float(epochs)}; allowed: above 0, up to 1,000,000, or null" in refusal(epochs=epochs)


def test_labels_decide_where_no_head_is_named(encoder):
    config = parsed(find_base, init_from=str(encoder), data={"sources": [LABELLED]})
    assert isinstance(config.objective, Classification) and config.model.head.kind == "classification"


def test_a_tokenizer_that_is_named_in_part_is_the_runs(encoder):
    config = parsed(
        find_base, init_from=str(encoder), data={"tokenizer": {"special_tokens": ["[MASK]", "[CLS]", "[SEP]", "[X]"]}}
    )
    assert config.data.tokenizer.special_tokens[-1] == "[X]" and config.data.tokenizer.kind == "bytes"


# ── what a config takes from the run that it begins from ─────────────────────────────────────────────────────────────


def test_model_and_tokenizer_are_those_of_the_run(encoder, texts):
    data = {"sources": [{"kind": "files", "path": str(texts), "label_field": "class"}], "validation_fraction": 0.2}
    config = parsed(find_base, init_from=str(encoder), model={"head": "classification", "dropout": 0.2}, data=data)
    assert config.model == BertConfig(**SMALL | {"dropout": 0.2}, head=ClassificationHeadConfig())
    assert config.data.tokenizer.special_tokens == ("[MASK]", "[CLS]", "[SEP]")
    assert isinstance(config.objective, Classification)
    prepared = prepare(config.data, progress=False)
    filled = with_data(config, prepared)
    assert filled.model.head == ClassificationHeadConfig(num_labels=2)
    check_weights(filled, prepared)


def test_training_goes_on_with_the_objective_of_the_run(encoder):
    config = parsed(find_base, init_from=str(encoder))
    assert isinstance(config.objective, Masked) and config.model == BertConfig(**SMALL)


def test_flags_decide_before_the_run_does(encoder):
    data = {"name": "tuned", "data": {"sources": [LABELLED]}}
    flags = ["--init-from", str(encoder), "--model.head", "classification", "--model.head.num-labels=3"]
    with pytest.raises(UserError, match="model.head has no fields|model.head.num_labels"):
        parse(data, "tuned.yaml", flags, find_base=find_base)
    flags[2:] = ["--model.head.kind", "classification", "--model.head.num-labels=3"]
    assert parse(data, "tuned.yaml", flags, find_base=find_base).model.head == ClassificationHeadConfig(num_labels=3)


def test_a_part_of_another_kind_is_not_mixed_with_the_runs(encoder):
    config = parsed(find_base, init_from=str(encoder), model={"attention": {"kind": "differential", "num_heads": 2}})
    assert config.model.attention.kind == "differential" and config.model.embed_dim == 32


def test_an_encoder_of_electra_becomes_a_bert():
    electra = parsed(model={"family": "electra", "embed_dim": 96, "attention": {"num_heads": 4}})
    base = Base(folder="runs/electra", model=to_data(electra.model))
    config = parsed(
        lambda given, data: base, init_from="runs/electra", model={"family": "bert"}, objective="classification",
        data={"sources": [LABELLED]},
    )  # fmt: skip
    assert config.model == BertConfig(embed_dim=96, attention=electra.model.attention, head=ClassificationHeadConfig())


def test_the_head_of_another_kind_has_the_settings_of_the_checkpoint(tmp_path, monkeypatch):
    write_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))
    import_checkpoint(str(tmp_path / "bert"), tmp_path / "run", verify=False)
    config = parsed(
        find_base, init_from=str(tmp_path / "run"), model={"head": "classification"}, data={"sources": [LABELLED]}
    )
    assert config.model.mlp.activation == "relu" and config.model.head.kind == "classification"


def test_a_run_that_has_begun_does_not_need_the_other_any_more(encoder, texts, tmp_path):
    gone = tmp_path / "encoder"
    shutil.copytree(encoder, gone)
    path = tmp_path / "tuned.yaml"
    data = {"sources": [{"kind": "files", "path": str(texts), "label_field": "class"}], "validation_fraction": 0.2}
    data = {
        "name": "tuned", "run_dir": str(tmp_path / "tuned"), "init_from": str(gone), "epochs": 0.1, "batch_size": 8,
        "model": {"head": {"kind": "classification", "pooling": "mean"}}, "data": data, "log": {"trackers": []},
    }  # fmt: skip
    path.write_text(dump_yaml(data))
    assert main(["train", str(path)]) == 0
    kept = load(tmp_path / "tuned" / "config.yaml")
    assert kept.steps == 2 and kept.epochs is None and kept.model.head.num_labels == 2
    shutil.rmtree(gone)
    path.write_text(dump_yaml(data | {"epochs": 0.2}))
    # The tokenizer's own files have gone, and the run has a copy of them.
    assert main(["train", str(path)]) == 0
    assert load_run(tmp_path / "tuned").config.steps == 4


def test_weights_that_do_not_fit_are_refused_before_they_are_read(encoder, texts, tmp_path, monkeypatch, capsys):
    config = classifier_of(texts, tmp_path / "tuned", init_from=str(encoder))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, embed_dim=64))

    def read(*_, **__):
        raise AssertionError("read before they were checked")

    monkeypatch.setattr("train.checkpoints.stored.StoredCheckpoints.restore_params", read)
    with pytest.raises(
        UserError, match=r"init_from: \d+ parameters have a different shape .* set model.embed_dim to 32"
    ):
        check_weights(config, prepare(config.data, progress=False))


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def place(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(*words):
    fast = ("--log.trackers", "[]", "--sample.every", "0")
    return main(["finetune", *map(str, words), *fast])


def test_one_command_trains_a_classifier_of_a_checkpoint(texts, place, capsys):
    write_bert(place / "bert")
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    words = {"good": "the cat sat", "bad": "dogs run far"}
    lines = [f"{words[row['class']]},{row['class']}" for row in rows[:60]]
    (place / "reviews.csv").write_text("\n".join(["review,category", *lines]) + "\n")
    command = ["bert", "--data", "reviews.csv", "--label", "category", "--text", "review", "--epochs", "0.5"]
    assert finetune(*command) == 0
    said = capsys.readouterr().out
    written = place / "runs" / "bert-reviews.yaml"
    assert "init_from: runs/bert\nepochs: 0.5\nobjective:\n  kind: classification" in written.read_text()
    assert written.read_text().startswith("# ") and "vocab_size" not in written.read_text()
    assert "manyheads train runs/bert-reviews.yaml" in said and "weights from runs/bert, step 0" in said
    assert "accuracy of 12 rows, 95% interval" in said
    # 60 rows: a fifth is held out, half of each class.
    assert "3 steps of 8 examples: 0.5 epochs of 48" in said
    (place / "new.txt").write_text("the cat sat\n\ndogs run far\n")
    assert main(["predict", "runs/bert-reviews", "--file", "new.txt"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["label"] in ("bad", "good") for one in answers] == [True, False, True]
    # Again: the run is there.
    assert finetune(*command) == 0
    assert "already finished" in capsys.readouterr().out
    # A file that was changed by hand is not written over.
    kept = written.read_text()
    written.write_text(kept + "seed: 3\n")
    assert finetune(*command) == 2
    written.write_text(kept)
    assert finetune(*command[:-1], "2") == 2
    assert "runs/bert-reviews.yaml: it has other settings; remove it" in capsys.readouterr().err


def test_the_folders_of_texts_are_their_classes(encoder, place, capsys):
    for name in ("good", "bad"):
        (place / "news" / name).mkdir(parents=True)
        for number in range(8):
            (place / "news" / name / f"{number}.txt").write_text(f"{name} {number}")
    assert finetune(encoder, "--data", "news/*/*.txt", "--name", "news", "--config-only", "--steps", "7") == 0
    assert not (place / "runs" / "news").exists()
    config = load(place / "runs" / "news.yaml", find_base=find_base)
    assert config.steps == 7 and config.data.sources[0].label_field == "folder" and config.length == 16
    assert "init_from" in capsys.readouterr().out


def test_tags_pairs_numbers_and_plain_text_have_their_own_objectives(encoder, place):
    (place / "tags.conll").write_text("".join(f"a\tB\nw{n}\tO\n\n" for n in range(30)))
    (place / "pairs.csv").write_text("one,two\n" + "".join(f"a {n},b {n}\n" for n in range(40)))
    (place / "scores.csv").write_text("text,score\n" + "".join(f"a {n},{n / 7}\n" for n in range(40)))
    (place / "plain.txt").write_text("some words in a row " * 60)
    for words, objective in (
        (["tags.conll"], TokenClassification),
        (["pairs.csv", "--text", "one", "--second", "two"], Contrastive),
        (["scores.csv", "--label", "score", "--task", "regression"], Regression),
        (["plain.txt", "--data.validation-fraction", "0"], Masked),
    ):
        assert finetune(encoder, "--name", words[0], "--config-only", "--data", *words) == 0
        config = load(place / "runs" / f"{words[0]}.yaml", find_base=find_base)
        assert isinstance(config.objective, objective), words
        assert config.model.embed_dim == 32


def test_dialogues_and_preferences_are_recognised(place):
    base = place / "runs" / "gpt"
    base.mkdir(parents=True)
    (base / "config.yaml").write_text(
        "name: gpt\nmodel: {family: gpt, num_layers: 1, embed_dim: 32, attention: {num_heads: 2}}\n"
    )
    ask, rows = [{"role": "user", "content": "Hi!"}], range(12)
    kinds = {
        "chat": [{"messages": [*ask, {"role": "assistant", "content": f"Hello {number}."}]} for number in rows],
        "preference": [{"prompt": ask, "chosen": f"Hello {number}.", "rejected": "What?"} for number in rows],
        "causal": [{"text": f"some words {number} " * 300} for number in rows],
    }
    for kind, records in kinds.items():
        (place / f"{kind}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        words = ("--config-only", "--lora", "4", "--data.validation-fraction", "0.3")
        assert finetune("runs/gpt", "--data", f"{kind}.jsonl", *words) == 0
        config = load(place / "runs" / f"gpt-{kind}.yaml", find_base=find_base)
        assert config.objective.kind == kind and config.adapter.rank == 4
        # A config that names no objective has the same one.
        sources = to_data(config.data)["sources"]
        assert parsed(model={"family": "gpt"}, data={"sources": sources, "packing": "documents"}).objective.kind == kind


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{encoder}", "--data", "none.csv", "--label", "a"], "none.csv: no such file"),
        (["{encoder}", "--data", "rows.csv", "--label", "kind"], "kind"),
        (["{encoder}", "--data", "rows.csv", "--label", "label", "--task", "clasification"], "'classification'?"),
        (["{encoder}", "--data", "rows.csv", "--task", "regression"], "--label: regression needs labels"),
        (["{encoder}", "--data", "one.csv", "--label", "label"], "all documents are of one class, a"),
        (["{encoder}", "--data", "rows.csv", "--label", "label", "--epochs", "0"], "epochs: got 0.0; allowed: above 0"),
        (["{encoder}", "--data", "rows.csv", "--label", "label", "--lora", "0"], "rank: got 0; allowed: 1 or more"),
        (["runs/none", "--data", "rows.csv"], "runs/none: neither a run, nor a folder with a Hugging Face checkpoint"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words, expected, encoder, place, capsys):
    rows = [f"text {number},{'ab'[number % 2]}\n" for number in range(40)]
    (place / "rows.csv").write_text("text,label\n" + "".join(rows))
    (place / "one.csv").write_text("text,label\n" + "".join(row.replace(",b", ",a") for row in rows))
    assert finetune(*(word.format(encoder=encoder) for word in words)) == 2
    said = capsys.readouterr().err
    *progress, line = said.strip().splitlines()
    assert expected in line and all(one.startswith("tokenising ") for one in progress)


def test_a_language_model_predicts_no_labels(place, capsys):
    base = place / "runs" / "gpt"
    base.mkdir(parents=True)
    (base / "config.yaml").write_text("name: gpt\nmodel: {family: gpt}\n")
    assert finetune("runs/gpt", "--data", "rows.csv", "--label", "a") == 2
    assert "--label: a model of family 'gpt' predicts no labels" in capsys.readouterr().err
    assert isinstance(parsed(find_base, init_from="runs/gpt").objective, Causal)


def test_the_interval_of_an_accuracy():
    # statsmodels.stats.proportion.proportion_confint(90, 100, method="wilson")
    assert wilson(0.9, 100) == pytest.approx((0.8256343, 0.9447708), abs=1e-6)
    assert wilson(1.0, 4) == pytest.approx((1 - wilson(0.0, 4)[1], 1.0)) and wilson(0.0, 4)[0] == 0.0
