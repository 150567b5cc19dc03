"""The training step and the evaluation step: pure functions of state and batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from train.objective import LOSSES, Batch, LossConfig, LossSums
from train.state import TrainState
from transformer.types import Array

Metrics = dict[str, Array]


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    abstract: TrainState,
    *,
    microbatches: int = 1,
    ema_decay: float | None = None,
    objective: str = "causal",
    gradients: nnx.State | None = None,
) -> jax.stages.Wrapped:
    """The jitted step `(state, batch) -> (state, metrics)`; the state it is given is consumed.

    The gradient is that of the mean over all target tokens of the global batch, whatever `microbatches` is. An update
    whose loss or gradient is not finite is left out: parameters and optimiser stay as they were, and `skipped` is 1.

    Args:
        graphdef: the model without arrays (`graphdef_of`).
        abstract: shapes and shardings of the state (`abstract_state`).
        microbatches: into how many parts the batch is cut, one after the other, to save memory.
        ema_decay: of the parameters' moving average, where the state keeps one.
        objective: a name of `LOSSES`.
        gradients: shapes and shardings of the gradients; laid out as the compiler sees fit by default.

    Returns:
        A function whose metrics are float32 scalars: loss, nll (nats per token), grad_norm (before clipping), tokens,
        skipped.
    """

    def loss_sum(params: nnx.State, batch: Batch, key: Array) -> tuple[Array, LossSums]:
        sums = LOSSES[objective](nnx.merge(graphdef, params), batch, loss, key=key)
        return sums.loss, sums

    def gradient(params: nnx.State, batch: Batch, key: Array) -> tuple[nnx.State, LossSums]:
        grads, sums = jax.grad(loss_sum, has_aux=True)(params, batch, key)
        if gradients is not None:
            layout = jax.tree.map(lambda leaf: leaf.sharding, gradients)
            grads = jax.lax.with_sharding_constraint(grads, layout)
        return grads, sums

    def accumulate(params: nnx.State, batch: Batch, key: Array) -> tuple[nnx.State, LossSums]:
        def add(total: tuple[nnx.State, LossSums], part: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        parts = jax.tree.map(lambda x: _cut(x, microbatches), batch)
        keys = jax.random.split(key, microbatches)
        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, *first))
        return jax.lax.scan(add, zero, (parts, keys))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        compute = gradient if microbatches == 1 else accumulate
        grads, sums = compute(state.params, batch, key)
        # optax relies on JAX's default promotion, whatever stricter rule the program runs under.
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            weight = jnp.maximum(sums.weight, 1)
            grads = jax.tree.map(lambda g: g / weight, grads)
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None and ema_decay is not None:
                ema = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, params)
            kept = (state.params, state.opt_state, state.ema)
            params, opt_state, ema = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state, ema), kept
            )
        metrics = {
            "loss": sums.loss / weight,
            "nll": sums.nll / weight,
            "grad_norm": grad_norm,
            "tokens": sums.weight,
            "skipped": 1 - finite.astype(jnp.float32),
        }
        changed = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return changed, metrics

    # Without its layout written out, the state would leave the first step laid out in other words than it came in with,
    # and the second step would be compiled anew.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(graphdef: Any, objective: str = "causal") -> jax.stages.Wrapped:
    """The jitted `(params, batch) -> LossSums` without dropout, smoothing or z-loss."""

    def step(params: nnx.State, batch: Batch) -> LossSums:
        return LOSSES[objective](nnx.merge(graphdef, params), batch, LossConfig())

    return jax.jit(step)


def _cut(x: Array, parts: int) -> Array:
    """[B, ...] → [parts, B / parts, ...], row b going to part b mod parts, so that each device keeps its own rows."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
