"""The model and batch that the benchmarks share, and our training step over them, without data or config packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from train.mesh import MeshConfig, batch_sharding, make_mesh, shard_batch, use_mesh
from train.objective import LossConfig
from train.optimizer import OptimizerConfig, make_optimizer
from train.state import TrainState, abstract_state, init_state, state_maker
from train.step import make_train_step
from transformer.functional import graphdef_of
from transformer.models.gpt import GPT, GPTConfig

OPTIMIZER = OptimizerConfig(learning_rate=3e-4, schedule="constant", b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A GPT-2 and a batch size."""

    model: GPTConfig
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.model.max_length


def workload() -> Workload:
    """A small GPT-2 in float32 on a CPU; GPT-2 124M in bfloat16 at context 1024 on an accelerator."""
    if jax.default_backend() == "cpu":
        small = GPTConfig(vocab_size=256, max_length=256, num_layers=6, embed_dim=384, num_heads=6, remat="light")
        return Workload(small, batch_size=12)
    # The vocabulary is padded to a multiple of 128, here and in the peer.
    return Workload(GPTConfig(vocab_size=50304, dtype="bfloat16"), batch_size=32)


def token_batch(work: Workload) -> np.ndarray:
    """Random tokens, [batch, length + 1] int32."""
    shape = (work.batch_size, work.model.max_length + 1)
    return np.random.default_rng(0).integers(0, work.model.vocab_size, shape).astype(np.int32)


def training_batch(work: Workload) -> dict[str, np.ndarray]:
    """`token_batch` as the step takes it: every token but the first is a target."""
    tokens = token_batch(work)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return {"tokens": inputs, "targets": targets, "weights": np.ones(inputs.shape, np.float32)}


def our_step(work: Workload) -> Callable[[], object]:
    """A function that takes one training step and returns its metrics (not yet computed, as JAX arrays are)."""
    mesh_config = MeshConfig()
    mesh = make_mesh(mesh_config, jax.devices()[:1])
    with use_mesh(mesh, mesh_config.rules):
        step, state = compiled_step(work, mesh)
        batch = shard_batch(training_batch(work), batch_sharding(mesh, mesh_config.rules))
    held = {"state": state}

    def take() -> object:
        with use_mesh(mesh, mesh_config.rules):
            held["state"], metrics = step(held["state"], batch)
        return metrics

    return take


def compiled_step(work: Workload, mesh: jax.sharding.Mesh) -> tuple[Callable, TrainState]:
    """The project's own training step and a fresh state for it."""

    def make_model(rngs: object) -> GPT:
        return GPT(work.model, rngs=rngs)  # type: ignore[arg-type]

    optimizer = make_optimizer(OPTIMIZER, num_steps=1000)
    make_state = state_maker(make_model, optimizer)
    abstract = abstract_state(make_state, mesh)
    step = make_train_step(graphdef_of(make_model), optimizer, LossConfig(), abstract)
    return step, init_state(make_state, abstract, seed=0)
