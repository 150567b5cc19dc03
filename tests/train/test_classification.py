"""Classes of rows: the loss against its definition, what is counted, and what a config must say."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train.config import RunConfig
from train.loss import LossConfig
from train.objectives import Classification
from train.parallel.mesh import MeshConfig, make_mesh, use_mesh
from train.program.state import abstract_state, init_state, state_maker
from train.program.step import make_eval_step, make_first_pass, make_gradient, make_train_step
from train.run.evaluate import evaluate, scores_of
from transformer.errors import ConfigError
from transformer.functional import graphdef_of
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.gpt import GPTConfig
from transformer.models.heads import ClassificationHeadConfig

B, T, C, V = 8, 6, 3, 16
MODEL = BertConfig(
    vocab_size=V,
    max_length=T,
    num_layers=1,
    embed_dim=16,
    attention=SoftmaxConfig(num_heads=2),
    dropout=0.0,
    attention_dropout=0.0,
    head=ClassificationHeadConfig(num_labels=C),
)


def batch_of(seed: int = 0, padding: int = 0) -> dict[str, np.ndarray]:
    """Rows of tokens, of which the last `padding` are none."""
    rng = np.random.default_rng(seed)
    segments = (np.arange(T) < rng.integers(2, T + 1, B)[:, None]).astype(np.int32)
    inside = np.arange(B) < B - padding
    return {
        "tokens": (rng.integers(1, V, (B, T)) * segments).astype(np.int32),
        "segments": segments,
        "positions": (np.arange(T) * segments).astype(np.int32),
        "labels": np.where(inside, rng.integers(0, C, B), -1).astype(np.int32),
        "weights": inside[:, None].astype(np.float32),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("padding", [0, 3])
def test_loss_and_count_by_definition(smoothing, padding):
    batch = batch_of(padding=padding)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(B, C)), jnp.float32)
    output = types.SimpleNamespace(logits=logits, added_loss=None, routers=())
    config = LossConfig(label_smoothing=smoothing)
    sums = Classification().loss(lambda *_, **__: output, batch, config)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = {"loss": 0.0, "nll": 0.0, "weight": 0.0, "correct": 0.0}
    for row in range(B - padding):
        label = batch["labels"][row]
        expected["nll"] -= log_p[row, label]
        expected["loss"] -= (1 - smoothing) * log_p[row, label] + smoothing * log_p[row].mean()
        expected["weight"] += 1
        expected["correct"] += log_p[row].argmax() == label
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=1e-5)
    assert 0 < expected["correct"] < B - padding


def test_scores_are_means_over_rows_of_all_batches():
    graphdef = graphdef_of(functools.partial(make_model, MODEL))
    mesh = make_mesh(MeshConfig())
    batches = [batch_of(0), batch_of(1, padding=5)]
    with use_mesh(mesh, MeshConfig().rules):
        make = state_maker(functools.partial(make_model, MODEL), optax.sgd(0.1))
        params = init_state(make, abstract_state(make, mesh), 0).params
        step = make_eval_step(graphdef, Classification())
        found = evaluate(step, params, [jax.tree.map(jnp.asarray, batch) for batch in batches])
    parts = [sums for sums, _ in found]
    scores = scores_of(parts, None)
    assert scores.tokens == 2 * B - 5
    assert scores.loss == pytest.approx(sum(float(part.loss) for part in parts) / scores.tokens)
    assert scores.accuracy == pytest.approx(sum(float(part.correct) for part in parts) / scores.tokens)
    assert scores.perplexity is None and scores.bits_per_byte is None
    assert str(scores) == f"loss {scores.loss:.4f}  accuracy {scores.accuracy:.2%}"
    tokens = dataclasses.replace(scores, accuracy=None, perplexity=2.0, bits_per_byte=1.0)
    assert str(tokens) == f"loss {scores.loss:.4f}  perplexity 2.00  bits per byte 1.0000"


def test_microbatches_give_the_gradient_of_the_whole():
    make, mesh = functools.partial(make_model, MODEL), make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optax.sgd(0.1)
    found = []
    with use_mesh(mesh, MeshConfig().rules):
        batch = jax.tree.map(jnp.asarray, batch_of(padding=1))
        make_state = state_maker(make, optimizer)
        abstract = abstract_state(make_state, mesh)
        for parts in (1, 4):
            given = graphdef_of(make), LossConfig(), Classification()
            gradient, first_pass = make_gradient(*given), make_first_pass(*given, microbatches=parts)
            step = make_train_step(gradient, first_pass, optimizer, abstract, microbatches=parts)
            state, metrics = step(init_state(make_state, abstract, 0), batch)
            found.append((state.params, metrics))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found)
    assert found[0][1]["tokens"] == B - 1


def test_the_mean_of_a_row_leaves_padding_out():
    model = make_model(dataclasses.replace(MODEL, head=dataclasses.replace(MODEL.head, pooling="mean")), nnx.Rngs(0))
    batch = jax.tree.map(jnp.asarray, batch_of())
    expected = model(batch["tokens"], segments_BT=batch["segments"]).logits
    other = jnp.where(batch["segments"] > 0, batch["tokens"], 5)
    np.testing.assert_allclose(model(other, segments_BT=batch["segments"]).logits, expected, rtol=1e-5)
    first = make_model(MODEL, nnx.Rngs(0))(batch["tokens"], segments_BT=batch["segments"]).logits
    assert not np.allclose(first, expected)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (BertConfig(), r"kind: got 'masked'; allowed with objective 'classification': 'classification'"),
        (
            GPTConfig(),
            r"kind: got 'classification'; allowed with a model of family 'gpt': causal, chat, preference, prefix",
        ),
    ],
)
def test_another_model_is_refused(model, told):
    with pytest.raises(ConfigError, match=told):
        RunConfig(name="x", model=model, objective=Classification())
