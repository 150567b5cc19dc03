"""A config is read strictly, overridden by typed flags, and every mistake names its field."""

from __future__ import annotations

import dataclasses

import pytest

from train.config import RunConfig, difference, dump, fields, load, override, parse, to_data
from transformer.errors import UserError

MINIMAL = {"name": "x"}


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_dump_and_load_are_inverse(tmp_path):
    text = """
name: a
steps: 7
model: {num_layers: 2, num_heads: 4, embed_dim: 32, dropout: 0}
data:
  sources:
    - {kind: files, path: "a/*.txt", weight: 2}
    - {kind: stdlib}
optimizer: {learning_rate: 1e-3, clip_norm: null}
"""
    config = load(write(tmp_path, text))
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.clip_norm is None
    assert [source.kind for source in config.data.sources] == ["files", "stdlib"]
    assert load(write(tmp_path, dump(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nmodle: {}", r"modle: no such field. Did you mean 'model'\?"),
        ("name: x\nmodel: {num_layer: 2}", r"model.num_layer: no such field. Did you mean 'num_layers'\?"),
        ("name: x\ndata: {sources: [{knid: stdlib}]}", r"data.sources.0.knid: .* Did you mean 'kind'"),
        ("name: x\nmodel: {num_layers: two}", r"model.num_layers: got 'two'; .*integer"),
        ("name: x\nmodel: {num_layers: 2.5}", r"model.num_layers: got 2.5"),
        ("name: x\nmodel: {num_layers: '2'}", r"model.num_layers: got '2'"),
        ("name: x\nmodel: {position: rotatory}", r"model.position: got 'rotatory'; .*'learned'.*'rotary'"),
        ("name: x\nmodel: {num_layers: 0}", r"model.num_layers: got 0; allowed: 1 or more"),
        ("name: x\nmodel: {num_heads: 7}", r"model.num_heads: got 7; it must divide embed_dim \(768\)"),
        ("name: x\noptimizer: {b1: 1.0}", r"optimizer.b1: got 1.0; allowed"),
        ("name: x\nbatch_size: 6\nmicrobatches: 4", r"microbatches: got 4; it must divide batch_size \(6\)"),
        ("name: x\nlength: 4096", r"length: got 4096; allowed: 1 to model.max_length \(1024\)"),
        ("name: x\nmodel: 3", r"model: got 3; expected a mapping"),
        ("name: 2020-01-01", r"no text, number, list or mapping"),
        ("name: x\nname: y", r"line 1: the key 'name' stands twice"),
        ("name: [x", r"no valid YAML"),
        ("steps: 3", r"name is missing"),
        ("", r"the file: got None; expected a mapping"),
    ],
)
def test_a_mistake_is_one_line_with_field_and_remedy(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_a_text_that_looks_like_a_number_stays_a_text(tmp_path):
    config = override(parse(MINIMAL, "test"), ["--sample.prompt", "1e-7"])
    assert load(write(tmp_path, dump(config))) == config


def test_yaml_anchors_can_be_merged(tmp_path):
    config = load(write(tmp_path, "name: x\nsample: &a {every: 7}\nevaluation: {<<: *a, batches: 3}"))
    assert (config.evaluation.every, config.evaluation.batches) == (7, 3)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, "name: x")
    with pytest.raises(UserError, match=r"no such config file. Did you mean 'run.yaml'"):
        load(tmp_path / "runn.yaml")


def test_overrides_are_typed():
    config = override(
        parse(MINIMAL, "test"),
        [
            "--model.num-layers",
            "3",
            "--optimizer.clip-norm",
            "null",
            "--model.qk-norm",
            "true",
            "--data.sources.0.weight",
            "2.5",
        ],
    )
    assert config.model.num_layers == 3
    assert config.optimizer.clip_norm is None
    assert config.model.qk_norm is True
    assert config.data.sources[0].weight == 2.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.num-layer", "3"], "num-layer"),
        (["--model.num-layers", "x"], "num-layers"),
        (["--model.num-heads", "7"], r"model.num_heads: got 7; it must divide"),
        (["--steps", "0"], r"command line: steps: got 0"),
    ],
)
def test_a_wrong_override_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        override(parse(MINIMAL, "test"), arguments)
    assert "\n" not in str(caught.value)


def test_difference_names_every_field():
    old = parse(MINIMAL, "test")
    new = dataclasses.replace(old, seed=3, model=dataclasses.replace(old.model, num_layers=2))
    assert difference(to_data(old), to_data(new)) == ["model.num_layers: 12 → 2", "seed: 0 → 3"]


def test_every_field_has_a_meaning():
    missing = [field.path for field in fields(RunConfig(name="x")) if not field.meaning]
    assert not missing
