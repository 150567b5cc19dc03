"""`manyheads explain`: a config's fields with their meanings, and the costs of the run, before it starts."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
from flax import nnx
from rich import box
from rich.table import Table

from train.config import RunConfig, fields
from train.data.prepared.prepare import prepare, prepared_before
from train.data.prepared.store import Prepared
from train.examine.doctor.peaks import peaks_of
from train.parallel.mesh import MESH_AXES
from train.program.program import batch_shapes, described_state, trained_of
from train.report.attention_backends import Choice, choices
from train.report.display import clock, console
from train.run.begin import batches_of, waits_for_data, with_data
from train.trained import ALL, TrainableMask, size
from transformer.functional import graphdef_of
from transformer.interpret.capture import readable
from transformer.models.adapted import make_adapted
from transformer.models.families import flops_per_token


@dataclasses.dataclass(frozen=True)
class Cost:
    """The costs of a run. Bytes are for the whole run, before any sharding."""

    parameters: int
    trained: int
    """Number of parameters that are not frozen."""
    tokens_per_step: int
    flops_per_token: float
    """FLOPs of a training step, forward and backward, per prediction."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """What the forward pass of one microbatch stores for the backward pass, with the remat policy applied."""


def cost(config: RunConfig) -> Cost:
    """Compute the costs from the shapes of the real model, optimiser and loss; no array is allocated."""
    state = described_state(config)
    make = functools.partial(make_adapted, config.model, config.adapter)
    trained = trained_of(config, make)
    length = config.sequence_length
    batch = batch_shapes(config, config.batch_size // config.microbatches)
    return Cost(
        parameters=size(state.params),
        trained=size(trained.select(state.params)),
        tokens_per_step=config.tokens_per_step,
        flops_per_token=trained.flops_factor(state.params) * flops_per_token(config.model, length),
        parameter_bytes=_bytes(state.params),
        gradient_bytes=_bytes(trained.select(state.params)),
        optimizer_bytes=_bytes(state.opt_state) + _bytes(state.ema),
        activation_bytes=saved_bytes(graphdef_of(make), state.params, batch, config, trained),
    )


def explain(config: RunConfig) -> None:
    """Print it.

    Data that is prepared already tells the number of epochs. What only the data decides is printed as it will be; the data is
    then prepared now.
    """
    out = console()
    prepared = prepare(config.data) if waits_for_data(config) else prepared_before(config.data)
    if prepared is not None:
        config = with_data(config, prepared)
    table = Table(title=f"{config.name}: every field", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("field", "value", "default"):
        table.add_column(column, overflow="fold", no_wrap=column == "field")
    table.add_column("meaning")
    for field in fields(config):
        default = "required" if field.default is dataclasses.MISSING else _plain(field.default)
        value = _plain(field.value)
        table.add_row(field.path, value if value == default else f"[bold]{value}[/bold]", default, field.meaning)
    out.print(table)
    # The loss is traced, which tells the backends that its attention takes.
    with choices() as found:
        total = cost(config)
    costs = Table(title="costs", title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    costs.add_column("what")
    costs.add_column("how much", justify="right")
    costs.add_column("meaning")
    for row in (*_cost_rows(config, total), _epochs_row(config, prepared), _time_row(config, total)):
        costs.add_row(*row)
    out.print(costs)
    if found:
        out.print(_attention_table(list(found)))


def _attention_table(found: list[Choice]) -> Table:
    table = Table(
        title="attention on one device, by kind of layer", title_justify="left", box=box.SIMPLE_HEAD,
        caption="GPU: of the Hopper generation or newer", caption_justify="left",
    )  # fmt: skip
    for column in ("layer", "here", *(name for name, _ in found[0].elsewhere), "why not a faster one"):
        table.add_column(column, overflow="fold")
    for one in found:
        table.add_row(one.call, one.here, *(backend for _, backend in one.elsewhere), "\n".join(one.reasons))
    return table


def _cost_rows(config: RunConfig, total: Cost) -> list[tuple[str, str, str]]:
    tokens = total.tokens_per_step * config.steps
    sharded = [axis for axis in MESH_AXES if getattr(config.mesh, axis) not in (None, 1)]
    spread = f" (over the devices of {', '.join(sharded)}, divide)" if sharded else ""
    memory = total.parameter_bytes + total.gradient_bytes + total.optimizer_bytes + total.activation_bytes
    frozen = total.trained < total.parameters
    share = [
        (
            "trained",
            f"{total.trained:,} ({total.trained / total.parameters:.1%})",
            "of the parameters; the others are frozen",
        )
    ]
    return [
        ("parameters", f"{total.parameters:,}", "float32"),
        *(share if frozen else []),
        ("tokens per step", f"{total.tokens_per_step:,}", "batch_size × length, of all rows of an example"),
        ("tokens in all", f"{tokens:,}", "over all steps"),
        (
            "FLOPs per token",
            f"{total.flops_per_token:.3e}",
            "forward and backward; matrix products only, the causal half of attention counted once",
        ),
        ("FLOPs in all", f"{total.flops_per_token * tokens:.3e}", "over all steps"),
        ("memory, parameters", readable(total.parameter_bytes), "whole run" + spread),
        ("memory, gradients", readable(total.gradient_bytes), "one for each trained parameter"),
        ("memory, optimiser", readable(total.optimizer_bytes), f"{config.optimizer.name}'s moments, moving average"),
        ("memory, activations", readable(total.activation_bytes), "stored for the backward pass of one microbatch"),
        ("memory, total", readable(memory), "without the compiler's own temporaries"),
    ]


def _epochs_row(config: RunConfig, prepared: Prepared | None) -> tuple[str, str, str]:
    if prepared is None:
        return "epochs", "–", "known once the data is prepared, by `manyheads prepare` or by the run"
    examples = batches_of(config, prepared).examples_per_epoch
    return "epochs", f"{config.steps * config.batch_size / examples:,.3g}", f"of {examples:,} examples"


def _time_row(config: RunConfig, total: Cost) -> tuple[str, str, str]:
    devices = jax.devices()
    peaks = peaks_of(devices, config.model.dtype)
    seconds = total.flops_per_token * total.tokens_per_step * config.steps / peaks.of_all(len(devices))
    how = "measured" if peaks.measured else "by its data sheet"
    kind = f"{len(devices)} × {devices[0].device_kind}"
    return "time, at least", clock(seconds), f"at the peak of {kind}, {how}; `manyheads doctor` times real steps"


def saved_bytes(
    graphdef: Any, params: nnx.State, batch: dict[str, Any], config: RunConfig, trained: TrainableMask = ALL
) -> int:
    """Bytes of the arrays that the loss's forward pass saves, other than the parameters and the batch themselves."""

    def residuals(params: nnx.State, batch: dict[str, Any]) -> Any:
        attention = getattr(config.model, "attention_dropout", 0)
        drops = config.model.dropout or attention or (config.adapter is not None and config.adapter.dropout)
        key = jax.random.key(0) if drops else None

        part, frozen = trained.split(params)

        def loss(part: nnx.State) -> Any:
            model = nnx.merge(graphdef, part, frozen)
            return config.objective.loss(model, batch, config.loss, key=key).total()

        return jax.vjp(loss, part)[1]

    saved = jax.tree.leaves(jax.eval_shape(residuals, params, batch))
    # An array with the shape and type of a parameter is that parameter, which is in memory anyway, or a gradient that the loss
    # makes with the forward pass.
    held = (params, trained.select(params), batch)
    known = collections.Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(held))
    total = 0
    for leaf in saved:
        kind = (leaf.shape, leaf.dtype)
        if known[kind] > 0:
            known[kind] -= 1
        else:
            total += _bytes(leaf)
    return total


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    value = list(value) if isinstance(value, tuple) else value
    return repr(value) if isinstance(value, str) else str(value).replace("True", "true").replace("False", "false")
