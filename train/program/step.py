"""The training step and the evaluation step: pure functions of state and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from train.loss import DEFAULT_LOSS, Batch, LossConfig, LossSums, router_coefficients
from train.objectives import Causal, Objective
from train.objectives.objective import Outputs
from train.program.state import TrainState
from train.stability import STABILITY, StabilityConfig, moments_after, z_score
from train.trained import ALL, TrainableMask
from transformer.layers.mixture_of_experts import RouterCoefficients, RouterSums, has_router_losses
from transformer.randomness import row_keys
from transformer.types import Array

T = TypeVar("T")

Metrics = dict[str, Array]

_CAUSAL = Causal()

Coefficients = tuple[RouterCoefficients, ...]

FirstPass = Callable[[nnx.State, Batch, Array], Coefficients | None]
"""(params, whole batch, keys of its rows [B]) -> what the loss of each part of the batch needs of the others; None: nothing."""


class Gradient(Protocol):
    """The gradient of a batch's summed loss with regard to the trained parameters, and the sums."""

    def __call__(
        self, params: nnx.State, batch: Batch, key: Array, coefficients: Coefficients | None = None
    ) -> tuple[nnx.State, LossSums]:
        """The gradient.

        Args:
            key: keys of the batch's rows, [B].
            coefficients: of the whole batch that this is a part of, from the first pass; None: it is whole.
        """


def make_train_step(
    gradient: Gradient,
    first_pass: FirstPass,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    *,
    microbatches: int = 1,
    ema_decay: float | None = None,
    gradients: nnx.State | None = None,
    summed: nnx.State | None = None,
    trained: TrainableMask = ALL,
    stability: StabilityConfig = STABILITY,
) -> jax.stages.Wrapped:
    """The jitted step `(state, batch) -> (state, metrics)`; the given state is donated.

    The gradient is that of the mean over all target tokens of the global batch, whatever `microbatches` is. An update
    whose loss or gradient is not finite is skipped: parameters and optimiser are unchanged, and `skipped` is 1.

    Args:
        gradient: what computes the gradients: `make_gradient`, or a pipeline.
        first_pass: `make_first_pass` with the same number of microbatches.
        abstract: shapes and shardings of the state (`abstract_state`).
        microbatches: into how many parts the batch is split, computed in sequence to save memory.
        ema_decay: of the parameters' moving average, where the state keeps one.
        gradients: shapes and shardings of the gradients of each of several parts; by default the compiler lays them out.
        summed: the same for their sum over all parts, as the optimiser takes it.
        trained: which parameters have gradients and are updated.
        stability: which losses are so high that their updates are skipped too.

    Returns:
        A function whose metrics are float32 scalars: loss, nll (nats per token), grad_norm (before clipping), tokens,
        skipped (1 or 0), the number of earlier updates, by which the schedule counts, and where `stability` asks for it loss_z,
        the z-score of the loss.
    """
    compute = accumulated(gradient, first_pass, microbatches, _layout(gradients))

    # Without explicit output shardings, the first step would return the state with equivalent but differently written
    # shardings, and the second step would be compiled again.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    at_hand = jax.tree.map(lambda one: one.with_memory_kind("device"), shardings.opt_state)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if at_hand != shardings.opt_state:
            state = dataclasses.replace(state, opt_state=jax.device_put(state.opt_state, at_hand))
        grads, sums = compute(state.params, batch, step_keys(state.key, state.step, batch))
        if summed is not None:
            grads = jax.lax.with_sharding_constraint(grads, _layout(summed))
        return update(state, grads, sums, optimizer, ema_decay, trained, stability)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_gradient(
    graphdef: Any, loss: LossConfig, objective: Objective = _CAUSAL, trained: TrainableMask = ALL
) -> Gradient:
    """The gradient of an objective's loss, by `jax.grad`."""

    def loss_sum(
        part: nnx.State, frozen: nnx.State, batch: Batch, key: Array, coefficients: Coefficients | None
    ) -> tuple[Array, LossSums]:
        sums = objective.loss(nnx.merge(graphdef, part, frozen), batch, loss, key=key)
        return sums.total(coefficients), sums

    def gradient(
        params: nnx.State, batch: Batch, key: Array, coefficients: Coefficients | None = None
    ) -> tuple[nnx.State, LossSums]:
        return jax.grad(loss_sum, has_aux=True)(*trained.split(params), batch, key, coefficients)

    return gradient


def make_first_pass(
    graphdef: Any, loss: LossConfig, objective: Objective = _CAUSAL, *, microbatches: int = 1, axis: str | None = None
) -> FirstPass:
    """A forward pass, with the dropout of the gradient's, that counts how many tokens of the whole batch go to each expert.

    The gradient of each part of the batch then balances the experts over the whole batch. It takes about a third as long as the
    gradient, and is made only for a model whose routers have losses. With a z-loss alone, the compiler leaves only the count of
    tokens of it.

    Args:
        microbatches: into how many parts the batch is split, computed in sequence.
        axis: of `jax.pmap`, whose devices have parts of the batch.
    """

    def first_pass(params: nnx.State, batch: Batch, key: Array) -> Coefficients | None:
        model = nnx.merge(graphdef, params)
        if not has_router_losses(model):
            return None

        def counts(batch: Batch, key: Array) -> tuple[Array, tuple[RouterSums, ...]]:
            sums = objective.loss(model, batch, loss, key=key)
            return sums.weight, sums.routers

        with jax.named_scope("first_pass"):
            whole = _summed(counts, microbatches, batch, key)
            return router_coefficients(*(whole if axis is None else jax.lax.psum(whole, axis)))

    return first_pass


def accumulated(
    gradient: Gradient, first_pass: FirstPass, microbatches: int, layout: nnx.State | None = None
) -> Gradient:
    """`gradient` of a batch in parts, computed in sequence.

    Args:
        first_pass: precedes the parts, unless the batch is itself a part of another, whose coefficients are given.
        layout: shardings of the gradients of each of several parts; None leaves them to the compiler.
    """
    if microbatches == 1:
        return gradient

    def accumulate(
        params: nnx.State, batch: Batch, key: Array, coefficients: Coefficients | None = None
    ) -> tuple[nnx.State, LossSums]:
        of_whole = first_pass(params, batch, key) if coefficients is None else coefficients

        def laid_out(batch: Batch, key: Array) -> tuple[nnx.State, LossSums]:
            grads, sums = gradient(params, batch, key, of_whole)
            return grads if layout is None else jax.lax.with_sharding_constraint(grads, layout), sums

        return _summed(laid_out, microbatches, batch, key)

    return accumulate


def step_keys(key: Array, step: int | Array, batch: Batch, start: int | Array = 0) -> Array:
    """The keys of a step's rows, [B], of which the first is row `start` of the global batch.

    They make dropout a matter of the example: it is the same for any number of microbatches and devices.
    """
    return row_keys(jax.random.fold_in(key, step), rows_of(batch), start)


def rows_of(batch: Batch) -> int:
    """The number of examples of a batch."""
    return next(iter(batch.values())).shape[0]


def update(
    state: TrainState,
    grads: nnx.State,
    sums: LossSums,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None = None,
    trained: TrainableMask = ALL,
    stability: StabilityConfig = STABILITY,
) -> tuple[TrainState, Metrics]:
    """The state after a step, and its metrics, from the gradient of the global batch's summed loss."""
    before, ema = trained.select(state.params), None if state.ema is None else trained.select(state.ema)
    # optax relies on JAX's default type promotion, even if the program runs under a stricter rule.
    with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
        weight = jnp.maximum(sums.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        grad_norm = optax.tree.norm(grads)
        loss, count = sums.total() / weight, state.step - state.skipped
        made = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        window, threshold = stability.spike_window, stability.spike_threshold
        z = z_score(loss, state.losses, count, window)
        if threshold is not None:
            made &= z <= threshold
        updates, opt_state = optimizer.update(grads, state.opt_state, before)
        params = optax.apply_updates(before, updates)
        losses = moments_after(loss, state.losses, count, window)
        kept = (before, state.opt_state, ema, state.losses)
        if ema is not None and ema_decay is not None:
            ema = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, params)
        params, opt_state, ema, losses = jax.tree.map(
            lambda new, old: jnp.where(made, new, old), (params, opt_state, ema, losses), kept
        )
        params = trained.merge(params, state.params)
        ema = None if ema is None or state.ema is None else trained.merge(ema, state.ema)
    metrics = {
        "loss": loss,
        "nll": sums.nll / weight,
        "grad_norm": grad_norm,
        "tokens": sums.weight if sums.count is None else sums.count,
        "skipped": 1 - made.astype(jnp.float32),
        "updates": count.astype(jnp.float32),
    }
    metrics |= {name: value / weight for name, value in sums.also.items()}
    if threshold is not None:
        metrics["loss_z"] = z
    changed = dataclasses.replace(
        state, step=state.step + 1, skipped=state.skipped + (1 - made.astype(jnp.int32)),
        params=params, opt_state=opt_state, losses=losses, ema=ema,
    )  # fmt: skip
    return changed, metrics


def make_eval_step(
    graphdef: Any, objective: Objective = _CAUSAL, loss: LossConfig = DEFAULT_LOSS
) -> jax.stages.Wrapped:
    """The jitted `(params, batch) -> (sums, outputs)` without dropout, smoothing, z-loss or class weights.

    Every device ends with the outputs of all rows, so that every process reads the same. They include `example` [B] if the
    batch has it.
    """

    def step(params: nnx.State, batch: Batch) -> tuple[LossSums, Outputs]:
        sums, outputs = objective.evaluate(nnx.merge(graphdef, params), batch, loss)
        if "example" in batch:
            outputs |= {"example": batch["example"]}
        if outputs and not jax.sharding.get_abstract_mesh().empty:
            outputs = jax.lax.with_sharding_constraint(outputs, PartitionSpec())
        return sums, outputs

    return jax.jit(step)


def _summed(function: Callable[[Batch, Array], T], microbatches: int, batch: Batch, key: Array) -> T:
    """The sum of `function(batch, keys)` over the parts of a batch, computed in sequence."""
    if microbatches == 1:
        return function(batch, key)

    def add(total: T, part: tuple[Batch, Array]) -> tuple[T, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    parts = jax.tree.map(lambda x: _cut(x, microbatches), (batch, row_keys(key, rows_of(batch))))
    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first))
    return jax.lax.scan(add, zero, parts)[0]


def _layout(described: nnx.State | None) -> nnx.State | None:
    return None if described is None else jax.tree.map(lambda leaf: leaf.sharding, described)


def _cut(x: Array, parts: int) -> Array:
    """[B, ...] → [parts, B / parts, ...], row b in part b mod parts, so that each device keeps its own rows."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
