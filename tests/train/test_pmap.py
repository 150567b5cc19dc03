"""The step by `jax.pmap`: what `jax.jit` does (`test_step.py` holds them equal), from the outside no different."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.devices import on_one_device
from tests.train.run_records import records
from train.config import RunConfig, load
from train.optimizer import OptimizerConfig
from train.parallel.mesh import MeshConfig, make_mesh, shard_batch, use_mesh
from train.program.program import Program, batch_shapes
from train.run.loop import train
from transformer.errors import UserError
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig

MODEL = GPTConfig(vocab_size=32, max_length=8, num_layers=1, embed_dim=16, attention=SoftmaxConfig(num_heads=2))


def program_of(strategy, num_devices=8):
    config = RunConfig(
        name="test", model=MODEL, batch_size=8, mesh=MeshConfig(strategy=strategy), optimizer=OptimizerConfig(ema_decay=0.9)
    )  # fmt: skip
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    with use_mesh(mesh, config.mesh.rules):
        return Program(config, mesh)


def test_the_step_is_compiled_once_and_its_state_is_that_of_the_mesh(caplog):
    program = program_of("pmap")
    with use_mesh(program.mesh, program.config.mesh.rules):
        batch = {name: np.ones(rows.shape, rows.dtype) for name, rows in batch_shapes(program.config).items()}
        batch = shard_batch(batch, program.batch_sharding)
        compiled, state = [], program.init()
        for _ in range(3):
            caplog.clear()
            with jax.log_compiles():
                state, metrics = program.train_step(state, batch)
            compiled.append(any("XLA compilation" in record.getMessage() for record in caplog.records))
        assert compiled == [True, False, False]
        for leaf, described in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(described.sharding, leaf.ndim)
            assert leaf.sharding.mesh == program.mesh
        assert int(state.step) == 3
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((metrics, state.ema)))


def test_its_program_adds_up_gradients_as_that_of_jit_does():
    def sums(strategy):
        program = program_of(strategy, num_devices=2)
        with use_mesh(program.mesh, program.config.mesh.rules):
            return program.lower().compile()

    mapped, jitted = sums("pmap"), sums("dp")
    assert "all-reduce" in mapped.as_text()
    assert mapped.memory_analysis().argument_size_in_bytes == jitted.memory_analysis().argument_size_in_bytes


STRATEGIES = {
    "pipeline": ["--mesh.pipeline", "2", "--mesh.data", "4", "--mesh.schedule", "1f1b"],
    "pmap": [],
    "ulysses": ["--mesh.data", "4"],
}


def train_for(steps, run_dir, config_file, *options):
    options = ["--model.dropout", "0.0", "--optimizer.schedule", "constant", "--sample.max-tokens", "0", *options]
    return train(load(config_file, [*options, "--run-dir", str(run_dir), "--steps", str(steps)]))


def test_a_run_is_scored_and_goes_on_under_another_strategy(config_file, tmp_path):
    """Two steps under each of them, in one run, are those of a run on one device."""
    for number, (strategy, layout) in enumerate(STRATEGIES.items(), start=1):
        finished = train_for(2 * number, tmp_path / "many", config_file, "--mesh.strategy", strategy, *layout)
        assert finished.step == 2 * number and finished.scores is not None
    with on_one_device():
        whole = train_for(6, tmp_path / "one", config_file)
    assert list(records(tmp_path / "many")) == list(range(1, 7))
    assert records(tmp_path / "many") == pytest.approx(records(tmp_path / "one"), rel=1e-5)
    assert finished.scores.loss == pytest.approx(whole.scores.loss, rel=1e-5)


@pytest.mark.parametrize("axis", ["fsdp", "tensor", "pipeline"])
def test_it_has_only_the_data_axis(axis):
    with pytest.raises(UserError, match=f"{axis}: got 2; strategy pmap has only the data axis"):
        MeshConfig(strategy="pmap", **{axis: 2})


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="mesh.strategy: got 'pmap', which needs one process; there are 2"):
        program_of("pmap")
