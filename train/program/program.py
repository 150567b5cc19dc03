"""A config's training step on a mesh, as executed by runs, measured by benchmarks and compiled ahead by plans."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from train.config import RunConfig
from train.data.examples.pack import lengths_name, room_for
from train.data.prepared.store import Prepared
from train.loss import Batch
from train.objectives.objective import BatchShapes
from train.optimizer import make_optimizer
from train.parallel.mesh import STRATEGIES, MeshConfig, batch_sharding, shard_batch
from train.program.pipeline import StagedStep, one_forward_one_backward, schedule_of
from train.program.pmap import make_pmap_step
from train.program.state import (
    StateMaker,
    TrainState,
    abstract_state,
    described_key,
    init_params,
    init_state,
    lay_out,
    state_maker,
)
from train.program.step import accumulated, make_eval_step, make_first_pass, make_gradient, make_train_step
from train.trained import ALL, TrainableMask, chosen
from transformer.errors import ConfigError
from transformer.functional import ModelFactory, graphdef_of
from transformer.layers.adapter import AdapterConfig, make_merge_fn
from transformer.mixers.registry import MixerConfig
from transformer.models.adapted import make_adapted
from transformer.models.families import Model, ModelConfig, flops_per_token
from transformer.models.layer_stack import with_schedule
from transformer.pipeline import Schedule, in_stages


class Program:
    """Built under the config's rules (`use_mesh`) from abstract arrays only: no array exists before `init`.

    Args:
        mesh: of available devices, or of a topology to compile for.

    Raises:
        UserError: a dim that its mesh axis does not divide, or a model that the strategy does not support.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        schedule = schedule_of(config, mesh)
        make = functools.partial(_make_scheduled, suited(config.model, config.mesh), config.adapter, schedule)
        self.graphdef = graphdef = graphdef_of(make)
        self.trained = trained = trained_of(config, make)
        optimizer, self.make_state = _state_of(config, make, trained)
        described = functools.partial(
            abstract_state, mesh=mesh, optimizer_rules=config.mesh.optimizer_rules,
            offload_optimizer=config.mesh.offload_optimizer,
        )  # fmt: skip
        self.abstract = described(self.make_state)
        staged, V = self.abstract, schedule.stages_per_device
        if V > 1:
            staged = described(lambda key, params: in_stages(self.make_state(key, params), V))
        with nnx.logical_axis_rules(config.mesh.gradient_rules):
            gradients = lay_out(trained.select(staged.params), mesh)
        with nnx.logical_axis_rules(config.mesh.optimizer_rules):
            summed = lay_out(trained.select(staged.params), mesh)
        options: dict[str, Any] = {
            "microbatches": config.microbatches, "ema_decay": config.optimizer.ema_decay, "trained": trained,
            "stability": config.stability,
        }  # fmt: skip
        gradient = make_gradient(graphdef, config.loss, config.objective, trained)
        first_pass = make_first_pass(graphdef, config.loss, config.objective, microbatches=config.microbatches)
        self.train_step: Any
        if config.mesh.strategy == "pmap":
            self.train_step = make_pmap_step(
                graphdef, optimizer, config.loss, mesh, objective=config.objective, **options
            )
        else:
            pipelined = schedule.microbatches is not None
            if pipelined and config.mesh.schedule == "1f1b":
                gradient = one_forward_one_backward(graphdef, config.loss, config.objective, schedule, trained)
            self.train_step = make_train_step(
                gradient, first_pass, optimizer, staged, gradients=gradients, summed=summed, **options
            )
            if V > 1:
                self.train_step = StagedStep(self.train_step, staged, V)
        self.gradient = accumulated(gradient, first_pass, config.microbatches)
        """Of a whole batch, as the step computes it."""
        self.eval_step = make_eval_step(graphdef, config.objective, config.loss)
        self.plain = make_merge_fn(config.adapter)
        self.batch_sharding = batch_sharding(mesh, config.mesh.rules)

    def init(self, params: nnx.State | None = None, *, donate: bool = False) -> Any:
        """A fresh state on the devices, by the config's seed; with `params` as parameters, or in their memory (`donate`)."""
        return init_state(self.make_state, self.abstract, self.config.seed, params, donate=donate)

    def init_params(self) -> nnx.State:
        """The parameters that `init` makes."""
        return init_params(self.make_state, self.abstract, self.config.seed)

    def to_devices(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """This process's rows of a batch on the devices, without the ids of the examples."""
        return shard_batch({name: rows for name, rows in batch.items() if name != "example"}, self.batch_sharding)

    def init_for_step(self) -> Any:
        """A fresh state as the compiled step of `lower` takes it: in stages, where a device has several of a pipeline."""
        state = self.init()
        return self.train_step.staged(state) if isinstance(self.train_step, StagedStep) else state

    def lower(self) -> jax.stages.Lowered:
        """The training step over a whole batch, traced for the mesh's devices."""
        batch = {
            name: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=self.batch_sharding)
            for name, rows in batch_shapes(self.config).items()
        }
        return self.train_step.lower(self.abstract, batch)


def suited(model: ModelConfig, mesh: MeshConfig) -> ModelConfig:
    """The model's config adapted to the strategy: with its attention backend, if it needs a particular one.

    Raises:
        UserError: a model that the strategy does not support.
    """
    wanted: Any = STRATEGIES[mesh.strategy].attention
    if wanted is None:
        return model
    if model.family == "recurrent":
        raise ConfigError(type(model), "family", model.family, f"mesh.strategy {mesh.strategy} needs a Transformer")

    def with_backend(mixer: MixerConfig, place: str) -> MixerConfig:
        if not hasattr(mixer, "backend"):
            allowed = (
                f"mesh.strategy {mesh.strategy} shards sequences; allowed: softmax, latent, differential, disentangled"
            )
            raise ConfigError(type(model), f"{place}.kind", mixer.kind, allowed)
        if mixer.backend not in ("auto", wanted):
            allowed = f"mesh.strategy {mesh.strategy} supports auto and {wanted}"
            raise ConfigError(type(model), f"{place}.backend", mixer.backend, allowed)
        return dataclasses.replace(mixer, backend=wanted)

    pattern = tuple(with_backend(mixer, f"pattern.{number}") for number, mixer in enumerate(model.pattern))
    attention = (
        model.attention
        if pattern and not hasattr(model.attention, "backend")
        else with_backend(model.attention, "attention")
    )
    return dataclasses.replace(model, attention=attention, pattern=pattern)


def _make_scheduled(model: ModelConfig, adapter: AdapterConfig | None, schedule: Schedule, rngs: nnx.Rngs) -> Model:
    """The adapted model; its layers run in a pipeline by the schedule, if the mesh has one."""
    return with_schedule(make_adapted(model, adapter, rngs), schedule)


def described_state(config: RunConfig) -> TrainState:
    """Shapes of a config's whole state, independent of its sharding."""
    make = functools.partial(make_adapted, config.model, config.adapter)
    _, make_state = _state_of(config, make, trained_of(config, make))
    return jax.eval_shape(make_state, described_key(), None)


def trained_of(config: RunConfig, make: ModelFactory) -> TrainableMask:
    """Which parameters of its model a config trains.

    Raises:
        UserError: a pattern that matches no parameter, or no parameter left to train.
    """
    if not config.optimizer.freeze and config.adapter is None:
        return ALL
    params = jax.eval_shape(lambda: nnx.state(make(nnx.Rngs(0)), nnx.Param))
    return chosen(params, config.optimizer.freeze, config.adapter)


def _state_of(
    config: RunConfig, make: ModelFactory, trained: TrainableMask
) -> tuple[optax.GradientTransformation, StateMaker]:
    """The config's optimiser, and the function that makes the initial state from a key."""
    optimizer = make_optimizer(config.optimizer, config.steps, getattr(config.model, "num_layers", None))
    keep_ema = config.optimizer.ema_decay is not None
    return optimizer, state_maker(make, optimizer, keep_ema=keep_ema, trained=trained)


def batch_shapes(config: RunConfig, rows: int | None = None) -> BatchShapes:
    """The arrays of a batch of `rows` examples (`config.batch_size`), padding included.

    Where documents are packed, the number of those of a row depends on the data; here it is one for each 64 tokens.
    """
    rows = config.batch_size if rows is None else rows
    objective = config.objective
    shapes = objective.batch(rows, config.sequence_length, config.data) | objective.model_batch(rows, config.model)
    packed = config.data.packing == "documents" and objective.packs
    M = room_for(max(2, config.sequence_length // 64)) if packed else 1
    lengths = {
        of: jax.ShapeDtypeStruct((*one.shape[:-1], M), one.dtype)
        for name, one in shapes.items()
        if (of := lengths_name(name)) is not None
    }
    return shapes | lengths


def flops_per_prediction(config: RunConfig, prepared: Prepared, program: Program) -> float:
    """Floating-point operations of a training step per prediction: a token, a hidden token, a word, or a row."""
    passes = program.trained.flops_factor(program.abstract.params)
    tokens = config.objective.tokens_per_prediction(prepared, config.tokens_per_example)
    return passes * tokens * flops_per_token(config.model, config.sequence_length)
