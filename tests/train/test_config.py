"""A config is read strictly, overridden by typed flags, and every mistake names its field."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from pathlib import Path
from typing import Literal

import pytest

from train.config import MOVED, RunConfig, difference, dump, fields, load, parse, parse_stored, to_data
from train.config.load import build
from train.config.mistakes import with_path
from train.config.restore import restore
from train.data.prepared.prepare import DataConfig
from train.data.sources.source_config import FilesSource, HubSource, StdlibSource, SyntheticSource, WheelSource
from train.loss import LossConfig
from train.objectives import OBJECTIVES, AnyObjective, Contrastive, Masked
from transformer.errors import Config, ConfigError, UserError, require
from transformer.models.bert import BertConfig

MINIMAL = {"name": "x"}
CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_dump_and_load_are_inverse(tmp_path):
    text = """
name: a
steps: 7
model: {num_layers: 2, attention: {num_heads: 4}, embed_dim: 32, dropout: 0}
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_dumped_and_loaded_as_it_was(path, tmp_path):
    config = load(path)
    assert load(write(tmp_path, dump(config))) == config
    assert parse(to_data(config), "test") == config
    assert not [field.path for field in fields(config) if not field.meaning]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_is_dumped_and_loaded_as_it_was(kind):
    objective = OBJECTIVES[kind]()
    (data,) = [to_data(Holder(objective=objective))["objective"]]
    assert build(Holder, {"objective": data}, "test").objective == objective
    assert build(Holder, {"objective": {"kind": kind}}, "test").objective == objective


@pytest.mark.parametrize(
    "source",
    [
        StdlibSource(include_tests=True, limit=3),
        FilesSource(path="a.csv", target_field="b", label_field="c", labels=("x", "y"), weight=2),
        HubSource(path="a/b", name="c", split="test", streaming=True, choice_fields=("d", "e"), label_field="f"),
        WheelSource(path="a.jsonl", package="a==1", sha256="0" * 64, group_field="g", on_error="skip"),
        SyntheticSource(limit=7),
    ],
    ids=lambda source: source.kind,
)
def test_every_source_is_dumped_and_loaded_as_it_was(source, tmp_path):
    config = RunConfig(name="x", data=DataConfig(sources=(source,), packing="pad" if source.gives_pairs else "chunk"))
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
        ("name: x\nmodel: {num_layers: true}", r"model.num_layers: got True; allowed: an integer"),
        ("name: x\nmodel: {num_layers: 0}", r"model.num_layers: got 0; allowed: 1 or more"),
        (
            "name: x\nmodel: {attention: {num_heads: 7}}",
            r"model.attention.num_heads: got 7; allowed: a divisor of embed_dim \(768\)",
        ),
        ("name: x\noptimizer: {b1: 1.0}", r"optimizer.b1: got 1.0; allowed"),
        ("name: x\nbatch_size: 6\nmicrobatches: 4", r"microbatches: got 4; allowed: a divisor of batch_size \(6\)"),
        ("name: x\nlength: 4096", r"length: got 4096; allowed: 1 to model.max_length \(1024\)"),
        ("name: x\nmodel: 3", r"model: got 3; expected a mapping"),
        (
            "name: x\nobjective: maskd",
            r"objective: got 'maskd'; allowed: .*, or a mapping of field: value. Did you mean 'masked'",
        ),
        ("name: x\ndata: {sources: {kind: stdlib}}", r"data.sources: got {'kind': 'stdlib'}; allowed: a list"),
        ("name: x\ndata: {sources: [stdlb]}", r"data.sources.0: got 'stdlb'; allowed: .*Did you mean 'stdlib'"),
        ("name: x\nobjective: {kind: maskd}", r"objective.kind: got 'maskd'; allowed: .*Did you mean 'masked'\?"),
        ("name: x\nobjective: {kind: 3}", r"objective.kind: got 3; allowed: causal, "),
        ("name: x\nmodel: {family: gtp}", r"model.family: got 'gtp'; allowed: .*Did you mean 'gpt'\?"),
        (
            "name: x\nobjective: {mask_rate: 0.2}",
            r"objective.mask_rate: mask_rate is a field of kinds masked, next_sentence, sentence_order, replaced_tokens; "
            r"this objective is causal$",
        ),
        ("name: x\nmodel: {token_types: 2}", r"model.token_types: .* a field of families bert.*; this model is gpt"),
        (
            "name: x\ndata: {sources: [{kind: stdlib}, {path: x}]}",
            r"data.sources.1.path: path is a field of kinds files, hub, wheel; this one is stdlib",
        ),
        ("name: x\ndata: {sources: [{kind: files}]}", r"data.sources.0.path: it is missing"),
        (
            "name: x\nmodel: {head: {kind: masked}}",
            r"model.head: head is a field of families bert.*; this model is gpt",
        ),
        ("name: x\nmodel: {attention: []}", r"model.attention: got \[\]; expected a mapping"),
        (
            "name: x\nmodel: {attention: cudnn}",
            r"model.attention: this field has moved: it is now model.attention.backend",
        ),
        ("name: x\nobjective: {qqqq: 1}", r"objective.qqqq: no such field; allowed: kind$"),
        (
            "name: x\nloss: {temperature: 0.1}",
            r"loss.temperature: this field has moved: it is now objective.temperature$",
        ),
        (
            "name: x\nloss: {temperature: 0.1, class_weights: balanced}",
            r"loss.temperature: .* objective.temperature; loss.class_weights is now objective.class_weights$",
        ),
        (
            "name: x\nmodel: {family: bert, head: {kind: classification}}\n"
            "objective: {kind: classification, class_weights: blanced}",
            r"objective.class_weights: got 'blanced'; allowed: a list.*Did you mean 'balanced'",
        ),
        ("name: x\ncheckpoint: {best: f1}", r"checkpoint.best: got 'f1'; allowed with objective causal: loss"),
        ("name: x\nmesh: {expert: 2}", r"mesh.expert: got 2; the model has no experts"),
        (
            "name: x\nmodel: {family: bert, head: masked}\nobjective: {kind: choice}",
            r"model.head.kind: got 'masked'; allowed with objective 'choice': 'choice'",
        ),
        (
            "name: x\nmodel: {family: bert, head: {kind: answer}}\nobjective: {kind: answer}\nloss: {label_smoothing: 0.1}",
            r"loss.label_smoothing: got 0.1; not for objective answer; allowed: 0",
        ),
        ("name: 2020-01-01", r"not text, a number, a list or a mapping"),
        ("name: x\nname: y", r"line 1: the key 'name' appears twice"),
        ("name: [x", r"not valid YAML"),
        ("steps: 3", r"name: it is missing, and has no default"),
        ("", r"the file: got None; expected a mapping"),
    ],
)
def test_a_mistake_is_one_line_with_field_and_remedy(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_whatever_the_data_is_a_mistake_is_one_line():
    values = [
        None,
        3,
        -1,
        2.5,
        "x",
        True,
        [],
        ["a"],
        [None],
        {},
        {"kind": "masked"},
        {"kind": []},
        {"a": {"b": 1}},
        [[{}]],
    ]
    draw = random.Random(0)
    wholes = [to_data(load(path)) for path in CONFIGS[::6]]

    def places(data, path=()):
        yield path
        inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
        for key, value in inner:
            yield from places(value, (*path, key))

    refused = []
    for _ in range(300):
        data = copy.deepcopy(draw.choice(wholes))
        *sections, key = draw.choice([path for path in places(data) if path])
        owner = data
        for section in sections:
            owner = owner[section]
        owner[f"{key}_" if draw.random() < 0.1 and isinstance(owner, dict) else key] = draw.choice(values)
        try:
            parse(data, "test")
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(one.startswith("test: ") and "\n" not in one for one in refused)


def test_what_has_moved_is_there_no_longer():
    for old in MOVED:
        *sections, field = old.split(".")
        owner = parse(MINIMAL, "test")
        for section in sections:
            owner = getattr(owner, section)
        # What was a value may be a section now.
        assert field not in {one.name for one in dataclasses.fields(owner)} or dataclasses.is_dataclass(
            getattr(owner, field)
        )


def test_a_run_that_was_logged_otherwise_can_be_read():
    data = to_data(parse(MINIMAL, "test"))
    stored = data | {"log": {"every": 5, "tensorboard": True, "wandb_project": None, "examples": False}}
    assert parse_stored(stored, "run").log == dataclasses.replace(parse(MINIMAL, "test").log, every=5)
    with pytest.raises(UserError, match="log.tensorboard: this field has moved"):
        parse(stored, "test")
    # What is part of the model is not passed over.
    with pytest.raises(UserError, match="run: "):
        parse_stored(data | {"gone": 1}, "run")


def test_yaml_anchors_can_be_merged(tmp_path):
    config = load(write(tmp_path, "name: x\nsample: &a {every: 7}\nevaluation: {<<: *a, batches: 3}"))
    assert (config.evaluation.every, config.evaluation.batches) == (7, 3)


def test_an_override_changes_one_of_two_sections_that_an_anchor_shares(tmp_path):
    path = write(tmp_path, "name: x\nsample: &a {every: 7}\nevaluation: *a")
    config = load(path, ["--sample.every", "3"])
    assert (config.sample.every, config.evaluation.every) == (3, 7)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, "name: x")
    with pytest.raises(UserError, match=r"no such config file. Did you mean 'run.yaml'"):
        load(tmp_path / "runn.yaml")


def override(*arguments, **data):
    return parse(MINIMAL | data, "test.yaml", arguments)


def test_overrides_are_typed():
    config = override(
        "--model.num-layers", "3", "--optimizer.clip-norm", "null", "--model.attention.qk-norm", "true",
        "--data.sources.0.weight", "2.5", "--steps=7", "--optimizer.learning_rate", "1e-3", "--loss.z-loss", "0",
    )  # fmt: skip
    assert config.model.num_layers == 3
    assert config.optimizer.clip_norm is None
    assert config.model.attention.qk_norm is True
    assert config.data.sources[0].weight == 2.5
    assert (config.steps, config.optimizer.learning_rate, config.loss.z_loss) == (7, 1e-3, 0.0)


@pytest.mark.parametrize(
    ("given", "prompt"),
    [("true", "true"), ("null", "null"), ("1e-7", "1e-7"), ("a: b", "a: b"), ("", ""), ("'2'", "2"), ('"\\n"', "\n")],
)
def test_a_text_is_taken_as_it_stands(given, prompt, tmp_path):
    config = override("--sample.prompt", given)
    assert config.sample.prompt == prompt
    assert load(write(tmp_path, dump(config))) == config


def test_null_is_none_for_an_optional_text_and_a_text_otherwise():
    assert override("--run-dir", "null", run_dir="a").run_dir is None
    assert override("--run-dir", "true").run_dir == "true"
    assert override("--name", "null").name == "null"


def test_overrides_choose_kinds_and_reach_into_lists():
    config = override(
        "--model.family", "bert", "--objective.kind", "masked", "--objective.mask-rate", "0.3",
        "--data.sources.0.kind", "files", "--data.sources.0.path", "x", "--adapter.rank", "4",
    )  # fmt: skip
    assert isinstance(config.model, BertConfig)
    assert config.objective == Masked(mask_rate=0.3)
    assert config.data.sources == (FilesSource(path="x"),)
    assert config.adapter is not None and config.adapter.rank == 4
    config = override("--data.sources", "[{kind: synthetic, limit: 3}]", "--data.packing", "pad")
    assert config.data.sources == (SyntheticSource(limit=3),)


def test_a_list_may_be_several_words_or_one():
    assert override("--optimizer.freeze", "embed.*", "positions.*").optimizer.freeze == ("embed.*", "positions.*")
    assert override("--optimizer.freeze", "embed.*").optimizer.freeze == ("embed.*",)
    assert override("--optimizer.freeze=[embed.*, x]", "--steps", "3").optimizer.freeze == ("embed.*", "x")
    weights = ["--objective.class-weights", "1", "2.5"]
    given = {"model": {"family": "bert", "head": {"kind": "classification"}}, "objective": {"kind": "classification"}}
    assert override(*weights, **given).objective.class_weights == (1.0, 2.5)
    assert override(weights[0], "balanced", **given).objective.class_weights == "balanced"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3", "4"], r"command line: steps: got 2 values, 3, 4; it takes one"),
        (["--model.num-layer", "3"], r"command line: model.num_layer: no such field. Did you mean 'num_layers'\?"),
        (["--modle.num-layers", "3"], r"command line: modle: no such field. Did you mean 'model'\?"),
        (["--model.heads", "7"], r"model.heads: no such field. Did you mean 'model.attention.num_heads'\?"),
        (["--model.theta", "7"], r"model.theta: no such field. Did you mean 'model.attention.position.theta'\?"),
        (["--learning-rate", "1"], r"learning_rate: no such field. Did you mean 'optimizer.learning_rate'\?"),
        (["--data.path", "x"], r"data.path: no such field. Did you mean 'data.sources.0.path'\?"),
        (["--model.num-layers", "x"], r"command line: model.num_layers: got 'x'; allowed: an integer"),
        (["--model.attention.num-heads", "7"], r"model.attention.num_heads: got 7; allowed: a divisor"),
        (["--steps", "0"], r"command line: steps: got 0"),
        (["--steps"], r"command line: --steps: a value is missing"),
        (["--steps", "--seed", "3"], r"command line: --steps: a value is missing"),
        (["steps", "3"], r"command line: got 'steps'; expected --field value"),
        (["--steps.more", "3"], r"command line: steps.more: steps has no fields"),
        (["--model", "3"], r"command line: model: got 3; expected a mapping"),
        (["--data.sources.1.weight", "3"], r"command line: data.sources: got item '1'; allowed: 0 to 0"),
        (["--data.sources.x.weight", "3"], r"command line: data.sources: got item 'x'"),
        (["--model.num-layers", "[1"], r"command line: model.num_layers: not valid YAML"),
        (["--model.num-layers", "2020-01-01"], r"command line: model.num_layers: a value that is not text, a number"),
        (["--objective.kind", "ul"], r"command line: objective.kind: got 'ul'; .*Did you mean 'ul2'"),
        (["--objective.temperature", "2"], r"temperature is a field of kinds contrastive; this objective is causal"),
        (["--microbatches", "5"], r"command line: microbatches: got 5; allowed: a divisor of batch_size \(32\)"),
        (["--batch-size", "3"], r"test.yaml: microbatches: got 2; allowed: a divisor of batch_size \(3\)"),
    ],
)
def test_a_wrong_override_is_one_line(arguments, message):
    data = {"microbatches": 2} if "--batch-size" in arguments else {"steps": 5}
    with pytest.raises(UserError, match=message) as caught:
        override(*arguments, **data)
    assert "\n" not in str(caught.value)


def test_another_kind_takes_no_fields_that_the_file_gives_the_old_one():
    given = {"model": {"family": "bert"}, "objective": {"kind": "masked"}}
    changed = ["--objective.kind", "contrastive", "--model.head.kind", "embedding"]
    assert override(*changed, **given).objective == Contrastive()
    given["objective"]["mask_rate"] = 0.2
    with pytest.raises(UserError, match=r"test.yaml: objective.mask_rate: .*; this objective is contrastive"):
        override(*changed, **given)


# Unions of unions, as they may be in any section.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary(Config):
    """Positions as angles."""

    kind: Literal["rotary"] = "rotary"
    period: float = 10_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(Config):
    """Positions as vectors."""

    kind: Literal["learned"] = "learned"
    count: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "count", self.count >= 1, "allowed: 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(Config):
    """One mixer."""

    kind: Literal["softmax"] = "softmax"
    num_heads: int = 4
    position: Learned | Rotary = Learned()
    other: Rotary | Learned | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "num_heads", self.num_heads >= 1, "allowed: 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(Config):
    """Another mixer."""

    kind: Literal["latent"] = "latent"
    rank: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent(Config):
    """Two mixers of the same fields."""

    kind: Literal["gru", "lstm"] = "lstm"
    gates: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deep(Config):
    """A model of them."""

    width: int = 16
    mixer: Softmax | Latent = Softmax(position=Rotary(period=5.0))
    pattern: tuple[Softmax | Latent | Recurrent, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for mixer in (self.mixer, *self.pattern):
            if isinstance(mixer, Softmax):
                require(mixer, "num_heads", self.width % mixer.num_heads == 0, f"it must divide width ({self.width})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Top(Config):
    """A run of it."""

    deep: Deep = Deep()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder(Config):
    """Any objective."""

    objective: AnyObjective


def deep(*arguments, **data):
    return build(Top, {"deep": data}, "test.yaml", arguments).deep


def test_a_missing_tag_is_the_default_s_and_so_is_what_a_mapping_leaves_out():
    assert deep(mixer={"num_heads": 2}) == Deep(mixer=Softmax(num_heads=2, position=Rotary(period=5.0)))
    assert deep(mixer={"position": {"period": 3.0}}) == Deep(mixer=Softmax(position=Rotary(period=3.0)))
    assert deep(mixer={"position": {"kind": "learned"}}) == Deep(mixer=Softmax(position=Learned()))
    assert deep(mixer={"other": {"period": 1}}) == Deep(
        mixer=Softmax(position=Rotary(period=5.0), other=Rotary(period=1.0))
    )
    assert deep(mixer={"kind": "latent"}).mixer == Latent()
    assert deep(pattern=[{}, {"kind": "latent", "rank": 3}]).pattern == (Softmax(), Latent(rank=3))
    assert deep(pattern=[{}]).pattern[0].position == Learned()
    assert deep(pattern=[{"kind": "gru"}, {"kind": "lstm", "gates": 4}]).pattern == (
        Recurrent(kind="gru"), Recurrent(gates=4),
    )  # fmt: skip


def test_overrides_reach_any_depth():
    assert deep("--deep.mixer.kind", "latent").mixer == Latent()
    assert deep("--deep.mixer.position.period", "2").mixer.position == Rotary(period=2.0)
    assert deep("--deep.mixer.other.kind=learned", "--deep.mixer.other.count=3").mixer.other == Learned(count=3)
    assert deep("--deep.pattern", "[{kind: softmax}, {kind: latent}]").pattern == (Softmax(), Latent())
    pattern = [{"kind": "softmax"}, {"kind": "latent"}]
    assert deep("--deep.pattern.1.rank", "7", pattern=pattern).pattern == (Softmax(), Latent(rank=7))
    assert deep("--deep.pattern.0.position.count", "7", pattern=pattern).pattern[0].position == Learned(count=7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pattern": [{}, {}, {"num_heads": "two"}]}, "deep.pattern.2.num_heads: got 'two'; allowed: an integer"),
        ({"pattern": [{}, {"num_heads": 0}]}, "deep.pattern.1.num_heads: got 0; allowed: 1 or more"),
        ({"pattern": [{}, {"num_heads": 3}]}, r"deep.pattern.1.num_heads: got 3; it must divide width \(16\)"),
        ({"pattern": [{}, {"position": {"count": 0}}]}, "deep.pattern.1.position.count: got 0; allowed: 1 or more"),
        ({"pattern": [{"position": {"kind": "rotry"}}]}, r"deep.pattern.0.position.kind: .*Did you mean 'rotary'\?"),
        ({"pattern": [{"rank": 3}]}, "deep.pattern.0.rank: rank is a field of kinds latent; this one is softmax"),
        ({"pattern": [{"gates": 3}]}, "deep.pattern.0.gates: gates is a field of kinds gru, lstm; this one is softmax"),
        ({"pattern": [{"kind": "gru", "rank": 3}]}, "deep.pattern.0.rank: .* kinds latent; this one is gru"),
        ({"pattern": [{"kind": "gruu"}]}, r"deep.pattern.0.kind: got 'gruu'; .*Did you mean 'gru'\?"),
        ({"mixer": {"position": {"count": 3}}}, "deep.mixer.position.count: .* kinds learned; this position is rotary"),
        ({"mixer": {"other": {"kind": "x"}}}, "deep.mixer.other.kind: got 'x'; allowed: rotary, learned"),
        ({"mixer": {"kind": "latent", "rank": None}}, "deep.mixer.rank: got None; allowed: an integer"),
        ({"mixer": None}, "deep.mixer: got None; expected a mapping"),
        ({"pattern": [None]}, "deep.pattern.0: got None; expected a mapping"),
    ],
)
def test_a_mistake_at_any_depth_has_its_exact_path(data, message):
    with pytest.raises(UserError, match=f"^test.yaml: {message}"):
        deep(**data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(name=3), "name: got 3; allowed: a text"),
        (lambda: RunConfig(name="x", steps=2.0), "steps: got 2.0; allowed: an integer"),
        (lambda: RunConfig(name="x", objective="masked"), "objective: got 'masked'; allowed: Causal, "),
        (lambda: LossConfig(z_loss="1"), "z_loss: got '1'; allowed: a number"),
        (lambda: Masked(whole_word=1), "whole_word: got 1; allowed: true or false"),
        (lambda: FilesSource(path="x", format="text "), r"format: got 'text '; .*Did you mean 'text'\?"),
        (lambda: Contrastive(temperature=0), "temperature: got 0.0; allowed: above 0"),
        (lambda: Contrastive(kind="masked"), "kind: got 'masked'; allowed: 'contrastive'"),
    ],
)
def test_a_config_built_in_python_is_checked_too(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


def test_difference_names_every_field():
    old = parse(MINIMAL, "test")
    new = dataclasses.replace(old, seed=3, model=dataclasses.replace(old.model, num_layers=2))
    assert difference(to_data(old), to_data(new)) == ["model.num_layers: 12 → 2", "seed: 0 → 3"]


def test_every_field_has_a_meaning():
    missing = [field.path for field in fields(RunConfig(name="x")) if not field.meaning]
    assert not missing
    kinds = {field.path: field.meaning for field in fields(RunConfig(name="x"))}
    assert kinds["objective.kind"].startswith("Predicts each token from those before it")
    assert "One of causal, prefix, masked, " in kinds["objective.kind"]
    assert kinds["data.sources.0.kind"].endswith("One of stdlib, files, hub, wheel, synthetic.")
    assert "One of gpt, bert, " in kinds["model.family"]


def test_no_config_has_many_fields_of_its_own():
    kinds = [RunConfig, *OBJECTIVES.values(), FilesSource, SyntheticSource]
    assert not [kind.__name__ for kind in kinds if len(vars(kind).get("__annotations__", {})) > 21]


def test_an_error_of_a_config_that_exists_has_its_path_too():
    error = ConfigError(BertConfig, "head", "masked", "for no reason")
    assert with_path(RunConfig, error) == "model.head: got 'masked'; for no reason"
    assert with_path(RunConfig, ConfigError(FilesSource, "path", "", "a path")) == "data.sources.*.path: got ''; a path"
    assert with_path(RunConfig, ConfigError(Softmax, "num_heads", 3, "allowed")) == "num_heads: got 3; allowed"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_restored_from_its_data_without_pydantic(path, monkeypatch):
    config = load(path)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert restore(RunConfig, to_data(config)) == config
