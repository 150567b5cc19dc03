"""Tokens sorted by expert, on the devices of their experts, and back.

B batch, T position, N tokens of a device, D embed, F mlp, E experts, k experts per token, M sorted choices, P devices along
the experts' axis, S places of a buffer for one device.

Each device sorts the tokens that it has. If the experts are on devices of their own (Lepikhin et al. 2020, section 3.2), tokens
and experts meet in one of two ways, whichever sends less. Shapes are static, so both have room for the worst case, and
neither drops a token:

- Every device gets all tokens of the axis, and their outputs are summed where they came from: P N D numbers each way. A token
  is sent once, however many of its experts a device has.
- An all-to-all of buffers with a place for each choice: P S D numbers each way. A buffer holds as many choices as a device's
  experts have capacity for, or all that there can be, S = N min(k, E/P). With a capacity factor c this is c k N D in all, less
  than the first way as soon as there are more than c k devices; without a limit it is never less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transformer.differentiation import with_backward
from transformer.layers.grouped_matmul import gathered_rows
from transformer.sharding import axes_size, axes_to_map, dividing_axes
from transformer.types import Array, Float, Int

Kernels = Sequence[Array | None]
Network = Callable[[Array, Array, Kernels], Array]
"""`(x_MD, sizes_E, kernels) -> out_MD`: the experts of the kernels, each on its own consecutive tokens."""


def run_experts(
    network: Network,
    x_BTD: Float[Array, "B T D"],
    experts_BTk: Int[Array, "B T k"],
    weights_BTk: Float[Array, "B T k"],
    kernels: Kernels,
    *,
    capacity: int,
) -> Float[Array, "B T D"]:
    """Each token's experts, weighted and summed; on each device's share of the tokens, experts and features.

    Args:
        experts_BTk: the expert of each choice, -1 for none.
        kernels: up [E, D, F], gate or None, and down [E, F, D].
        capacity: the most choices of a row that go to one expert.
    """
    up_EDF = kernels[0]
    assert up_EDF is not None
    E, _, F = up_EDF.shape
    mapped = axes_to_map()
    dims = {"batch": x_BTD.shape[0], "seq": x_BTD.shape[1], "expert": E, "mlp": F}
    batch, seq, expert, mlp = ((() if mapped is None else dividing_axes(*dim)) for dim in dims.items())
    if not set(expert) <= set(batch):
        # The same tokens on all devices of the experts' axis, each of which computes what its own experts add.
        batch = tuple(name for name in batch if name not in expert)
    is_split = bool(expert) and set(expert) <= set(batch)
    # Sums over these axes are left to the compiler, which knows how the result is to be laid out.
    partial = mlp if is_split else mlp + expert

    def on_device(x_BTD: Array, experts_BTk: Array, weights_BTk: Array, kernels: Kernels) -> Array:
        shape = x_BTD.shape
        tokens = _Tokens(*(x.reshape(-1, x.shape[-1]) for x in (x_BTD, experts_BTk, weights_BTk)))
        most = shape[0] * capacity
        if is_split:
            out_ND = _exchanged(network, tokens, kernels, expert, E, most)
        else:
            out_ND = _own(network, tokens, kernels, expert, E, most)
        return out_ND.reshape(1, *shape)

    if mapped is None:
        return on_device(x_BTD, experts_BTk, weights_BTk, kernels)[0]
    by_token = PartitionSpec(batch or None, seq or None, None)
    into = PartitionSpec(expert or None, None, mlp or None)
    out_of = PartitionSpec(expert or None, mlp or None, None)
    parts = jax.shard_map(
        on_device,
        in_specs=(by_token, by_token, by_token, [into, None if kernels[1] is None else into, out_of]),
        out_specs=PartitionSpec(partial or None, *by_token),
        axis_names=mapped,
        check_vma=False,
    )(x_BTD, experts_BTk, weights_BTk, list(kernels))
    return jnp.sum(parts, axis=0, dtype=parts.dtype)


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Tokens, and their choices."""

    x_ND: Array
    experts_Nk: Array
    weights_Nk: Array


def _own(
    network: Network, tokens: _Tokens, kernels: Kernels, axes: tuple[str, ...], num_experts: int, most: int
) -> Array:
    """What this device's experts add to the tokens' outputs.

    Args:
        axes: that the experts are divided over, if any.
        most: choices that one expert can get.
    """
    N, k = tokens.experts_Nk.shape
    own = num_experts // axes_size(axes)
    first = jax.lax.axis_index(axes) * own if axes else 0
    order = Order.of(_from(tokens.experts_Nk, first), own, min(N * min(k, own), own * most))
    return combine(network(dispatch(tokens.x_ND, order), order.sizes_E, kernels), tokens.weights_Nk, order)


def _exchanged(
    network: Network, tokens: _Tokens, kernels: Kernels, axes: tuple[str, ...], num_experts: int, most: int
) -> Array:
    """The outputs of tokens of which each device has its own, from experts of which each device has its own."""
    N, k = tokens.experts_Nk.shape
    P = axes_size(axes)
    own = num_experts // P
    S = min(N * min(k, own), own * most)
    if S >= N:
        with jax.named_scope("to_all_experts"):
            every = _Tokens(
                *(jax.lax.all_gather(x, axes, tiled=True) for x in (tokens.x_ND, tokens.experts_Nk, tokens.weights_Nk))
            )
        out = _own(network, every, kernels, axes, num_experts, P * most)
        with jax.named_scope("from_all_experts"):
            return jax.lax.psum_scatter(out, axes, tiled=True)
    sent = Order.of(tokens.experts_Nk, num_experts, P * S, parts=P)
    with jax.named_scope("to_experts"):
        arrived_MD = _to_each(dispatch(tokens.x_ND, sent), axes, P)
        sizes_PE = _to_each(sent.sizes_E, axes, P).reshape(P, own)
    # In each buffer the choices are consecutive and in the order of the experts.
    ends_PE = jnp.cumsum(sizes_PE, axis=1)
    experts_PS = (ends_PE[:, None] <= jnp.arange(S, dtype=jnp.int32)[:, None]).sum(-1, dtype=jnp.int32)
    order = Order.of(jnp.where(experts_PS < own, experts_PS, -1).reshape(P * S, 1), own, P * S)
    out_MD = collect(network(dispatch(arrived_MD, order), order.sizes_E, kernels), order)[:, 0]
    with jax.named_scope("from_experts"):
        return combine(_to_each(out_MD, axes, P), tokens.weights_Nk, sent)


def _to_each(x: Array, axes: tuple[str, ...], devices: int) -> Array:
    """Part i of the first dim to device i of the axis, whose parts come in the same order."""
    parts = x.reshape(devices, -1, *x.shape[1:])
    return jax.lax.all_to_all(parts, axes, 0, 0, tiled=True).reshape(x.shape)


def _from(experts: Array, first: Array | int) -> Array:
    """Experts counted from `first`; those before it become -1."""
    return jnp.maximum(experts - first, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
    """The choices of tokens, sorted by expert, in both directions. Both are gathers, and so are their gradients."""

    choices_M: Int[Array, " M"]
    """The choice in each place, counted token by token; N k where the place is empty."""
    places_Nk: Int[Array, "N k"]
    """The place of each choice; M where it has none."""
    sizes_E: Int[Array, " E"]
    """Number of choices of each expert."""

    @staticmethod
    def of(experts_Nk: Int[Array, "N k"], num_experts: int, places: int, parts: int = 1) -> Order:
        """By counting. A choice of an expert from 0 to `num_experts` - 1 has a place, any other has none.

        Args:
            places: M, enough for all choices.
            parts: into how many equal parts the places are divided; each holds the choices of equally many experts.
        """
        N, k = experts_Nk.shape
        chosen_CE = jax.nn.one_hot(experts_Nk.reshape(-1), num_experts, dtype=jnp.int32)
        until_CE = jnp.cumsum(chosen_CE, axis=0)
        sizes_E = until_CE[-1]
        sizes_PE = sizes_E.reshape(parts, -1)
        starts_P1 = jnp.arange(parts, dtype=jnp.int32)[:, None] * (places // parts)
        starts_E = (starts_P1 + jnp.cumsum(sizes_PE, axis=1) - sizes_PE).reshape(-1)
        places_C = ((starts_E + until_CE - 1) * chosen_CE).sum(1, dtype=jnp.int32)
        places_C = jnp.where(chosen_CE.any(1), places_C, places)
        choices_M = jnp.full(places, N * k, jnp.int32)
        choices_M = choices_M.at[places_C].set(jnp.arange(N * k, dtype=jnp.int32), mode="drop")
        return Order(choices_M, places_C.reshape(N, k), sizes_E)


def dispatch(x_ND: Float[Array, "N D"], order: Order) -> Float[Array, "M D"]:
    """The token in each place; zeros in an empty one."""

    def forward(x_ND: Array, order: Order) -> tuple[Array, Order]:
        return gathered_rows(x_ND, order.choices_M // order.places_Nk.shape[1]), order

    def backward(order: Order, dx_MD: Array) -> tuple[Array, None]:
        return gathered_rows(dx_MD, order.places_Nk).sum(1), None

    return with_backward(forward, backward, x_ND, order)


def collect(out_MD: Float[Array, "M D"], order: Order) -> Float[Array, "N k D"]:
    """The output for each choice; zeros for a choice without a place."""

    def forward(out_MD: Array, order: Order) -> tuple[Array, Order]:
        return gathered_rows(out_MD, order.places_Nk), order

    def backward(order: Order, dout_NkD: Array) -> tuple[Array, None]:
        return gathered_rows(dout_NkD.reshape(-1, dout_NkD.shape[-1]), order.choices_M), None

    return with_backward(forward, backward, out_MD, order)


def combine(out_MD: Float[Array, "M D"], weights_Nk: Float[Array, "N k"], order: Order) -> Float[Array, "N D"]:
    """Each token's choices, weighted and summed in the weights' type; zeros for a choice without a place."""

    def forward(out_MD: Array, weights_Nk: Array, order: Order) -> tuple[Array, tuple[Array, Array, Order]]:
        parts_NkD = gathered_rows(out_MD, order.places_Nk).astype(weights_Nk.dtype)
        total_ND = (weights_Nk[..., None] * parts_NkD).sum(1)
        return total_ND.astype(out_MD.dtype), (out_MD, weights_Nk, order)

    def backward(saved: tuple[Array, Array, Order], dy_ND: Array) -> tuple[Array, Array, None]:
        out_MD, weights_Nk, order = saved
        weights_M1 = gathered_rows(weights_Nk.reshape(-1, 1), order.choices_M)
        dout_MD = gathered_rows(dy_ND, order.choices_M // weights_Nk.shape[1]).astype(weights_Nk.dtype) * weights_M1
        dy_N1D = dy_ND[:, None].astype(weights_Nk.dtype)
        dweights_Nk = (dy_N1D * gathered_rows(out_MD, order.places_Nk).astype(weights_Nk.dtype)).sum(-1)
        return dout_MD.astype(out_MD.dtype), dweights_Nk, None

    return with_backward(forward, backward, out_MD, weights_Nk, order)
