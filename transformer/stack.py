"""Many identical blocks as one: the only scan and the only rematerialisation over layers.

Every parameter of the stack carries a leading L (logical axis `layers`), so that a program's size and its compile time
do not grow with depth. If the mesh has an axis for `layers`, they run as a pipeline (`transformer/pipeline.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.backends.blockwise import ATTENTION_RESIDUALS
from transformer.errors import nearest
from transformer.layers.grouped_matmul import is_grouped_product
from transformer.pipeline import Schedule, check_period, devices_of_layers, in_order, run_pipeline
from transformer.sharding import platform_of_program
from transformer.types import Array

BlockT = TypeVar("BlockT", bound=nnx.Module)

FEW_LAYERS = 24
"""As many layers are compiled one by one on a GPU, which takes under a minute. On an H200 a step of GPT-2 124M was 1.14 times
and one of BERT-base 1.43 times as fast as with a scan."""
TOGETHER = 4

_KERNELS = ("dot_product_attention_fwd_wrapper", "pallas_call")
"""The operations by which cuDNN's and Pallas's attention run forward: their outputs are what the backward pass needs of them."""


def _of_kernels(operation: Any, *_: Any, **__: Any) -> bool:
    return operation.name in _KERNELS


_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "full": _policies.nothing_saveable,
    "dots": _policies.save_from_both_policies(_policies.dots_saveable, is_grouped_product),
    "light": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_from_both_policies(_policies.save_only_these_names(ATTENTION_RESIDUALS), _of_kernels),
    ),
}
"""What is saved for the backward pass; `none`, the absence of a policy, saves everything.

full: nothing. dots: every matrix product, including attention's T×S ones. light: the products with weights and the
residuals of memory-efficient attention; only norms, activations and sums are recomputed, which needs no matrix product.
"""


def stack(make_block: Callable[[nnx.Rngs], BlockT], num_layers: int, rngs: nnx.Rngs) -> BlockT:
    """`num_layers` independent blocks as one block whose parameters carry a leading `layers` axis."""

    @jax.vmap
    @nnx.transform_metadata(in_axes=0, out_axes=0, partition="layers")
    def make(rngs: nnx.Rngs) -> BlockT:
        return make_block(rngs)

    return make(rngs.split(num_layers))


def unstack(tree: Any, num_layers: int) -> list[Any]:
    """A stack, in stages or not, or any other pytree with a leading L, as one pytree per layer."""
    tree = in_order(tree)

    def take(leaf: Any, index: int) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return leaf[index]
        axes = leaf.get_metadata().get("out_sharding")
        # A parameter of a single layer no longer has a layers axis.
        return leaf.replace(leaf.get_value()[index], **({"out_sharding": axes[1:]} if axes else {}))

    def layer(index: int) -> Any:
        return jax.tree.map(lambda leaf: take(leaf, index), tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    return [layer(index) for index in range(num_layers)]


def restack(layers: list[Any]) -> Any:
    """One pytree per layer as one with a leading L: the inverse of `unstack`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def apply_stack(
    calls: Sequence[Callable[..., tuple[Array, Any]]],
    blocks: nnx.Module | list[nnx.Module],
    x: Array,
    *,
    keys: Array | None = None,
    per_layer: Any = None,
    context: Any = None,
    first: Callable[..., tuple[Array, Any]] | None = None,
    schedule: Schedule | None = None,
    scan: Literal["auto"] | bool = True,
    remat: str = "none",
    group: int = 1,
) -> tuple[Array, Any]:
    """Run `call(block, x, key, layer_input, context) -> (x, layer_output)` through the layers, from the first to the last.

    A layer may be a group of blocks that repeats; L then counts the groups.

    Args:
        calls: applied in turn, such as one for global and two for local attention; their outputs have the same structure.
        blocks: what `stack` returned, or a list of single blocks (`unstack`), which are always run one by one.
        keys: of each layer's rows, [L, ..., B].
        per_layer: a pytree whose leaves have a leading L, of which each layer gets its slice; for a list of blocks, a
            list with each layer's input.
        context: passed to all layers.
        first: runs the first layer in place of its call.
        schedule: of a pipeline, for layers that are divided over devices (`run_pipeline`); None, or on any other mesh: each
            device runs all layers.
        scan: one `jax.lax.scan`, of several calls over their repetitions; or a Python loop, which compiles more slowly and lets
            XLA optimise across layers. auto: on a GPU a loop up to `FEW_LAYERS`, and beyond that a scan of `TOGETHER` layers at
            a time: a scan copies what each layer keeps for the backward pass into stacked arrays and out again.
        remat: `none` or a name of `REMAT_POLICIES`.
        group: the number of blocks that a layer is.

    Returns:
        The last x, and the layers' outputs with a leading L; a list of outputs for a list of blocks.

    Raises:
        UserError: a pipeline that does not fit.
    """
    if remat != "none" and remat not in REMAT_POLICIES:
        known = ", ".join(REMAT_POLICIES)
        raise ValueError(f"remat {remat!r} does not exist; allowed: none, {known}.{nearest(remat, REMAT_POLICIES)}")
    through = functools.partial(_through, list(calls), first=first, scan=scan, remat=remat, group=group)

    def stage(blocks: nnx.Module, x: Array, keys: Array | None, inputs: Any, context: Any) -> tuple[Array, Any]:
        check_period(num_layers, _leading(blocks), len(calls))
        return through(blocks, x, keys, inputs, context)

    with jax.named_scope("layers"):
        if isinstance(blocks, list):
            return through(blocks, x, keys, per_layer, context)
        num_layers = _leading(in_order(blocks))
        if schedule is not None and devices_of_layers() > 1:
            if first is not None:
                raise ValueError("a first layer that differs from the others is not supported with pipelining")
            return run_pipeline(stage, blocks, x, keys=keys, per_layer=per_layer, context=context, schedule=schedule)
        return through(in_order(blocks), x, keys, per_layer, context)


def _through(
    calls: list[Callable[..., tuple[Array, Any]]],
    blocks: nnx.Module | list[nnx.Module],
    x: Array,
    keys: Array | None,
    per_layer: Any,
    context: Any,
    *,
    first: Callable[..., tuple[Array, Any]] | None,
    scan: Literal["auto"] | bool,
    remat: str,
    group: int,
) -> tuple[Array, Any]:
    """The layers one after the other."""
    period, together = len(calls), 1
    if scan == "auto":
        on_gpu = platform_of_program() == "gpu"
        scan = not (on_gpu and (isinstance(blocks, list) or _leading(blocks) * group <= FEW_LAYERS))
        together = max(TOGETHER // (period * group), 1) if on_gpu else 1

    def body_of(call: Callable[..., tuple[Array, Any]]) -> Callable[..., tuple[Array, Any]]:
        def body(x: Array, layer: tuple[Any, Any, Any]) -> tuple[Array, Any]:
            block, key, layer_input = layer
            return call(block, x, key, layer_input, context)

        if remat == "none":
            return body
        # Under a scan the barrier against common-subexpression elimination is not needed, and it prevents fusions.
        return jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=not scan)

    bodies = list(map(body_of, calls))

    def one_by_one(x: Array, layers: Sequence[Any], start: int = 0) -> tuple[Array, list[Any]]:
        outputs = []
        for index, layer in enumerate(layers, start):
            body = body_of(first) if first is not None and index == 0 else bodies[index % period]
            x, output = body(x, layer)
            outputs.append(output)
        return x, outputs

    if isinstance(blocks, list):
        none = [None] * len(blocks)
        inputs = (none if keys is None else keys, none if per_layer is None else per_layer)
        return one_by_one(x, list(zip(blocks, *inputs, strict=True)))
    layers, num_layers = (blocks, keys, per_layer), _leading(blocks)
    if not scan:
        x, outputs = one_by_one(x, unstack(layers, num_layers))
        return x, restack(outputs)
    if first is None and period == 1:
        return jax.lax.scan(bodies[0], x, layers, unroll=together)

    def part(start: int, stop: int) -> Any:
        return layers if (start, stop) == (0, num_layers) else jax.tree.map(lambda leaf: leaf[start:stop], layers)

    def repeat(x: Array, layers: Any) -> tuple[Array, Any]:
        x, outputs = one_by_one(x, unstack(layers, period), start=period)
        return x, restack(outputs)

    # The first group separately if its first layer differs, then whole groups, then the rest.
    begin = period if first is not None else 0
    groups = max(num_layers - begin, 0) // period
    end = begin + groups * period
    outputs = []
    if begin:
        x, found = one_by_one(x, unstack(part(0, begin), begin))
        outputs.append(restack(found))
    if groups:
        stacked = jax.tree.map(lambda leaf: leaf.reshape(groups, period, *leaf.shape[1:]), part(begin, end))
        x, found = jax.lax.scan(repeat, x, stacked, unroll=together)
        outputs.append(jax.tree.map(lambda leaf: leaf.reshape(groups * period, *leaf.shape[2:]), found))
    if end < num_layers:
        x, found = one_by_one(x, unstack(part(end, num_layers), num_layers - end), start=end)
        outputs.append(restack(found))
    return x, outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def _leading(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]
