"""The training step by `jax.pmap`: data parallelism as it was written before there was a mesh.

Each device has all of the state and its own rows of the batch. It computes its own gradient and adds it to the others' by
`jax.lax.psum`; then all devices make the same update. From the outside the step is that of `train/run/step.py`: a state laid out
by a mesh goes in and comes out.
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
from train.run.state import TrainState
from train.run.step import Metrics, accumulated, make_gradient, update
from train.trained import ALL, TrainableMask
from transformer.errors import UserError

AXIS = "devices"
_CAUSAL = Causal()


@dataclasses.dataclass(frozen=True)
class PmapStep:
    """`(state, batch) -> (state, metrics)`; the state it is given is consumed.

    The state is an argument that is not mapped, so that its arrays are those of the mesh, replicated: nothing is copied on
    the way in, and on the way out they are only named by the mesh again. Of the batch each device's rows become a leading
    dim, as `jax.pmap` wants it; they stay where they are.
    """

    mapped: Any
    split: Any
    mesh: Mesh
    """The one that `jax.pmap` makes for itself."""
    layout: NamedSharding
    """The state's, on the mesh of everyone else."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(self.mesh):
            state, metrics = self.mapped(state, self.split(batch))
        return jax.device_put(state, self.layout), metrics

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step, traced for arguments that may be descriptions."""
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
) -> PmapStep:
    """The step over the devices of `mesh`, whose one axis longer than 1 is that of the batch.

    The gradient is that of the mean over all target tokens of the global batch. A loss that is itself no sum over tokens,
    such as a mixture's balance, is each device's own.

    Args:
        microbatches: into how many parts each device cuts its rows; the rest as in `make_train_step`.

    Raises:
        UserError: there is more than one process.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"mesh.strategy: got 'pmap', which is for one process, and there are {jax.process_count()}; dp does the same"
        )
    devices = tuple(mesh.devices.flat)
    gradient = accumulated(make_gradient(graphdef, loss, objective, trained=trained), microbatches)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        # A model's logical axes mean nothing here: each device runs a program of its own.
        with nnx.logical_axis_rules(()):
            own = gradient(state.params, batch, jax.random.fold_in(key, jax.lax.axis_index(AXIS)))
        grads, sums = jax.lax.psum(own, AXIS)
        return update(state, grads, sums, optimizer, ema_decay, trained)

    def split(batch: Batch) -> Batch:
        return jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)

    mapped = jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0)
    own = Mesh(mesh.devices.reshape(-1), AXIS)
    split_in_place = jax.jit(split, out_shardings=NamedSharding(own, PartitionSpec(AXIS)))
    return PmapStep(mapped, split_in_place, own, NamedSharding(mesh, PartitionSpec()))
