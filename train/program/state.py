"""The state of a run: described abstractly, sharded, then created on the devices that will hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from train.parallel.mesh import Rules, check_divisible, shardings_of
from train.trained import ALL, TrainableMask
from transformer.functional import ModelFactory
from transformer.types import Array, Float, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. `key` is constant: step s draws from `fold_in(key, s)`."""

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    """How many of the steps' updates were skipped. The schedule counts the others."""
    params: nnx.State
    opt_state: optax.OptState
    key: PRNGKeyArray
    losses: Float[Array, 2]
    """Mean and variance of the losses so far whose updates were made, as `train.stability` has them."""
    ema: nnx.State | None = None
    """Exponential moving average of the parameters, when the optimiser keeps one."""

    @property
    def used(self) -> nnx.State:
        """The parameters to use: their moving average, where the run keeps one."""
        return self.params if self.ema is None else self.ema


HOST = "pinned_host"
"""JAX's name for host memory that devices can access."""

StateMaker = Callable[..., TrainState]
"""(key, params=None) -> TrainState"""


def state_maker(
    make_model: ModelFactory,
    optimizer: optax.GradientTransformation,
    *,
    keep_ema: bool = False,
    trained: TrainableMask = ALL,
) -> StateMaker:
    """A pure function from a key, and optional parameters, to an initial state.

    The optimiser has statistics of the trained parameters only.
    """

    def make(key: PRNGKeyArray, params: nnx.State | None = None) -> TrainState:
        init_key, train_key = jax.random.split(key)
        if params is None:
            params = nnx.state(make_model(nnx.Rngs(params=init_key)), nnx.Param)
        ema = jax.tree.map(jnp.copy, params) if keep_ema else None
        none, losses = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32)
        return TrainState(none, none, params, optimizer.init(trained.select(params)), train_key, losses, ema)

    return make


def describe(make: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    """Shapes, types and shardings of what `make` returns, under the current logical rules, without making arrays.

    Raises:
        UserError: a dim that its mesh axis does not divide.
    """
    return lay_out(jax.eval_shape(make, *arguments), mesh)


def lay_out(abstract: Any, mesh: Mesh) -> Any:
    """An abstract tree with the shardings of the current logical rules, replacing its own; raises as `describe`."""
    shardings = shardings_of(abstract, mesh)
    check_divisible(abstract, shardings)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def abstract_state(
    make_state: StateMaker, mesh: Mesh, optimizer_rules: Rules | None = None, *, offload_optimizer: bool = False
) -> TrainState:
    """The abstract description of a state.

    Args:
        optimizer_rules: sharding rules of the optimiser's statistics and the moving average; the current ones by default.
        offload_optimizer: keep the statistics in host memory.
    """
    # An abstract key, because the mesh's devices may be absent, and making a real one would run on them.
    abstract = describe(make_state, mesh, described_key(), None)
    if optimizer_rules is not None:
        with nnx.logical_axis_rules(optimizer_rules):
            opt_state, ema = lay_out((abstract.opt_state, abstract.ema), mesh)
        abstract = dataclasses.replace(abstract, opt_state=opt_state, ema=ema)
    if offload_optimizer:
        abstract = dataclasses.replace(abstract, opt_state=jax.tree.map(_on_host, abstract.opt_state))
    return abstract


def described_key() -> jax.ShapeDtypeStruct:
    """The shape and type of a random key, without making an array."""
    return jax.eval_shape(jax.random.key, 0)


def _on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same in host memory; scalar counters stay on the device."""
    return leaf.update(sharding=leaf.sharding.with_memory_kind(HOST)) if leaf.ndim else leaf


def abstract_params(make_model: ModelFactory, mesh: Mesh) -> nnx.State:
    """The abstract description of a model's parameters."""
    return describe(lambda: nnx.state(make_model(nnx.Rngs(0)), nnx.Param), mesh)


def init_state(
    make_state: StateMaker, abstract: TrainState, seed: int, params: nnx.State | None = None, *, donate: bool = False
) -> TrainState:
    """A fresh state, each array made on its own devices. The values depend on `seed` alone, not on the mesh.

    Args:
        params: initial parameters; None: random ones.
        donate: take the memory of `params`, which nothing else uses.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(make_state, out_shardings=shardings, donate_argnums=(1,) if donate else ())
    return make(jax.random.key(seed), params)


def init_params(make_state: StateMaker, abstract: TrainState, seed: int) -> nnx.State:
    """The parameters of `init_state` without the rest of the state, whose memory is not needed for them."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    return jax.jit(lambda key: make_state(key).params, out_shardings=shardings)(jax.random.key(seed))
