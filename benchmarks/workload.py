"""The model and batch that the benchmarks share, and their training step, without data or config packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from train.config import RunConfig
from train.data.examples.pack import with_lengths
from train.data.prepared.config import DataConfig
from train.optimizer import OptimizerConfig
from train.parallel.mesh import check_batch, make_mesh, shard_batch, use_mesh
from train.program.program import Program, batch_shapes
from transformer.errors import UserError
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig

DOCUMENTS = 8
OPTIMIZER = OptimizerConfig(learning_rate=3e-4, schedule="constant", b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0)


def workload() -> RunConfig:
    """A small GPT-2 in float32 on a CPU; GPT-2 124M in bfloat16 at context 1024 on an accelerator."""
    if jax.default_backend() == "cpu":
        attention = SoftmaxConfig(num_heads=6)
        small = GPTConfig(
            vocab_size=256, max_length=256, num_layers=6, embed_dim=384, attention=attention, remat="light"
        )
        return of_model(small, batch_size=12)
    # The vocabulary is padded to a multiple of 128, here and in the peer.
    return of_model(GPTConfig(vocab_size=50304, dtype="bfloat16"), batch_size=32)


def packed(work: RunConfig) -> RunConfig:
    """The same with several documents in a row, which do not see each other."""
    return dataclasses.replace(work, name="packed", data=DataConfig(packing="documents"))


def large() -> RunConfig:
    """GPT with 1.3 billion parameters, 8 × 2048.

    Raises:
        UserError: there is only a CPU.
    """
    if jax.default_backend() == "cpu":
        raise UserError("--case large needs an accelerator; jax sees only the CPU")
    model = GPTConfig(
        vocab_size=50304, max_length=2048, num_layers=24, embed_dim=2048, attention=SoftmaxConfig(num_heads=16),
        dtype="bfloat16", remat="light",
    )  # fmt: skip
    return of_model(model, batch_size=8)


def of_model(model: GPTConfig, batch_size: int) -> RunConfig:
    """A run with the optimiser of all benchmarks."""
    return RunConfig(name="benchmark", batch_size=batch_size, model=model, optimizer=OPTIMIZER)


def gpt_of(work: RunConfig) -> GPTConfig:
    """The model of a workload, a GPT-2."""
    assert isinstance(work.model, GPTConfig)
    return work.model


def random_batch(config: RunConfig) -> dict[str, np.ndarray]:
    """A batch of the objective's shapes with random tokens; a row is a single document, or, where documents are packed, as many
    as `DOCUMENTS`, of random lengths."""
    rng = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {}
    for name, shape in batch_shapes(config).items():
        if name.endswith("lengths"):
            continue
        if name.endswith(("tokens", "targets")):
            batch[name] = rng.integers(0, min(config.model.vocab_size, 1000), shape.shape).astype(np.int32)
        elif name.endswith("positions") or name == "predicted":
            batch[name] = np.broadcast_to(np.arange(shape.shape[1], dtype=np.int32), shape.shape).copy()
        elif name == "weights":
            batch[name] = np.ones(shape.shape, np.float32)
        else:
            batch[name] = np.ones(shape.shape, np.int32) * (name not in ("token_types", "labels", "prefix"))
    most = 1
    if config.data.packing == "documents":
        for name in [name for name in batch if name.endswith("segments")]:
            starts = np.sort(rng.random((*batch[name].shape[:-1], DOCUMENTS - 1)), axis=-1) * batch[name].shape[-1]
            places = np.arange(batch[name].shape[-1])
            batch[name] = 1 + (starts[..., None] <= places).sum(-2, dtype=np.int32)
            # A position within its document: how long its number has been the same.
            changes = np.diff(batch[name], axis=-1, prepend=0) != 0
            first = np.maximum.accumulate(np.where(changes, places, 0), axis=-1)
            batch[name.replace("segments", "positions")] = (places - first).astype(np.int32)
            batch[name] = np.cumsum(changes, axis=-1, dtype=np.int32)
            most = max(most, int(batch[name].max()))
    return with_lengths(batch, most)


def program_of(config: RunConfig, devices: Sequence[Any]) -> Program:
    """The config's step on these devices.

    Raises:
        UserError: a batch or a model that the devices do not divide.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch(mesh, config.mesh.rules, config.batch_size, config.microbatches)
    with use_mesh(mesh, config.mesh.rules):
        return Program(config, mesh)


def padded(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with rows of half its length to the whole, and padding after them."""
    rows, length = batch["tokens"].shape
    sizes = np.random.default_rng(1).integers(length // 2, length + 1, (rows, 1))
    valid = np.arange(length) < sizes
    whole = {name: batch[name] * valid for name in ("tokens", "positions", "segments")}
    return batch | whole | {"lengths": sizes.astype(np.int32)}


def our_step(work: RunConfig, batch: dict[str, np.ndarray] | None = None) -> Callable[[], object]:
    """A function that takes one training step and returns its metrics (not yet computed, as JAX arrays are).

    Args:
        batch: `random_batch` by default.
    """
    program = program_of(work, jax.devices()[:1])
    with use_mesh(program.mesh, work.mesh.rules):
        held = program.init()
        on_devices = shard_batch(random_batch(work) if batch is None else batch, program.batch_sharding)

    def take() -> object:
        nonlocal held
        with use_mesh(program.mesh, work.mesh.rules):
            held, metrics = program.train_step(held, on_devices)
        return metrics

    return take
