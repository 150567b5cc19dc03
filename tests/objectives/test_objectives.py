"""What holds for every objective: batches are as described, settings have an effect or are refused, and none is forgotten."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train.objectives
from tests.shrunk import dialogue_source
from tests.train.task_runs import HEADS, KINDS, SETTINGS, SOURCES, write_rows
from train.checkpoints.selection import ranking_key
from train.config import RunConfig, to_data
from train.data.evaluation import evaluation_batches
from train.data.examples.spans import MODES
from train.data.loader import train_batches
from train.data.prepared.label_arrays import MARKED
from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.source_config import FilesSource, SyntheticSource
from train.data.tokenization.tokenizer import CLS, MASK, SEP, TokenizerConfig
from train.loss import LossConfig
from train.objectives import OBJECTIVES, AnyObjective, Contrastive, Objective, Task, objectives
from transformer.errors import ConfigError, UserError
from transformer.huggingface.encoders import head_of
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.families import FAMILIES, make_model

ROOT = Path(__file__).parents[2]
LENGTH, B = 32, 6
TOKENIZER = TokenizerConfig(special_tokens=(MASK, CLS, SEP, *MODES), sentinels=40)
TRAINED = [kind for kind in OBJECTIVES if kind != "none"]

CASES = [
    *(("causal", packing, {}) for packing in ("chunk", "documents")),
    ("prefix", "chunk", {}),
    *(
        (kind, packing, {})
        for kind in ("masked", "next_sentence", "sentence_order", "replaced_tokens")
        for packing in ("chunk", "documents")
    ),
    ("masked", "chunk", {"whole_word": True}),
    ("masked", "chunk", {"ngram": 3, "mask_rate": 0.3}),
    ("span_corruption", "chunk", {}),
    ("span_corruption", "chunk", {"source_length": 48, "noise_density": 0.3}),
    ("ul2", "chunk", {}),
    ("ul2", "chunk", {"source_length": 40, "mode_tokens": True}),
    ("seq2seq", "documents", {"too_long": "truncate"}),
    ("seq2seq", "documents", {"source_length": 64}),
    ("seq2seq", "pad", {"max_shapes": 2}),
    ("contrastive", "documents", {"too_long": "truncate"}),
    *((kind, "documents", SETTINGS.get(kind, {})) for kind in KINDS),
    ("regression", "documents", {"too_long": "truncate"}),
    *((kind, "documents", {"too_long": "truncate"}) for kind in ("chat", "preference")),
]


def length_of(kind):
    """A chat template takes much of a row."""
    return 64 if OBJECTIVES[kind].needs_reference else LENGTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("objectives")


def data_of(kind: str, packing: str, folder: Path) -> DataConfig:
    """A small corpus of the documents that an objective takes."""
    common = {"packing": packing, "tokenizer": TOKENIZER, "validation_fraction": 0.3}
    if kind in SOURCES:
        return DataConfig(sources=(FilesSource(path=str(write_rows(kind, folder)), **SOURCES[kind]),), **common)
    if OBJECTIVES[kind].label_kind in MARKED:
        return DataConfig(sources=(dialogue_source({"chat": "dialogues"}.get(kind, "preferences"), folder),), **common)
    if OBJECTIVES[kind].takes_pairs:
        return DataConfig(sources=(SyntheticSource(limit=60),), **common)
    path = folder / "texts.jsonl"
    texts = [f"{number} is the number of this document. " * (1 + number % 5) for number in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(sources=(FilesSource(path=str(path)),), **common)


def described(arrays) -> dict:
    return {
        name: (tuple(array.shape), np.dtype(array.dtype))
        for name, array in arrays.items()
        if name != "example" and not name.endswith("lengths")
    }


def check_lengths(batch, *, packed):
    """They are those of the documents, which lie one after the other; what has segments has them."""
    assert {name for name in batch if name.endswith("lengths")} == {
        name.replace("segments", "lengths") for name in batch if name.endswith("segments")
    }
    for name in batch:
        if not name.endswith("lengths"):
            continue
        lengths = batch[name].reshape(-1, batch[name].shape[-1])
        segments = batch[name.replace("lengths", "segments")].reshape(len(lengths), -1)
        assert lengths.shape[1] == 1 or (packed and lengths.shape[1] % 8 == 0)
        for sizes, row in zip(lengths, segments, strict=True):
            numbers = np.repeat(np.arange(1, len(sizes) + 1), sizes)
            np.testing.assert_array_equal(row, np.pad(numbers, (0, len(row) - len(numbers))))


@pytest.mark.parametrize(("kind", "packing", "settings"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_batches_are_as_described(kind, packing, settings, folder, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(folder))
    data, objective = data_of(kind, packing, folder), OBJECTIVES[kind](**settings)
    prepared = prepare(data, progress=False)
    length = length_of(kind)
    common = {"batch_size": B, "length": length, "objective": objective}
    model = BertConfig(**HEADS[kind]) if kind in HEADS else BertConfig()
    given = described(objective.batch(B, length, data) | objective.model_batch(B, model))
    real = [train_batches(prepared, data, seed=0, **common).batch(step) for step in (0, 5)]
    real += [evaluation_batches(prepared, data, **common).batch(0)]
    for one in real:
        check_lengths(one, packed=packing == "documents")
    for one in map(described, real):
        if packing == "pad":
            assert {name: dtype for name, (_, dtype) in one.items()} == {
                name: dtype for name, (_, dtype) in given.items()
            }
            assert all(shape[0] == B and shape[-1] <= given[name][0][-1] for name, (shape, _) in one.items())
        else:
            assert one == given


def test_every_objective_has_a_case():
    assert {kind for kind, _, _ in CASES} == set(TRAINED)


def test_a_new_objective_is_a_file_and_a_line():
    known = typing.get_args(AnyObjective)
    assert set(known) == set(objectives()) == set(OBJECTIVES.values())
    assert all(OBJECTIVES[kind]().kind == kind for kind in OBJECTIVES)
    files = {Path(inspect.getfile(one)) for one in known}
    package = Path(train.objectives.__file__).parent
    assert all(package in path.parents for path in files)
    # Nowhere else is a kind a name to compare with, but where imported weights have none.
    kinds = set(OBJECTIVES) - {"none", "tokens", "choice", "answer", "prefix", "classification", "regression", "masked"}
    for path in (ROOT / "train").rglob("*.py"):
        if package in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Compare):
                texts = {
                    one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)
                }
                assert not texts & kinds, f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize("kind", TRAINED)
def test_what_an_objective_says_of_itself(kind):
    objective = OBJECTIVES[kind]()
    assert set(objective.families) <= set(FAMILIES) and objective.families
    assert set(objective.metrics) >= set(objective.lower_is_better) - {"loss"}
    assert "runs/x" in objective.next_step("runs/x")
    assert objective.kind_name() == kind and OBJECTIVES[kind].__doc__
    assert objective.unit
    for metric in objective.metrics:
        more, less = ranking_key(metric, {metric: 2.0}), ranking_key(metric, {metric: 1.0})
        assert (more > less) == (metric not in objective.lower_is_better)


def test_a_metric_means_the_same_everywhere():
    lower = {name for one in objectives() for name in one.lower_is_better}
    assert all((name in one.lower_is_better) == (name in lower) for one in objectives() for name in one.metrics)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_setting_of_the_loss_has_an_effect_or_is_refused(kind, folder, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(folder))
    settings, packing = next((given, packing) for name, packing, given in CASES if name == kind)
    objective, data = OBJECTIVES[kind](**settings), data_of(kind, packing, folder)
    configs = {name: LossConfig(**{name: 0.1}) for name in ("z_loss", "label_smoothing")}
    for name, config in configs.items():
        if name in objective.loss_settings:
            objective.check_loss(config)
        else:
            with pytest.raises(ConfigError, match=f"{name}: got 0.1; not for objective {kind}; allowed: 0"):
                objective.check_loss(config)
    prepared = prepare(data, progress=False)
    batches = train_batches(prepared, data, batch_size=B, length=length_of(kind), seed=0, objective=objective)
    # What a reference model says is known in a run.
    batch = {name: jnp.nan_to_num(jnp.asarray(rows)) for name, rows in batches.batch(0).items() if name != "example"}
    graphdef, params = nnx.split(make_model(model_of(objective), nnx.Rngs(0)))

    @jax.jit
    def losses(params, batch):
        model = nnx.merge(graphdef, params)
        return [objective.loss(model, batch, one) for one in (LossConfig(), *configs.values())]

    plain, *others = losses(params, batch)
    for name, added in zip(configs, others, strict=True):
        assert name not in objective.loss_settings or float(plain.loss) != float(added.loss)
        assert float(plain.nll) == float(added.nll)


def model_of(objective: Objective):
    """A tiny model for an objective."""
    family = objective.families[0]
    small = {
        "vocab_size": 320,
        "max_length": 64,
        "num_layers": 1,
        "embed_dim": 16,
        "attention": SoftmaxConfig(num_heads=2),
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if objective.heads:
        labels = {"regression": 1, "classification": 3, "token_classification": 4}.get(objective.kind, 2)
        several = objective.kind == "multi_label_classification"
        small |= {
            "head": head_of(objective.heads[0], 3 if several else labels, multi_label=several),
            "norm_first": True,
        }
    return FAMILIES[family].config(**small)


@pytest.mark.parametrize("kind", TRAINED)
def test_an_objective_and_its_model_make_a_run_and_others_do_not(kind):
    objective = OBJECTIVES[kind]()
    config = RunConfig(name="x", model=model_of(objective), objective=objective)
    assert config.objective is objective
    other = "gpt" if "gpt" not in objective.families else "t5"
    with pytest.raises(ConfigError, match=rf"kind: got '{kind}'; allowed with a model of family '{other}': "):
        RunConfig(name="x", model=FAMILIES[other].config(), objective=objective)


def test_held_out_pairs_are_scored_at_the_run_s_temperature():
    rng = np.random.default_rng(0)
    model = make_model(model_of(Contrastive()), nnx.Rngs(0))
    names = ("tokens", "segments", "positions")
    batch = {f"{side}{name}": jnp.ones((B, 8), jnp.int32) for side in ("", "other_") for name in names}
    for side in ("", "other_"):
        batch[f"{side}tokens"] = jnp.asarray(rng.integers(1, 256, (B, 8)), jnp.int32)
    batch["weights"] = jnp.ones((B, 1), jnp.float32)
    losses = {}
    for temperature in (0.05, 1.0):
        objective = Contrastive(temperature=temperature)
        sums, outputs = objective.evaluate(model, batch)
        assert outputs == {}
        losses[temperature] = float(sums.loss)
        assert losses[temperature] == float(objective.loss(model, batch, LossConfig()).loss)
    assert losses[0.05] != losses[1.0]


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_class_weights_are_for_training_alone(kind, folder, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(folder))
    data = data_of(kind, "documents", folder)
    prepared = prepare(data, progress=False)
    plain = OBJECTIVES[kind](**SETTINGS[kind])
    model = make_model(model_of(plain), nnx.Rngs(0))
    names = len(prepared.meta.labels)
    weighted = dataclasses.replace(plain, class_weights=tuple(float(1 + number) for number in range(names)))
    batches = train_batches(prepared, data, batch_size=B, length=LENGTH, seed=0, objective=plain)
    batch = {name: jnp.asarray(rows) for name, rows in batches.batch(0).items() if name != "example"}
    assert float(plain.loss(model, batch, LossConfig()).loss) != float(weighted.loss(model, batch, LossConfig()).loss)
    jax.tree.map(np.testing.assert_array_equal, plain.evaluate(model, batch), weighted.evaluate(model, batch))
    balanced = dataclasses.replace(plain, class_weights="balanced")
    with pytest.raises(UserError, match="only `manyheads train` knows the frequencies of classes; give numbers"):
        balanced.loss(model, batch, LossConfig())
    assert len(balanced.with_data(prepared).class_weights) == names
    with pytest.raises(UserError, match=f"got 1 numbers; there are {names} classes"):
        dataclasses.replace(plain, class_weights=(1.0,)).with_data(prepared)


def test_no_objective_has_a_field_of_another():
    """Fields of the same name are of a common base, or mean the same."""
    data = {kind: set(to_data(OBJECTIVES[kind]())) for kind in OBJECTIVES}
    assert data["causal"] == data["none"] == {"kind"}
    assert "temperature" not in set().union(*(names for kind, names in data.items() if kind != "contrastive"))
    assert data["regression"] == {"kind", "too_long"}


def test_the_task_of_an_imported_head_is_found():
    tasks = [one for one in OBJECTIVES.values() if issubclass(one, Task) and one.document_fields is not None]
    for head, labels, kind in (
        ("classification", 3, "classification"), ("classification", 1, "regression"),
        ("tokens", 5, "token_classification"), ("answer", 2, "answer"), ("masked", 2, None),
    ):  # fmt: skip
        model = BertConfig(head=head_of(head, labels))
        assert [one.kind_name() for one in tasks if one().suits(model)] == ([] if kind is None else [kind])


def test_data_knows_nothing_of_objectives():
    for path in (ROOT / "train" / "data").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [one.name for one in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith(("train.objectives", "train.loss"))], path
