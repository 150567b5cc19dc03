"""Fine-tuning by adapters: what learns, on any mesh, and what is merged."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.train.fine_tuning import SMALL, by_path
from train.config import RunConfig
from train.objectives import Classification
from train.optimizer import OptimizerConfig
from train.parallel.mesh import MeshConfig, make_mesh, shard_batch, use_mesh
from train.program.program import Program
from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.layers.adapter import AdapterConfig, merged
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.gpt import GPTConfig
from transformer.models.heads import ClassificationHeadConfig
from transformer.pipeline import in_order

B, T = 16, 8
MODEL = GPTConfig(vocab_size=32, max_length=T, num_layers=4, embed_dim=16, attention=SoftmaxConfig(num_heads=2))
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 32, (B, T + 1)).astype(np.int32)
BATCH = {
    "tokens": TOKENS[:, :-1],
    "targets": TOKENS[:, 1:],
    "weights": (RNG.random((B, T)) < np.linspace(0.1, 1, B)[:, None]).astype(np.float32),
}
LORA, DORA = AdapterConfig(rank=4), AdapterConfig(rank=4, kind="dora")


def run(mesh_config, num_devices, adapter=LORA, microbatches=1, steps=3, **model):
    """Losses and gradient norms; the parameters before and after; the program and its last state."""
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    config = RunConfig(
        name="test", steps=10, batch_size=B, microbatches=microbatches, model=dataclasses.replace(MODEL, **model),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=1.0), adapter=adapter, mesh=mesh_config,
    )  # fmt: skip
    with use_mesh(mesh, mesh_config.rules):
        program = Program(config, mesh)
        state, seen = program.init(), []
        before = by_path(state.params)
        batch = shard_batch(BATCH, program.batch_sharding)
        for _ in range(steps):
            state, metrics = program.train_step(state, batch)
            seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return np.array(seen), before, by_path(in_order(state.params)), program, state


@functools.cache
def on_one_device(adapter=LORA):
    return run(MeshConfig(), 1, adapter)


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_adapters_learn_and_nothing_else(adapter):
    seen, before, after, program, state = on_one_device(adapter)
    for name, value in after.items():
        assert np.array_equal(value, before[name]) == (".adapter." not in name), name
    assert seen[-1, 0] < seen[0, 0]
    assert by_path(state.opt_state[1][0].mu).keys() == {name for name in after if ".adapter." in name}
    counted = program.trained.counted(state.params)
    trained, total = (sum(after[name].size for name in after if part in name) for part in (".adapter.", ""))
    assert counted == f"{trained:,} of {total:,} parameters ({trained / total:.1%}) trained"


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_merged_it_scores_the_same(adapter):
    _, _, _, program, state = on_one_device(adapter)
    plain = merged(state.params, adapter.scale)
    graphdef = graphdef_of(functools.partial(make_model, MODEL))
    described = jax.eval_shape(lambda: nnx.state(make_model(MODEL, nnx.Rngs(0)), nnx.Param))
    assert jax.tree.structure(plain) == jax.tree.structure(described)
    with use_mesh(program.mesh, MeshConfig().rules):
        adapted, _ = program.eval_step(state.params, BATCH)
    logits = nnx.merge(graphdef, plain)(jnp.asarray(BATCH["tokens"])).logits
    picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), BATCH["targets"][..., None], -1)[..., 0]
    assert float(adapted.nll) == pytest.approx(-(picked * BATCH["weights"]).sum(), rel=1e-4)


def layout_name(value):
    if not isinstance(value, MeshConfig):
        return getattr(value, "kind", str(value))
    return f"{value.strategy}-{value.schedule}"


LAYOUTS = [
    (MeshConfig(strategy="fsdp"), 8, 2, LORA),
    (MeshConfig(strategy="tensor", tensor=2, data=2), 4, 1, DORA),
    (MeshConfig(strategy="pipeline", pipeline=2, stages_per_device=2), 2, 1, LORA),
    (MeshConfig(strategy="pipeline", pipeline=2, schedule="1f1b"), 2, 1, LORA),
]


@pytest.mark.parametrize(("config", "num_devices", "microbatches", "adapter"), LAYOUTS, ids=layout_name)
def test_every_layout_computes_what_one_device_does(config, num_devices, microbatches, adapter):
    expected = on_one_device(adapter)
    got = run(config, num_devices, adapter, microbatches)
    np.testing.assert_allclose(got[0], expected[0], rtol=2e-4)
    for name, value in got[2].items():
        np.testing.assert_allclose(value, expected[2][name], atol=2e-3)


def test_a_loop_over_layers_trains_the_same():
    np.testing.assert_allclose(run(MeshConfig(), 1, scan_layers=False)[0], on_one_device()[0], rtol=1e-4)


def test_dropout_is_of_training_alone():
    adapter = dataclasses.replace(LORA, dropout=0.5)
    seen, _, _, program, state = run(MeshConfig(), 1, adapter)
    # B is zero at first: what its input drops shows from the second step on.
    np.testing.assert_allclose(seen[0, 0], on_one_device()[0][0, 0], rtol=1e-6)
    assert not np.allclose(seen[2], on_one_device()[0][2], rtol=1e-4)
    _, _, _, still, _ = on_one_device()
    with use_mesh(program.mesh, MeshConfig().rules):
        scores = [float(one.eval_step(state.params, BATCH)[0].nll) for one in (program, still)]
        assert scores[0] == scores[1]


def test_parameters_trained_in_addition_to_adapters():
    def trained(**options):
        config = RunConfig(
            name="test", model=BertConfig(**SMALL, head=ClassificationHeadConfig()), adapter=AdapterConfig(**options),
            objective=Classification(),
        )  # fmt: skip
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        with use_mesh(mesh, config.mesh.rules):
            program = Program(config, mesh)
        part = program.trained.select(program.abstract.params)
        return {str(path[0]) for path, _ in nnx.to_flat_state(part)}

    assert trained() == {"layers", "pooled_head"}
    assert trained(train_also=()) == {"layers"}
    assert trained(train_also=("embed_norm.*", "pooled_head.out.*")) == {"layers", "embed_norm", "pooled_head"}
    with pytest.raises(UserError, match="adapter.train_also: 'heads' matches no parameter; the nearest are"):
        trained(train_also=("heads",))
