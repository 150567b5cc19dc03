"""The losses of an encoder's tasks: by definition, on devices, and without influence of padding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.train.task_runs import KINDS, run_of, write_rows
from train.config import RunConfig
from train.data.loader import train_batches
from train.data.prepared.prepare import prepare
from train.loss import LossConfig, LossSums, of_classes, of_labels
from train.objectives import Answer, TokenClassification
from train.parallel.mesh import MeshConfig, make_mesh, shard_batch, use_mesh
from train.program.program import Program, batch_shapes
from transformer.errors import ConfigError, UserError
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.heads import ClassificationHeadConfig, TokensHeadConfig


def batches_and_model(kind, tmp_path, **changes):
    config = run_of(kind, write_rows(kind, tmp_path), tmp_path / "run", **changes)
    prepared = prepare(config.data, progress=False)
    batches = train_batches(
        prepared, config.data, batch_size=16, length=config.sequence_length, seed=0, objective=config.objective
    )
    batch = {name: rows for name, rows in batches.batch(0).items() if name != "example"}
    return config, batch, make_model(config.model, nnx.Rngs(0))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_known_and_padding_has_no_influence(kind, tmp_path):
    config, batch, model = batches_and_model(kind, tmp_path)
    task = config.objective
    shapes = {name: (shape.shape, shape.dtype) for name, shape in batch_shapes(config).items()}
    assert shapes == {name: (rows.shape, rows.dtype) for name, rows in batch.items()}
    arrays = jax.tree.map(jnp.asarray, batch)
    sums, outputs = task.outputs(model, arrays, LossConfig())
    other = dict(arrays)
    other["tokens"] = jnp.where(arrays["segments"] > 0, arrays["tokens"], 77)
    again, more = task.outputs(model, other, LossConfig())
    np.testing.assert_allclose(again.loss, sums.loss, rtol=1e-5)
    inside = batch["segments"] > 0 if kind == "token_classification" else ...
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[inside], b[inside], rtol=1e-4, atol=1e-5), outputs, more)
    # Nor have rows that only fill a batch.
    filled = arrays | {"weights": arrays["weights"].at[8:].set(0)}
    if "labels" in filled:
        filled["labels"] = arrays["labels"].at[8:].set(-1)
    half = jax.tree.map(lambda rows: rows[:8], arrays)
    one, two = (task.outputs(model, rows, LossConfig())[0] for rows in (filled, half))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)


@pytest.mark.parametrize(("kind", "strategy"), [("token_classification", "fsdp"), ("choice", "tensor")])
def test_eight_devices_are_as_one(kind, strategy, tmp_path):
    config, batch, _ = batches_and_model(kind, tmp_path, microbatches=2)
    wide = dataclasses.replace(config.model, attention=SoftmaxConfig(num_heads=8))
    # A choice's bias has no gradient but rounding, of which Adam would make steps.
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, epsilon=1e-2))
    found = []
    for devices, named in ((1, "dp"), (8, strategy)):
        mesh = MeshConfig(strategy=named)
        own = dataclasses.replace(config, mesh=mesh, model=wide)
        placed = make_mesh(mesh, jax.devices()[:devices])
        with use_mesh(placed, mesh.rules):
            program = Program(own, placed)
            rows = shard_batch(batch | {"example": np.arange(16, dtype=np.int32)}, program.batch_sharding)
            state = program.init()
            sums, outputs = jax.device_get(program.eval_step(state.params, rows))
            del rows["example"]
            state, metrics = program.train_step(state, rows)
            found.append((jax.device_get(metrics), sums.loss, outputs, jax.device_get(nnx.to_pure_dict(state.params))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-4), *found)


@pytest.mark.torch
@pytest.mark.parametrize("weights", [(0.5, 2.0, 1.0), (3.0, 0.0, 7.0)])
def test_classes_are_weighed_as_in_torch(weights):
    import torch

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 6, 3)).astype(np.float32), rng.integers(0, 3, (2, 6)).astype(np.int32)
    given = (np.arange(12).reshape(2, 6) % 4 != 3).astype(np.float32)
    sums = of_classes(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(given), LossConfig(), weights)
    targets = torch.from_numpy(np.where(given > 0, labels, -100)).long().reshape(-1)
    expected = torch.nn.CrossEntropyLoss(torch.tensor(weights))(torch.from_numpy(logits).reshape(-1, 3), targets)
    np.testing.assert_allclose(sums.loss / sums.weight, expected, rtol=1e-5)
    assert sums.count == given.sum() and sums.correct == ((logits.argmax(-1) == labels) * given).sum()
    with pytest.raises(UserError, match=r"objective\.class_weights: got 2 numbers; there are 3 classes"):
        of_classes(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(given), LossConfig(), (1.0, 2.0))


@pytest.mark.torch
def test_each_class_is_a_decision_as_in_torch():
    import torch

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 30, (6, 3)).astype(np.float32), rng.integers(0, 2, (6, 3)).astype(np.int32)
    weights = np.array([1, 1, 1, 1, 0, 0], np.float32)

    def loss(logits):
        sums = of_labels(logits, jnp.asarray(labels), jnp.asarray(weights))
        return sums.loss / sums.weight, sums

    (found, sums), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    theirs = torch.tensor(logits[:4], requires_grad=True)
    expected = torch.nn.BCEWithLogitsLoss()(theirs, torch.from_numpy(labels[:4]).float())
    expected.backward()
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient[:4], theirs.grad, atol=1e-6)
    assert not gradient[4:].any()
    assert float(sums.correct) == ((logits > 0) == (labels > 0)).all(1)[:4].sum()


def test_the_answer_loss_is_the_mean_of_both_ends(tmp_path):
    _, batch, model = batches_and_model("answer", tmp_path)
    arrays = jax.tree.map(jnp.asarray, batch)
    logits = model(
        arrays["tokens"], positions_BT=arrays["positions"], segments_BT=arrays["segments"],
        token_types_BT=arrays["token_types"],
    ).logits  # fmt: skip
    log_p = jax.nn.log_softmax(jnp.where(arrays["segments"][..., None] > 0, logits, -jnp.inf), axis=1)
    expected = -np.mean([log_p[row, place, end] for row in range(16) for end, place in enumerate(batch["labels"][row])])
    sums = Answer().loss(model, arrays, LossConfig())
    assert isinstance(sums, LossSums)
    np.testing.assert_allclose(sums.loss / sums.weight, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        (
            "classification",
            {"checkpoint": {"best": "bleu"}},
            r"best: got 'bleu'; allowed with objective classification: loss, acc",
        ),
        (
            "regression",
            {"model": {"head": ClassificationHeadConfig(num_labels=2)}},
            "num_labels: got 2; a regression predicts one number; allowed: 1",
        ),
        ("regression", {"loss": {"z_loss": 0.1}}, "z_loss: got 0.1; not for objective regression"),
        (
            "classification",
            {"model": {"head": ClassificationHeadConfig(num_labels=1)}},
            "num_labels: got 1; allowed: 2 or more",
        ),
        (
            "multi_label_classification",
            {"model": {"head": ClassificationHeadConfig(num_labels=3)}},
            "multi_label: got False; allowed with objective 'multi_label_classification': true",
        ),
        (
            "classification",
            {"model": {"head": ClassificationHeadConfig(num_labels=3, multi_label=True)}},
            "multi_label: got True; allowed with objective 'classification', which predicts one class: false",
        ),
        ("answer", {"loss": {"label_smoothing": 0.1}}, "label_smoothing: got 0.1; not for objective answer"),
        (
            "choice",
            {"model": {"head": ClassificationHeadConfig()}},
            "kind: got 'classification'; allowed with objective 'choice': 'choice'",
        ),
        ("classification", {"evaluation": {"patience": 0}}, "patience: got 0; allowed: 1 or more"),
    ],
)
def test_what_does_not_go_together_is_refused(kind, changes, told, tmp_path):
    config = run_of(kind, tmp_path / "none.jsonl", tmp_path)
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(
            config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
        )


def test_an_objective_needs_its_head():
    assert BertConfig(head=TokensHeadConfig()).head.classes == 2
    with pytest.raises(ConfigError, match="allowed with objective 'token_classification': 'tokens'"):
        RunConfig(name="x", model=BertConfig(), objective=TokenClassification())


@pytest.mark.parametrize("kind", ["classification", "answer", "choice"])
def test_a_model_of_one_token_type_reads_pairs(kind, tmp_path):
    config, batch, _ = batches_and_model(kind, tmp_path)
    task = config.objective
    model = make_model(dataclasses.replace(config.model, token_types=1), nnx.Rngs(0))
    arrays = jax.tree.map(jnp.asarray, batch)
    assert int(arrays["token_types"].max()) == 1
    sums, _ = task.outputs(model, arrays, LossConfig())
    plain = arrays if kind != "classification" else arrays | {"token_types": jnp.zeros_like(arrays["token_types"])}
    assert np.isfinite(float(sums.loss))
    assert float(sums.loss) == float(task.outputs(model, plain, LossConfig())[0].loss)
