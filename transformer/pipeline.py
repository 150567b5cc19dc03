"""Pipeline parallelism: layers on devices one after the other, through which a batch passes in microbatches.

B batch, M microbatches, R rows of a microbatch, L layers, P devices of the pipeline, V stages of a device, K layers of a stage.

Stage s of P × V has the layers from sK on, and is on device s mod P. On every tick each device runs one of its stages on one
microbatch and passes the result to the next device, the last one to the first. With one stage per device this is GPipe's
schedule (Huang et al. 2019, figure 2c): M + P - 1 ticks, of which each device waits for P - 1. With V of them (interleaved, or
circular; Narayanan et al. 2021, section 2.2) a tick is V times shorter, and there are MV + P - 1. Only the forward schedule is
written here; autodiff derives the backward one, in reverse.

The mesh axis that holds the stages is read from the active logical-axis rules ("layers"); along the other axes a stage's
arrays are laid out as everywhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from transformer.errors import UserError
from transformer.sharding import axes_size, mesh_axes
from transformer.types import Array

TreeT = TypeVar("TreeT")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a batch passes through a pipeline."""

    stages_per_device: int = 1
    microbatches: int | None = None
    """A multiple of the number of the pipeline's devices; None: the number of stages."""


def devices_of_layers() -> int:
    """Number of devices that the layers are divided over; 1 if no mesh axis holds layers."""
    return axes_size(mesh_axes("layers"))


def in_stages(tree: TreeT, stages_per_device: int) -> TreeT:
    """Stacked parameters [L, ...] as [V, L / V, ...]; a device's share of the second dim then consists of its stages.

    The order of the layers does not change: one dim is written as two. `in_order` is the inverse. Anything that is not a
    parameter of stacked layers, or is already in stages, is returned unchanged.
    """

    def split(leaf: Any) -> Any:
        axes = _axes(leaf)
        if axes[:1] != ("layers",) or stages_per_device == 1:
            return leaf
        value, V = leaf.get_value(), stages_per_device
        return leaf.replace(_reshaped(value, (V, value.shape[0] // V, *value.shape[1:])), out_sharding=(None, *axes))

    return jax.tree.map(split, tree, is_leaf=is_variable)


def in_order(tree: TreeT) -> TreeT:
    """Stacked parameters as [L, ...], whether they are in stages or not; other arrays are returned unchanged."""

    def join(leaf: Any) -> Any:
        axes = _axes(leaf)
        if axes[:2] != (None, "layers"):
            return leaf
        value = leaf.get_value()
        return leaf.replace(
            _reshaped(value, (value.shape[0] * value.shape[1], *value.shape[2:])), out_sharding=axes[1:]
        )

    return jax.tree.map(join, tree, is_leaf=is_variable)


def run_pipeline(
    stage: Callable[[Any, Array, Any, Any, Any], tuple[Array, Any]],
    blocks: nnx.Module,
    x: Array,
    *,
    keys: Array | None,
    per_layer: Any = None,
    context: Any,
    schedule: Schedule,
) -> tuple[Array, Any]:
    """Run `stage(blocks, x, keys, per_layer, context) -> (x, outputs)` on all layers, K at a time.

    Args:
        stage: its outputs are sums over rows, with a leading K.
        blocks: [L, ...], or [V, L / V, ...] (`in_stages`), which needs no exchange of parameters if V is above 1.
        x: [B, ...].
        keys: of each row, [L, ..., B].
        per_layer: a pytree whose leaves have a leading L.
        context: a pytree that all layers get. The leaves that its `batch_leaves` marks are divided as x is.

    Returns:
        The last x [B, ...], and the outputs with a leading L: sums over the rows of the whole batch.

    Raises:
        UserError: layers or rows that cannot be divided evenly.
    """
    axes, P = mesh_axes("layers"), devices_of_layers()
    V = schedule.stages_per_device
    M = P * V if schedule.microbatches is None else schedule.microbatches
    num_layers = _leading(in_order(blocks))
    check_stages(num_layers, P, V)
    check_microbatches(P, M)
    if x.shape[0] % M:
        raise UserError(
            f"pipeline: a batch of {x.shape[0]} sequences cannot be divided into {M} microbatches; allowed: a multiple of {M}"
        )
    flat, structure = jax.tree.flatten(context)
    is_cut = [False] * len(flat) if context is None else context.batch_leaves()

    def on_device(blocks: Any, keys: Any, per_layer: Any, given: Array, flat: list[Any]) -> tuple[Array, Any]:
        index, given = jax.lax.axis_index(axes), given[0]
        if V == 1:
            keys, per_layer = jax.tree.map(lambda leaf: leaf[None], (keys, per_layer))

        def tick(arriving: Array, time: Array) -> tuple[Array, Any]:
            # Nothing reads what a device computes before its first microbatch arrives, or after its last one.
            turn = jnp.clip(time - index, 0, M * V - 1)
            stage_number = turn // P % V
            microbatch = turn // (P * V) * P + turn % P
            mine, own_keys = _stage_of(blocks, stage_number), _at(keys, stage_number)
            own = [_at(leaf, microbatch) if cut else leaf for leaf, cut in zip(flat, is_cut, strict=True)]
            if own_keys is not None:
                own_keys = jax.lax.dynamic_index_in_dim(own_keys, microbatch, axis=own_keys.ndim - 2, keepdims=False)
            starts = (index == 0) & (stage_number == 0)
            x = jnp.where(starts, _at(given, microbatch), arriving)
            x, outputs = stage(mine, x, own_keys, _at(per_layer, stage_number), jax.tree.unflatten(structure, own))
            return jax.lax.ppermute(x, axes, [(device, (device + 1) % P) for device in range(P)]), (x, outputs)

        ticks = jnp.arange(M * V + P - 1)
        _, (passed, outputs) = jax.lax.scan(tick, jnp.zeros_like(given[0]), ticks)
        # The tick at which each microbatch leaves its last stage, which is on the last device.
        leaves = np.arange(M) // P * P * V + (V - 1) * P + np.arange(M) % P + P - 1

        def summed(output: Array) -> Array:
            own = jax.lax.dynamic_slice_in_dim(output, index, M * V)
            own = own.reshape(M // P, V, P, *own.shape[1:]).sum((0, 2))
            return own[0] if V == 1 else own

        return passed[leaves][None], jax.tree.map(summed, outputs)

    by_stage = PartitionSpec(axes) if V == 1 else PartitionSpec(None, axes)
    flat = [microbatched(leaf, M) if cut else leaf for leaf, cut in zip(flat, is_cut, strict=True)]
    # A copy for each device, of which the first is read, so that its gradient sums one value and zeros.
    if keys is not None:
        # [L, ..., M, R]
        keys = jnp.moveaxis(microbatched(jnp.moveaxis(keys, -1, 0), M), (0, 1), (-2, -1))
    given = microbatched(x, M)
    given = jnp.broadcast_to(given, (P, *given.shape))
    blocks = in_stages(in_order(blocks) if V == 1 else blocks, V)
    if V > 1:
        keys, per_layer = jax.tree.map(
            lambda leaf: leaf.reshape(V, num_layers // V, *leaf.shape[1:]), (keys, per_layer)
        )
    with jax.named_scope("pipeline"):
        done, outputs = jax.shard_map(
            on_device,
            in_specs=(by_stage, by_stage, by_stage, PartitionSpec(axes), PartitionSpec()),
            out_specs=(PartitionSpec(axes), by_stage),
            axis_names=set(axes),
            check_vma=False,
        )(blocks, keys, per_layer, given, flat)
    is_last = jnp.arange(P) == P - 1
    x = _joined(jnp.sum(jnp.where(is_last.reshape(P, *(1,) * (done.ndim - 1)), done, 0), axis=0, dtype=x.dtype))
    return x, outputs if V == 1 else jax.tree.map(lambda y: y.reshape(num_layers, *y.shape[2:]), outputs)


def check_stages(num_layers: int, num_devices: int, stages_per_device: int, group: int = 1) -> None:
    """Raise a `UserError` unless all stages have the same number of layers, in whole groups of a pattern."""
    stages = num_devices * stages_per_device
    if num_layers % (stages * group):
        of_pattern = f" × {group} layers of the pattern" if group > 1 else ""
        raise UserError(
            f"num_layers: got {num_layers}; allowed: a multiple of {stages * group} ({num_devices} devices of the pipeline × "
            f"{stages_per_device} stages per device{of_pattern})"
        )


def check_microbatches(num_devices: int, microbatches: int) -> None:
    """Raise a `UserError` unless every device gets the same number of microbatches."""
    if microbatches % num_devices:
        raise UserError(
            f"pipeline_microbatches: got {microbatches}; allowed: a multiple of the pipeline's devices ({num_devices}), or null"
        )


def check_period(num_layers: int, layers_of_stage: int, period: int) -> None:
    """Raise a `UserError` unless every stage begins with the first layer of a period of layers that differ."""
    if layers_of_stage % period:
        raise UserError(
            f"num_layers: got {num_layers}, {layers_of_stage} in each stage of the pipeline; allowed: a multiple of {period} in "
            "each stage, since attention repeats after that many layers"
        )


def microbatched(tree: TreeT, microbatches: int) -> TreeT:
    """Arrays [B, ...] as microbatches [M, R, ...], all of which every device of the pipeline gets.

    The rows of a microbatch come from one device of the pipeline, and from every other device that shares its place there;
    nothing moves along mesh axes other than the pipeline's.
    """
    axes, P = mesh_axes("layers"), devices_of_layers()
    batch = tuple(name for name in mesh_axes("batch") if name not in axes)

    def cut(x: Array) -> Array:
        R = x.shape[0] // microbatches
        x = x.reshape(P, R, microbatches // P, *x.shape[1:]).swapaxes(1, 2).reshape(microbatches, R, *x.shape[1:])
        return _laid_out(x, None, batch or None)

    return jax.tree.map(cut, tree)


def _joined(x: Array) -> Array:
    """The inverse, for one array, whose rows are then divided over the pipeline's devices again."""
    (M, R, *rest), P = x.shape, devices_of_layers()
    x = x.reshape(P, M // P, R, *rest).swapaxes(1, 2).reshape(M * R, *rest)
    return _laid_out(x, mesh_axes("batch") or None)


def _laid_out(x: Array, *first: Any) -> Array:
    """The array with its first dims along these axes of the mesh, and the others unchanged."""
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(first))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*first, *rest))


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _stage_of(blocks: Any, number: Array) -> Any:
    """One of a device's stages [K, ...], from blocks [K, ...] or [V, K, ...]."""

    def take(leaf: Any) -> Any:
        if (axes := _axes(leaf))[:2] != (None, "layers"):
            return leaf
        return leaf.replace(_at(leaf.get_value(), number), out_sharding=axes[1:])

    return jax.tree.map(take, blocks, is_leaf=is_variable)


def _leading(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def is_variable(leaf: Any) -> bool:
    """Whether a node of a tree is a whole parameter, as `is_leaf`."""
    return isinstance(leaf, nnx.Variable)


def is_stacked(leaf: Any) -> bool:
    """Whether a leaf is a parameter of stacked layers."""
    return "layers" in _axes(leaf)[:2]


def is_in_stages(tree: Any) -> bool:
    """Whether `in_stages` has changed any of a tree's parameters."""
    return any(_axes(leaf)[:2] == (None, "layers") for leaf in jax.tree.leaves(tree, is_leaf=is_variable))


def _axes(leaf: Any) -> tuple[str | None, ...]:
    """Logical names of a parameter's dims; empty for any other array."""
    return tuple(leaf.get_metadata().get("out_sharding") or ()) if is_variable(leaf) else ()


def _reshaped(value: Any, shape: tuple[int, ...]) -> Any:
    """An array, or its description, in another shape."""
    return jax.ShapeDtypeStruct(shape, value.dtype) if isinstance(value, jax.ShapeDtypeStruct) else value.reshape(shape)
