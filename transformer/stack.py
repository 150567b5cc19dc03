"""Many equal blocks as one: the only scan and the only rematerialisation over layers.

Every parameter of the stack carries a leading L (logical axis `layers`), so that a program's size and its compile time
do not grow with depth. Where the mesh has an axis for `layers`, they run as a pipeline (`transformer/pipeline.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.blockwise import ATTENTION_RESIDUALS
from transformer.errors import nearest
from transformer.pipeline import check_period, devices_of_layers, in_order, run_pipeline
from transformer.types import Array, PRNGKeyArray

BlockT = TypeVar("BlockT", bound=nnx.Module)

_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_saveable,
    "light": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(ATTENTION_RESIDUALS)
    ),
}
"""What the backward pass finds saved; `none`, the absence of a policy, saves everything.

full: nothing. dots: every matrix product, attention's T×S ones too. light: the products of weights and what a memory-saving
attention keeps for itself; only norms, activations and sums are computed again, which costs no matrix product.
"""


def stack(make_block: Callable[[nnx.Rngs], BlockT], num_layers: int, rngs: nnx.Rngs) -> BlockT:
    """`num_layers` independent blocks as one block whose parameters carry a leading `layers` axis."""

    @jax.vmap
    @nnx.transform_metadata(in_axes=0, out_axes=0, partition="layers")
    def make(rngs: nnx.Rngs) -> BlockT:
        return make_block(rngs)

    return make(rngs.split(num_layers))


def unstack(tree: Any, num_layers: int) -> list[Any]:
    """A stack, in stages or not, or a stacked cache, as one pytree a layer."""
    tree = in_order(tree)

    def take(leaf: Any, index: int) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return leaf[index]
        axes = leaf.get_metadata().get("out_sharding")
        # A parameter of one layer has no layers axis any more.
        return leaf.replace(leaf.get_value()[index], **({"out_sharding": axes[1:]} if axes else {}))

    def layer(index: int) -> Any:
        return jax.tree.map(lambda leaf: take(leaf, index), tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    return [layer(index) for index in range(num_layers)]


def restack(layers: list[Any]) -> Any:
    """One pytree a layer as one with a leading L: what `unstack` took apart."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def apply_stack(
    call: Callable[..., tuple[Array, Any]] | Sequence[Callable[..., tuple[Array, Any]]],
    blocks: nnx.Module | nnx.List,
    x: Array,
    *,
    num_layers: int,
    key: PRNGKeyArray | None = None,
    per_layer: Any = None,
    rows: Any = None,
    pipelined: bool = False,
    scan: bool = True,
    remat: str = "none",
) -> tuple[Array, Any]:
    """Run `call(block, x, key, layer_input, rows) -> (x, layer_output)` through the layers, from the first to the last.

    Args:
        call: the same for every layer; or a list that is gone through again and again, such as one global layer and two
            local ones. One as long as the stack has outputs that may differ in kind, and is always run one by one.
        blocks: what `stack` made, or a list of single blocks (`unstack`), which are always run one by one.
        key: split into one key a layer; None stays None.
        per_layer: a pytree whose leaves have a leading L, of which each layer gets its slice; for a list of blocks a
            list of what each layer gets.
        rows: what all layers get, which belongs to the rows of x.
        pipelined: go by a pipeline where the layers lie on devices one after the other (`run_pipeline`, which says what then
            becomes of rows and outputs); else, and on any other mesh, each device runs all layers.
        scan: one `jax.lax.scan`, of a list over its repetitions; or a Python loop, which compiles slower and lets XLA see
            across layers.
        remat: `none` or a name of `REMAT_POLICIES`.

    Returns:
        The last x, and the layers' outputs with a leading L; a list of outputs for a list of blocks, or of L calls.

    Raises:
        UserError: a pipeline that does not fit.
    """
    if remat != "none" and remat not in REMAT_POLICIES:
        known = ", ".join(REMAT_POLICIES)
        raise ValueError(f"remat {remat!r} does not exist; there are none, {known}.{nearest(remat, REMAT_POLICIES)}")
    calls = [call] if callable(call) else list(call)
    keys = None if key is None else jax.random.split(key, num_layers)
    through = functools.partial(_through, calls, scan=scan, remat=remat)

    def stage(blocks: nnx.Module, x: Array, keys: Array | None, rows: Any) -> tuple[Array, Any]:
        count = jax.tree.leaves(blocks)[0].shape[0]
        check_period(num_layers, count, len(calls))
        return through(blocks, x, keys, per_layer, rows, alike=True)

    with jax.named_scope("layers"):
        if pipelined and devices_of_layers() > 1:
            if jax.tree.leaves(per_layer):
                raise ValueError("a pipeline's layers get nothing one by one (per_layer), such as a cache")
            return run_pipeline(stage, blocks, x, keys=keys, rows=rows)
        alike = (callable(call) or len(calls) < num_layers) and not isinstance(blocks, nnx.List)
        blocks = blocks if isinstance(blocks, nnx.List) else in_order(blocks)
        return through(blocks, x, keys, per_layer, rows, alike=alike)


def _through(
    calls: list[Callable[..., tuple[Array, Any]]],
    blocks: nnx.Module | nnx.List,
    x: Array,
    keys: Array | None,
    per_layer: Any,
    rows: Any,
    *,
    scan: bool,
    remat: str,
    alike: bool,
) -> tuple[Array, Any]:
    """The layers one after the other; `alike` where their outputs are, and can be stacked."""
    period, scan = len(calls), scan and alike

    def body_of(call: Callable[..., tuple[Array, Any]]) -> Callable[..., tuple[Array, Any]]:
        def body(x: Array, layer: tuple[Any, Any, Any]) -> tuple[Array, Any]:
            block, key, layer_input = layer
            return call(block, x, key, layer_input, rows)

        if remat == "none":
            return body
        # Under a scan the barrier against common subexpressions is not needed, and costs fusions.
        return jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=not scan)

    bodies = list(map(body_of, calls))

    def one_by_one(x: Array, layers: Sequence[Any]) -> tuple[Array, list[Any]]:
        outputs = []
        for index, layer in enumerate(layers):
            x, output = bodies[index % period](x, layer)
            outputs.append(output)
        return x, outputs

    if isinstance(blocks, nnx.List):
        return one_by_one(x, _paired(blocks, keys, per_layer))
    layers, num_layers = (blocks, keys, per_layer), jax.tree.leaves(blocks)[0].shape[0]
    if scan and period == 1:
        return jax.lax.scan(bodies[0], x, layers)
    if not scan:
        x, outputs = one_by_one(x, unstack(layers, num_layers))
        return x, restack(outputs) if alike else outputs

    def group(x: Array, layers: Any) -> tuple[Array, Any]:
        x, outputs = one_by_one(x, unstack(layers, period))
        return x, restack(outputs)

    whole, rest = divmod(num_layers, period)
    first = jax.tree.map(lambda leaf: leaf[: whole * period].reshape(whole, period, *leaf.shape[1:]), layers)
    x, grouped = jax.lax.scan(group, x, first)
    outputs = jax.tree.map(lambda leaf: leaf.reshape(whole * period, *leaf.shape[2:]), grouped)
    if rest:
        x, last = one_by_one(x, unstack(jax.tree.map(lambda leaf: leaf[-rest:], layers), rest))
        outputs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), outputs, restack(last))
    return x, outputs


def _paired(blocks: nnx.List, keys: Array | None, per_layer: list[Any] | None) -> list[tuple[Any, Any, Any]]:
    """Each single block with its own key and input."""
    none = [None] * len(blocks)
    return list(zip(blocks, none if keys is None else keys, none if per_layer is None else per_layer, strict=True))
