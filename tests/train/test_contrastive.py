"""Pairs that find each other: the rows, the loss against its definition, every layout, and a run that learns."""

from __future__ import annotations

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manyheads.run import Run
from tests.train.fine_tuning import SMALL, SPECIAL
from train.config import RunConfig, load
from train.config.sections import CheckpointConfig, EvaluationConfig, LogConfig, SampleConfig
from train.data.loader import train_batches
from train.data.prepared.prepare import DataConfig, prepare
from train.data.sources.source_config import FilesSource
from train.data.tokenization.tokenizer import CLS, SEP, TokenizerConfig
from train.loss import LossConfig
from train.objectives import Contrastive
from train.optimizer import OptimizerConfig
from train.parallel.mesh import MeshConfig, make_mesh, shard_batch, use_mesh
from train.program.program import Program, batch_shapes
from train.run.loop import train
from train.run.run_files import load_run
from transformer.errors import ConfigError, UserError
from transformer.models.bert import BertConfig
from transformer.models.embedding_head import DenseLayerConfig, EmbeddingHeadConfig, LayerNormLayerConfig
from transformer.models.heads import MaskedHeadConfig

pytestmark = pytest.mark.usefixtures("one_device")

MODEL = BertConfig(**SMALL, head=EmbeddingHeadConfig(pooling="mean"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Words, and the same with every letter replaced by another one."""
    path = tmp_path_factory.mktemp("contrast") / "pairs.jsonl"
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(240)]
    other = str.maketrans("abcdefgh", "stuvwxyz")
    path.write_text("".join(json.dumps({"text": one, "other": one.translate(other)}) + "\n" for one in words))
    return path


def config_of(pairs, folder, **changes):
    base = RunConfig(
        name="contrast", run_dir=str(folder), steps=60, batch_size=32, length=8, model=MODEL,
        objective=Contrastive(),
        data=DataConfig(
            sources=(FilesSource(path=str(pairs), target_field="other"),), packing="documents",
            validation_fraction=0.2, tokenizer=TokenizerConfig(special_tokens=SPECIAL),
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=5, clip_norm=1.0),
        evaluation=EvaluationConfig(every=20), checkpoint=CheckpointConfig(every=30),
        log=LogConfig(every=20, trackers=()), sample=SampleConfig(every=0),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@functools.cache
def first_batch(pairs):
    config = config_of(pairs, "unused")
    prepared = prepare(config.data)
    batches = train_batches(
        prepared, config.data, batch_size=32, length=8, seed=0, objective=config.objective
    )  # fmt: skip
    return prepared, batches.batch(0)


def test_each_row_is_a_pair_between_its_special_tokens(pairs):
    prepared, batch = first_batch(pairs)
    cls, sep = (prepared.tokenizer.special_ids[name] for name in (CLS, SEP))
    other = str.maketrans("abcdefgh", "stuvwxyz")
    for row in range(32):
        sides = []
        for prefix in ("", "other_"):
            size = int(batch[f"{prefix}segments"][row].sum())
            tokens = batch[f"{prefix}tokens"][row][:size].tolist()
            assert (tokens[0], tokens[-1]) == (cls, sep)
            sides.append(prepared.tokenizer.decode(tokens[1:-1]))
        assert sides[1] == sides[0].translate(other) and len(sides[0]) == 5
    shapes = batch_shapes(config_of(pairs, "unused"))
    for name, rows in batch.items():
        assert name == "example" or shapes[name].shape == rows.shape


@pytest.mark.parametrize("padding", [0, 3])
def test_loss_and_count_by_definition(padding):
    rng = np.random.default_rng(0)
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 8, 4)))
    b = (b + 0.7 * a) / np.linalg.norm(b + 0.7 * a, axis=1, keepdims=True)
    given = iter([a, b])
    batch = {
        name: np.zeros((8, 1), np.int32)
        for name in batch_shapes(config_of("unused.jsonl", "unused"))
        if name != "weights"
    }
    batch["weights"] = jnp.asarray((np.arange(8) < 8 - padding)[:, None], jnp.float32)

    def model(*_, **__):
        return types.SimpleNamespace(logits=jnp.asarray(next(given), jnp.float32), added_loss=None, routers=())

    sums = Contrastive(temperature=0.2).loss(model, batch, LossConfig())
    real = 8 - padding
    scores = (a[:real] @ b[:real].T) / 0.2
    expected = np.log(np.exp(scores).sum(1)) - np.diag(scores)
    np.testing.assert_allclose(sums.loss, expected.sum(), rtol=1e-5)
    assert float(sums.weight) == real
    assert float(sums.correct) == (scores.argmax(1) == np.arange(real)).sum() > 0


@pytest.mark.all_devices
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(),
        MeshConfig(strategy="fsdp"),
        MeshConfig(tensor=2),
        MeshConfig(strategy="pipeline", pipeline=2, data=4),
    ],
    ids=lambda mesh: mesh.strategy,
)
def test_negatives_are_those_of_all_devices(pairs, mesh):
    np.testing.assert_allclose(losses(pairs, mesh, 8), losses(pairs, MeshConfig(), 1), rtol=2e-4)


@functools.cache
def losses(pairs, mesh, num_devices):
    """Losses and gradient norms of three steps."""
    _, batch = first_batch(pairs)
    batch = {name: rows for name, rows in batch.items() if name != "example"}
    laid = make_mesh(mesh, jax.devices()[:num_devices])
    with use_mesh(laid, mesh.rules):
        program = Program(config_of(pairs, "unused", mesh=mesh), laid)
        state, seen = program.init(), []
        for _ in range(3):
            state, metrics = program.train_step(state, shard_batch(batch, program.batch_sharding))
            seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(seen)


def test_a_run_learns_and_reports_its_accuracy(pairs, tmp_path, capsys):
    done = train(config_of(pairs, tmp_path / "run"))
    assert done.scores.accuracy > 0.5 and done.scores.perplexity is None
    said = capsys.readouterr().out
    assert "held-out loss" in said and "accuracy" in said and "to embed texts: manyheads embed" in said
    assert load(tmp_path / "run" / "config.yaml").objective.kind == "contrastive"


def test_a_head_with_layers_of_its_own_is_trained(pairs, tmp_path):
    layers = (DenseLayerConfig(dim=12), LayerNormLayerConfig())
    head = EmbeddingHeadConfig(pooling=("cls", "mean"), layers=layers)
    config = config_of(pairs, tmp_path / "run", model=dataclasses.replace(MODEL, head=head))
    assert train(config).scores.accuracy > 0.4
    loaded = load_run(tmp_path / "run")
    kernel = loaded.params["embedding_head"]["layer_0"]["linear"]["kernel"].get_value()
    assert kernel.shape == (2 * MODEL.embed_dim, 12) and float(jnp.abs(kernel).max()) > 0.1
    assert Run(tmp_path / "run", loaded).embed("abcde").shape == (12,)


def test_settings_that_do_not_suit_pairs_are_refused(pairs, tmp_path):
    with pytest.raises(ConfigError, match="allowed with objective 'contrastive': 'embedding'"):
        config_of(pairs, tmp_path, model=dataclasses.replace(MODEL, head=MaskedHeadConfig()))
    with pytest.raises(ConfigError, match="strategy: got 'pmap'; .* any strategy but pmap"):
        config_of(pairs, tmp_path, mesh=MeshConfig(strategy="pmap"))
    single = dataclasses.replace(config_of(pairs, tmp_path).data, sources=(FilesSource(path=str(pairs)),))
    with pytest.raises(
        UserError, match="'contrastive' needs pairs, but the sources give single texts; set their target_field"
    ):
        train(config_of(pairs, tmp_path / "single", data=single))
    two = dataclasses.replace(config_of(pairs, tmp_path).data, target_tokenizer=TokenizerConfig(special_tokens=SPECIAL))
    with pytest.raises(UserError, match="one encoder reads both sides of a contrastive pair"):
        train(config_of(pairs, tmp_path / "two", data=two))
