"""The training step by `jax.pmap`: data parallelism without a mesh.

Each device has all of the state and its own rows of the batch. It computes its own gradient and sums it with the others by
`jax.lax.psum`; then all devices make the same update. The interface is that of `train/program/step.py`: the state is sharded over
a mesh on input and output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.loss import Batch, LossConfig
from train.objectives import Causal, Objective
from train.program.state import TrainState
from train.program.step import Metrics, accumulated, make_first_pass, make_gradient, rows_of, step_keys, update
from train.stability import STABILITY, StabilityConfig
from train.trained import ALL, TrainableMask
from transformer.errors import UserError

AXIS = "devices"
_CAUSAL = Causal()


@dataclasses.dataclass(frozen=True)
class PmapStep:
    """`(state, batch) -> (state, metrics)`; the given state is donated.

    The state is not mapped, so its arrays are those of the mesh, replicated: nothing is copied on input, and on output
    only their shardings are set again. Each device's rows of the batch become a leading dim, as `jax.pmap` requires; they
    stay where they are.
    """

    mapped: Any
    split: Any
    mesh: Mesh
    """The sharding that `jax.pmap` makes itself."""
    layout: NamedSharding
    """The state's sharding, on the run's mesh."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(self.mesh):
            state, metrics = self.mapped(state, self.split(batch))
        return jax.device_put(state, self.layout), metrics

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step, traced for arguments that may be abstract."""
        with jax.set_mesh(self.mesh):
            return self.mapped.lower(state, jax.eval_shape(self.split, batch))


def make_pmap_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    mesh: Mesh,
    *,
    microbatches: int = 1,
    ema_decay: float | None = None,
    objective: Objective = _CAUSAL,
    trained: TrainableMask = ALL,
    stability: StabilityConfig = STABILITY,
) -> PmapStep:
    """The step over the devices of `mesh`, whose only axis longer than 1 is that of the batch.

    The gradient is that of the mean over all target tokens of the global batch. With experts that a loss balances, a first pass
    counts the tokens of all devices (`make_first_pass`).

    Args:
        microbatches: into how many parts each device splits its rows; the rest as in `make_train_step`.

    Raises:
        UserError: there is more than one process.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"mesh.strategy: got 'pmap', which needs one process; there are {jax.process_count()}. dp computes the same"
        )
    devices = tuple(mesh.devices.flat)
    first_pass = make_first_pass(graphdef, loss, objective, microbatches=microbatches, axis=AXIS)
    gradient = accumulated(make_gradient(graphdef, loss, objective, trained=trained), first_pass, microbatches)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        first = jax.lax.axis_index(AXIS) * rows_of(batch)
        keys = step_keys(state.key, state.step, batch, first)
        # A model's logical axes mean nothing here: each device runs its own program.
        with nnx.logical_axis_rules(()):
            own = gradient(state.params, batch, keys, first_pass(state.params, batch, keys))
        grads, sums = jax.lax.psum(own, AXIS)
        return update(state, grads, sums, optimizer, ema_decay, trained, stability)

    def split(batch: Batch) -> Batch:
        return jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)

    mapped = jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0)
    own = Mesh(mesh.devices.reshape(-1), AXIS)
    split_in_place = jax.jit(split, out_shardings=NamedSharding(own, PartitionSpec(AXIS)))
    return PmapStep(mapped, split_in_place, own, NamedSharding(mesh, PartitionSpec()))
