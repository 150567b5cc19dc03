"""What a run is: what may change in its config and data when it resumes, and what is said of the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.devices import on_one_device
from tests.train.run_records import records
from train.checkpoints.identity import check_same_run, describe_data, load_tokenizers, tokenizer_files
from train.commands.cli import main
from train.config import RunConfig, load, parse
from train.config.changes import changes, check_allowed, check_changes, rule_of
from train.config.tags import configs_in, is_config
from train.data.prepared.content import Content
from train.data.prepared.prepare import prepare
from train.run.run_files import read_origin
from transformer.errors import UserError, field_types
from transformer.resume import OnResume

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = """
name: small
steps: 2
batch_size: 8
model: {vocab_size: 300, max_length: 16, num_layers: 1, embed_dim: 16, attention: {num_heads: 2}, dropout: 0.1}
data:
  tokenizer: {kind: bpe, vocab_size: 270}
  validation_fraction: 0.2
checkpoint: {every: 1}
log: {every: 1, trackers: []}
sample: {max_tokens: 0}
"""


def config_data(**changed):
    return yaml.safe_load(CONFIG) | changed


def parsed(**changed):
    return parse(config_data(**changed), "test.yaml")


def write_texts(folder, count=12, word="value"):
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02}.txt").write_text("\n".join(f"{word} {number} is {i}" for i in range(9)))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with texts, a config of them, and a finished run."""
    folder = tmp_path_factory.mktemp("identity")
    write_texts(folder / "texts")
    data = config_data(run_dir=str(folder / "run"))
    data["data"]["sources"] = [{"kind": "files", "path": f"{folder}/texts/*.txt"}]
    (folder / "small.yaml").write_text(yaml.safe_dump(data))
    with on_one_device():
        assert main(["train", str(folder / "small.yaml")]) == 0
    return folder


@pytest.fixture
def resume(trained, tmp_path, capsys):
    """Resume a copy of the run for a step, with arguments: the exit status and what was printed."""
    shutil.copytree(trained / "run", tmp_path / "run")

    def call(*arguments):
        capsys.readouterr()
        before = hashes(tmp_path / "run")
        status = main(
            ["train", str(trained / "small.yaml"), "--run-dir", str(tmp_path / "run"), "--steps", "3", *arguments]
        )
        said = capsys.readouterr()
        if status:
            assert hashes(tmp_path / "run") == before
            (error,) = (line for line in said.err.splitlines() if line.startswith("manyheads: "))
            assert said.err.endswith(f"{error}\n")
            return status, error
        return status, said.out

    return call


def hashes(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")
    }  # fmt: skip


def configs_under(config_type, seen=None):
    """Every class of configs in a tree."""
    seen = set() if seen is None else seen
    if config_type not in seen:
        seen.add(config_type)
        for annotation in field_types(config_type).values():
            for inner in configs_in(annotation):
                configs_under(inner, seen)
    return seen


def test_what_may_change():
    rules = {
        "free": [(RunConfig, "microbatches"), (RunConfig, "mesh.strategy"), (RunConfig, "evaluation.every"),
                 (RunConfig, "model.remat"), (RunConfig, "model.attention.backend"), (RunConfig, "run_dir")],
        "ask": [(RunConfig, "optimizer.learning_rate"), (RunConfig, "batch_size"), (RunConfig, "model.dropout"),
                (RunConfig, "loss.label_smoothing"), (RunConfig, "seed")],
        "never": [(RunConfig, "model.num_layers"), (RunConfig, "optimizer.name"), (RunConfig, "model.norm_eps")],
        "by content": [(RunConfig, "data.tokenizer.kind"), (RunConfig, "data.validation_fraction")],
        "upwards": [(RunConfig, "steps")],
    }  # fmt: skip
    config = parsed()
    for rule, found in rules.items():
        for _, path in found:
            owner, *names = config, *path.split(".")
            for name in names[:-1]:
                owner = getattr(owner, name)
            assert rule_of(type(owner), names[-1]) is OnResume(rule), path
    # A field says it, or its class does, in all configs that there are.
    for config_type in configs_under(RunConfig):
        assert is_config(config_type)
        for name in field_types(config_type):
            assert isinstance(rule_of(config_type, name), OnResume)


def test_changes_are_found_in_every_part():
    before = parsed(model={"vocab_size": 9, "num_layers": 2, "pattern": [{}, {"kind": "gated_delta"}]})
    after = parsed(
        model={"vocab_size": 9, "num_layers": 2, "pattern": [{"soft_cap": 5.0}, {"kind": "gated_delta"}]}, seed=1
    )
    assert [(change.path, change.before, change.after) for change in changes(before, after)] == [
        ("seed", 0, 1), ("model.pattern.0.soft_cap", None, 5.0)
    ]  # fmt: skip
    # Of another kind it is the section that differs.
    other = dataclasses.replace(before, adapter=parsed(adapter={"rank": 2}).adapter)
    assert [change.path for change in changes(before, other)] == ["adapter"]
    assert not list(changes(before, before))


@pytest.mark.parametrize(
    ("changed", "allowed", "message"),
    [
        ({"steps": 3}, [], None),
        ({"steps": 1}, [], "steps: 2 → 1"),
        ({"steps": 1}, ["steps"], None),
        (
            {"seed": 1, "batch_size": 16},
            [],
            r"seed: 0 → 1; batch_size: 8 → 16\. Undo .* --allow-changed seed,batch_size, or",
        ),
        ({"seed": 1, "batch_size": 16}, ["seed"], "batch_size: 8 → 16"),
        ({"optimizer": {"learning_rate": 1.0, "b1": 0.5}}, ["optimizer"], None),
        ({"optimizer": {"name": "sgd"}}, ["optimizer"], "'adamw' → 'sgd'. Another optimizer.name makes it another run"),
        ({"name": "other", "microbatches": 2, "mesh": {"strategy": "fsdp"}}, [], None),
    ],
)
def test_which_changes_pass(changed, allowed, message):
    before, after = parsed(), parsed(**changed)
    if message is None:
        assert {change.path.split(".")[0] for change in check_changes(before, after, allowed, "x")} <= {*allowed}
    else:
        with pytest.raises(UserError, match=message):
            check_changes(before, after, allowed, "x")


def test_an_allowed_name_that_no_field_has():
    check_allowed(parsed(), ["data", "optimizer", "model.attention.num_heads", "seed"])
    with pytest.raises(UserError, match="--allow-changed: got 'optimiser'; .*Did you mean 'optimizer'"):
        check_allowed(parsed(), ["optimiser"])


def test_free_changes_resume(resume, trained, tmp_path):
    """A moved folder of the same texts too."""
    shutil.copytree(trained / "texts", tmp_path / "moved")
    status, said = resume(
        "--data.sources.0.path", f"{tmp_path}/moved/*.txt", "--microbatches", "2", "--model.remat", "full",
        "--evaluation.every", "1",
    )  # fmt: skip
    assert status == 0 and "resuming after step 2" in said and "changed since" not in said
    assert load(tmp_path / "run" / "config.yaml").microbatches == 2
    # It stays the run that it was.
    assert read_origin(tmp_path / "run") == read_origin(trained / "run")


def test_a_change_that_has_to_be_allowed(resume, tmp_path):
    status, said = resume("--optimizer.learning-rate", "0.5")
    assert status == 2 and "optimizer.learning_rate: 0.0003 → 0.5" in said
    assert "--allow-changed optimizer.learning_rate" in said
    status, said = resume("--optimizer.learning-rate", "0.5", "--allow-changed", "optimizer.learning-rate")
    assert status == 0 and "small: changed since step 2: optimizer.learning_rate: 0.0003 → 0.5" in said
    assert list(records(tmp_path / "run", "train/learning_rate")) == [1, 2, 3]


def test_other_data_is_named(resume, trained, tmp_path):
    shutil.copytree(trained / "texts", tmp_path / "texts")
    tokenizer = (
        "--data.tokenizer.kind",
        "file",
        "--data.tokenizer.vocab-size",
        "null",
        "--data.tokenizer.path",
        str(trained / "run/tokenizer/tokenizer.json"),
    )
    path = ("--data.sources.0.path", f"{tmp_path}/texts/*.txt", *tokenizer)
    assert resume(*path)[0] == 0
    for number in range(20, 24):
        (tmp_path / "texts" / f"{number}.txt").write_text("one more text of this kind")
    status, said = resume(*path, "--steps", "4")
    assert status == 2 and re.search(r"train: files:.*texts/\*\.txt has \d documents more \(\d+ → \d+\)", said), said
    assert "--allow-changed data" in said
    status, said = resume(*path, "--steps", "4", "--allow-changed", "data")
    assert status == 0 and re.search(r"changed since step 3: data: train: .* documents more", said)


def test_another_vocabulary_is_another_run(resume, trained, tmp_path):
    write_texts(tmp_path / "texts", word="other")
    status, said = resume("--data.sources.0.path", f"{tmp_path}/texts/*.txt", "--allow-changed", "data")
    assert status == 2
    count = int(re.search(r"another data.tokenizer: (\d+) of 270 token ids have another meaning", said)[1])
    assert 0 < count < 14


def test_classes_that_are_others(tmp_path):
    rows = tmp_path / "rows.csv"

    def prepared_of(*labels):
        rows.write_text("text,label\n" + "".join(f"a text {i},{labels[i % len(labels)]}\n" for i in range(12)))
        source = {"kind": "files", "path": str(rows), "label_field": "label"}
        config = parsed(
            data={"sources": [source], "validation_fraction": 0, "packing": "documents"},
            objective={"kind": "classification"}, model={"family": "bert", "vocab_size": 300, "embed_dim": 16,
            "num_layers": 1, "attention": {"num_heads": 2}, "head": {"kind": "classification", "num_labels": 3}},
        )  # fmt: skip
        return config, prepare(config.data, progress=False)

    def check(*labels, allowed=()):
        config, prepared = prepared_of(*labels)
        return check_same_run(meta, config, prepared, allowed, "x")

    config, prepared = prepared_of("bad", "good", "so-so")
    meta = {
        "config": dataclasses.asdict(config), "tokenizer": tokenizer_files(prepared),
        "labels": list(prepared.meta.labels), "data": describe_data(prepared), "versions": {"jax": "0.0"},
    }  # fmt: skip
    (line,) = check("bad", "good", "so-so")
    assert line.startswith("versions: ") and "jax: '0.0' →" in line
    with pytest.raises(
        UserError, match=r"other classes: new 'fine'; missing 'good', 'so-so'\. This makes it another run"
    ):
        check("bad", "fine")
    # The same texts and classes, given to other documents.
    with pytest.raises(UserError, match=r"other data: labels: those of some documents are others"):
        check("good", "bad", "so-so")
    assert check("good", "bad", "so-so", allowed=["data"])[0].startswith("data: labels")


def test_content_is_what_is_read_not_where_it_is_from(tmp_path):
    def content(name, count=12, **data):
        folder = tmp_path / name
        if not folder.exists():
            write_texts(folder, count)
        source = {"kind": "files", "path": f"{folder}/*.txt"}
        return Content.of(prepare(parsed(data={"sources": [source], "validation_fraction": 0.3} | data).data))

    one = content("a")
    assert content("b").digest == one.digest and not list(one.differences(content("b")))
    assert Content.from_data(dataclasses.asdict(one)) == one
    assert content("c", 13).digest != one.digest
    fewer = content("a", validation_fraction=0)
    assert any(line.startswith("validation: 1 sources") for line in one.differences(fewer))
    (tmp_path / "b" / "00.txt").write_text("another text")
    (line,) = one.differences(content("b"))
    assert "the same number of documents" in line


def test_tokenizers_come_back_from_their_files(tmp_path):
    write_texts(tmp_path / "texts")
    source = {"kind": "files", "path": f"{tmp_path}/texts/*.txt"}
    prepared = prepare(parsed(data={"sources": [source], "tokenizer": {"kind": "bpe", "vocab_size": 270}}).data)
    files = tokenizer_files(prepared)
    own, target = load_tokenizers(files, "x")
    assert own.fingerprint() == prepared.tokenizer.fingerprint() and target is own
    for hostile in ("../outside.json", str(tmp_path / "outside.json"), "a/../../outside.json", "C:\\outside.json"):
        with pytest.raises(UserError, match="the checkpoint: names the file .* not inside its folder"):
            load_tokenizers(files | {hostile: "{}"}, "the checkpoint")
    assert not list(Path(tmp_path).rglob("outside.json"))
