"""Training steps with pipeline parallelism; the forward schedules are in `transformer/pipeline.py`.

B batch, M microbatches, R rows of a microbatch, T position, D embed, L layers, P devices of the pipeline, V stages of a device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from train.config import RunConfig
from train.loss import Batch, LossConfig, LossSums
from train.objectives import Objective
from train.parallel.mesh import MeshConfig, check_batch
from train.program.state import TrainState
from train.program.step import Coefficients, Gradient, Metrics, make_first_pass, rows_of
from train.trained import ALL, TrainableMask
from transformer.errors import ConfigError, require
from transformer.layers.embedding import Embedding, embed_lookup
from transformer.layers.mixture_of_experts import RouterSums
from transformer.mixers.context import Context
from transformer.models.bert import BertConfig
from transformer.models.config import StackConfig
from transformer.models.layer_stack import LayerStack, StackOutput, layers_of_group
from transformer.pipeline import (
    Schedule,
    check_microbatches,
    check_period,
    check_stages,
    in_stages,
    is_in_stages,
    is_stacked,
    is_variable,
    microbatched,
)
from transformer.randomness import row_keys
from transformer.sharding import axes_size, constrain, mesh_axes
from transformer.types import DTYPES, Array


def schedule_of(config: RunConfig, mesh: Mesh) -> Schedule:
    """The pipeline schedule of a config on `mesh`, whose pipeline may be one device long.

    Raises:
        UserError: a model, a number of layers or a batch that a pipeline does not support.
    """
    P, V = mesh.shape["pipeline"], config.mesh.stages_per_device
    if P == 1:
        return Schedule()
    M = P * V if config.mesh.pipeline_microbatches is None else config.mesh.pipeline_microbatches
    family = config.model.family
    if family not in ("gpt", "bert", "electra"):
        allowed = "a pipeline (mesh.pipeline) needs a model of stacked layers: gpt, bert, electra"
        raise ConfigError(type(config.model), "family", family, allowed)
    if config.mesh.schedule == "1f1b" and family == "electra":
        allowed = (
            "it splits a model into embedding, layers and head, and electra has two stacks of layers; allowed: gpipe"
        )
        raise ConfigError(MeshConfig, "schedule", "1f1b", allowed)
    if isinstance(config.model, BertConfig):
        require(
            config.model, "first_norm", config.model.first_norm, "a pipeline's blocks must be identical; allowed: true"
        )
    assert isinstance(config.model, StackConfig)
    check_stages(config.model.num_layers, P, V, layers_of_group(config.model))
    check_microbatches(P, M)
    # In addition to its own microbatches, each device of the pipeline has its share of the batch.
    check_batch(mesh, config.mesh.rules, config.batch_size, config.microbatches * M // P)
    return Schedule(V, M)


@dataclasses.dataclass(frozen=True)
class StagedStep:
    """A step over a state with several stages per device (`in_stages`). The first step converts a state with its layers in
    order once. The resulting state is in stages; `in_order` converts it back.
    """

    step: Any
    abstract: TrainState
    """The state in stages."""
    stages_per_device: int

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.step(self.staged(state), batch)

    def staged(self, state: TrainState) -> TrainState:
        """The state in stages."""
        if is_in_stages(state):
            return state
        layout = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        return jax.jit(lambda state: in_stages(state, self.stages_per_device), out_shardings=layout)(state)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step, traced for abstract arguments, except the state's, which it has."""
        return self.step.lower(self.abstract, batch)


def one_forward_one_backward(
    graphdef: Any, loss: LossConfig, objective: Objective, schedule: Schedule, trained: TrainableMask = ALL
) -> Gradient:
    """The gradient of an objective's loss by the schedule 1F1B (Narayanan et al. 2019, section 3.2; 2021, section 2.2.1).

    On every tick each device runs its stage forward on one microbatch and backward on an earlier one; on the first P - 1
    ticks only forward, on the last P - 1 only backward. At most 2P - 1 microbatches are in flight, however many there are,
    and for each of them a device stores only its stage's input: the backward pass recomputes the stage. The time is M + P - 1
    times a forward and a backward, as for GPipe.

    The loss is computed after the last stage, and the embedding before the first. All devices compute both, and those at
    other stages discard them: a tick is as long as its slowest stage, so this costs no time.

    With experts that a loss balances, a first pass through the pipeline counts the tokens of all microbatches
    (`make_first_pass`).

    Args:
        graphdef: of a model that consists of an embedding, one `LayerStack` named `layers`, and a head.
        schedule: with one stage a device.
    """

    first_pass = make_first_pass(graphdef, loss, objective)

    def gradient(
        params: nnx.State, batch: Batch, key: Array, coefficients: Coefficients | None = None
    ) -> tuple[nnx.State, LossSums]:
        of_whole = first_pass(params, batch, key) if coefficients is None else coefficients
        axes = mesh_axes("layers")
        P = axes_size(axes)
        M = P if schedule.microbatches is None else schedule.microbatches
        slots = 2 * P - 1
        part, frozen = trained.split(params)
        part_layout, frozen_layout = (
            jax.tree.map(
                lambda leaf: PartitionSpec(axes) if is_stacked(leaf) else PartitionSpec(), tree, is_leaf=is_variable
            )
            for tree in (part, frozen)
        )

        def on_device(
            part: nnx.State, frozen: nnx.State, batches: Batch, keys: Array, of_stage: Coefficients | None
        ) -> tuple[nnx.State, LossSums, tuple[RouterSums, ...]]:
            index = jax.lax.axis_index(axes)
            is_first, is_last = index == 0, index == P - 1

            def stage(part: nnx.State, given: Array, microbatch: Array) -> tuple[tuple[Array, Array], LossSums]:
                """The output for the next stage, and this stage's part of the loss."""
                model = nnx.merge(graphdef, part, frozen)
                layers = _Part(model.layers, given, is_first, index)
                object.__setattr__(model, "layers", layers)
                object.__setattr__(model, "embed", _WholeTable(model.embed))
                own, own_keys = _at((batches, keys), microbatch)
                sums = objective.loss(model, own, loss, key=own_keys)
                sums = jax.tree.map(lambda x: jnp.where(is_last, x, 0), sums)
                # Every stage has losses of routers.
                sums = dataclasses.replace(sums, routers=layers.output.routers)
                return (layers.x, sums.total(of_stage)), sums

            def forward(state: _Ticking, time: Array) -> tuple[_Ticking, Array]:
                microbatch = jnp.clip(time - index, 0, M - 1)
                (x, _), _ = stage(part, state.ahead, microbatch)
                # A slot is free again when the backward pass of its microbatch is done.
                inputs = jax.lax.dynamic_update_index_in_dim(state.inputs, state.ahead, (time - index) % slots, 0)
                return dataclasses.replace(state, inputs=inputs), x

            def backward(state: _Ticking, time: Array) -> tuple[_Ticking, Array]:
                turn = time - 2 * (P - 1) + index
                microbatch = jnp.clip(turn, 0, M - 1)
                given = _at(state.inputs, turn % slots)
                outs, pull, sums = jax.vjp(
                    lambda part, given: stage(part, given, microbatch), part, given, has_aux=True
                )
                arrived = jnp.where(is_last, 0, state.back)
                grads, back = pull((arrived, jnp.ones_like(outs[1])))
                is_real = (turn >= 0) & (turn < M)
                grads, sums = jax.tree.map(
                    lambda total, x: total + jnp.where(is_real, x, 0), (state.grads, state.sums), (grads, sums)
                )
                return dataclasses.replace(state, grads=grads, sums=sums), back

            def ticks(state: _Ticking, first: int, last: int, *, ahead: bool, back: bool) -> _Ticking:
                """The ticks before `last`, on which all devices run forward, backward, or both."""

                def tick(state: _Ticking, time: Array) -> tuple[_Ticking, None]:
                    # Both use what was sent before this tick; nothing is sent that no stage will read.
                    sent: dict[str, Any] = {}
                    if ahead:
                        with jax.named_scope("forward"):
                            state, x = forward(state, time)
                        sent["ahead"] = jax.lax.ppermute(x, axes, [(device, device + 1) for device in range(P - 1)])
                    if back:
                        with jax.named_scope("backward"):
                            state, x = backward(state, time)
                        sent["back"] = jax.lax.ppermute(x, axes, [(device + 1, device) for device in range(P - 1)])
                    return dataclasses.replace(state, **sent), None

                return jax.lax.scan(tick, state, jnp.arange(first, last))[0]

            R, T = batches["tokens"].shape[1:]
            c = nnx.merge(graphdef, part, frozen).config
            given = jnp.zeros((R, T, c.embed_dim), DTYPES[c.dtype])
            _, sums = jax.eval_shape(stage, part, given, jnp.zeros((), jnp.int32))
            grads, sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (part, sums))
            start = _Ticking(given, given, jnp.zeros((slots, *given.shape), given.dtype), grads, sums)
            full = ticks(start, 0, P - 1, ahead=True, back=False)
            steady = ticks(full, P - 1, M + P - 1, ahead=True, back=True)
            end = ticks(steady, M + P - 1, M + 2 * (P - 1), ahead=False, back=True)
            # Parameters that all stages hold, such as the embedding; only some stages use them.
            grads = jax.tree.map(
                lambda leaf: leaf if is_stacked(leaf) else jax.lax.psum(leaf, axes), end.grads, is_leaf=is_variable
            )
            return grads, jax.lax.psum(dataclasses.replace(end.sums, routers=()), axes), end.sums.routers

        with jax.named_scope("pipeline"):
            by_stage = PartitionSpec(axes)
            grads, sums, routers = jax.shard_map(
                on_device,
                in_specs=(part_layout, frozen_layout, PartitionSpec(), PartitionSpec(), by_stage),
                out_specs=(part_layout, PartitionSpec(), by_stage),
                axis_names=set(axes),
                check_vma=False,
            )(part, frozen, *microbatched((batch, row_keys(key, rows_of(batch))), M), of_whole)
        return grads, dataclasses.replace(sums, routers=routers)

    return gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Ticking:
    """What a device carries from one tick to the next."""

    ahead: Array
    """Input from the previous stage: [R, T, D]."""
    back: Array
    """From the next stage: the gradient of what was sent to it."""
    inputs: Array
    """Stage inputs of the microbatches in flight: [2P - 1, R, T, D]."""
    grads: nnx.State
    sums: LossSums


class _Part:
    """Replaces a model's stack of layers by one stage, from its input to its output."""

    def __init__(self, layers: LayerStack, given: Array, is_first: Array, stage: Array) -> None:
        self.layers, self.given, self.is_first = layers, given, is_first
        groups = jax.tree.leaves(layers.blocks)[0].shape[0]
        # A group of blocks spans a whole pattern.
        check_period(layers.num_layers, groups * layers.group, max(layers.period, layers.group))
        layers.take_part(groups * layers.group, stage)
        self.final_norm, layers.final_norm = layers.final_norm, None
        self.x: Any = None
        self.output: Any = None

    def __call__(self, x: Array, context: Context, **options: Any) -> tuple[Array, StackOutput]:
        self.x, self.output = self.layers(jnp.where(self.is_first, x, self.given), context, **options)
        hidden = self.x if self.final_norm is None else self.final_norm(self.x)
        # The head's loss is that of the last stage alone, the routers' losses are not.
        return hidden, dataclasses.replace(self.output, routers=())


class _WholeTable(Embedding):
    """Replaces a model's embedding by the same one, replicated for the lookup of tokens.

    XLA's partitioner (jax 0.11 and 0.12) fails inside a stage on a lookup of sharded tokens in an embedding with sharded
    rows.
    """

    def __init__(self, table: Embedding) -> None:
        self.table, self.dtype, self.vocab_axis = table.table, table.dtype, table.vocab_axis

    def __call__(self, tokens: Array) -> Array:
        return embed_lookup(constrain(self.table[...], None, None), tokens, dtype=self.dtype)


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)
