"""Building blocks of recurrent encoders and decoders: GRU and LSTM cells, and a scan over a sequence.

B batch, T position, I input features, D hidden_dim, G features of all gates (3 D for a GRU, 4 D for an LSTM).

The part that depends only on the input is one product for the whole sequence, before the scan; the scan computes only the
products with the state, which is kept in float32 or wider, whatever type the products are computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.layers.linear import Linear, dense
from transformer.types import Array, Bool, DTypeLike, Float, PRNGKeyArray, wide, widen

CellState = tuple[Array, ...]
"""[B, D] each: (h,) for a GRU, (h, c) for an LSTM. The first is the cell's output."""


def gru_step(
    inputs_BG: Float[Array, "B G"],
    state_BD: Float[Array, "B D"],
    gates_DG: Float[Array, "D G_"],
    candidate_DD: Float[Array, "D D"],
) -> Float[Array, "B D"]:
    """The next state of a gated recurrent unit (Cho et al. 2014; Bahdanau et al. 2014, appendix A.1.1).

        r = σ(W_r x + U_r h),  z = σ(W_z x + U_z h)
        h̃ = tanh(W x + U (r ∘ h))
        h' = (1 - z) ∘ h + z ∘ h̃

    Args:
        inputs_BG: [W_r x; W_z x; W x] with their biases.
        gates_DG: [U_r; U_z], as [D, 2 D].
        candidate_DD: U.
    """
    D = state_BD.shape[-1]
    inputs_BG = widen(inputs_BG)
    gates_BG = jax.nn.sigmoid(inputs_BG[:, : 2 * D] + _product(state_BD, gates_DG))
    reset_BD, update_BD = gates_BG[:, :D], gates_BG[:, D:]
    new_BD = jnp.tanh(inputs_BG[:, 2 * D :] + _product(reset_BD * state_BD, candidate_DD))
    return (state_BD + update_BD * (new_BD - state_BD)).astype(state_BD.dtype)


def lstm_step(
    inputs_BG: Float[Array, "B G"],
    state_BD: Float[Array, "B D"],
    memory_BD: Float[Array, "B D"],
    gates_DG: Float[Array, "D G"],
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """The next state h and memory c of a long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

        i, f, o = σ(W x + U h),  g = tanh(W_g x + U_g h)
        c' = f ∘ c + i ∘ g
        h' = o ∘ tanh(c')                                Zaremba et al. 2014, section 3

    Args:
        inputs_BG: W x with its bias, for i, f, o and g in this order.
        gates_DG: U, in the same order.
    """
    D = state_BD.shape[-1]
    sums_BG = widen(inputs_BG) + _product(state_BD, gates_DG)
    gates_BG = jax.nn.sigmoid(sums_BG[:, : 3 * D])
    input_BD, forget_BD, output_BD = gates_BG[:, :D], gates_BG[:, D : 2 * D], gates_BG[:, 2 * D :]
    memory = (forget_BD * memory_BD + input_BD * jnp.tanh(sums_BG[:, 3 * D :])).astype(memory_BD.dtype)
    return (output_BD * jnp.tanh(memory)).astype(state_BD.dtype), memory


class Cell(nnx.Module):
    """What both cells share: the product with the input, for a whole sequence at once.

    Args:
        input_dim, hidden_dim: I and D.
        kernel_init: of the input's kernel; the state's kernels are initialised as orthogonal, gate by gate (Saxe et al. 2014).
    """

    num_gates = 0
    """Number of gates, each of which has a linear layer of the input."""
    num_states = 0
    """Number of arrays in the state."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        kernel_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.hidden_dim = hidden_dim
        self.dtype = dtype
        self.input = Linear(
            (input_dim,), (self.num_gates * hidden_dim,), axes=("embed", "mlp"), kernel_init=kernel_init, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def _recurrent(self, num_gates: int, param_dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
        return Linear(
            (self.hidden_dim,), (num_gates * self.hidden_dim,), axes=("embed", "mlp"), use_bias=False,
            kernel_init=_orthogonal_gates, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def project(self, x: Float[Array, "*dims I"]) -> Float[Array, "*dims G"]:
        """The input's contribution to every gate, which does not depend on the state."""
        return self.input(x)

    def step(self, inputs_BG: Float[Array, "B G"], state: CellState) -> CellState:
        """The next state, from a projected input."""
        raise NotImplementedError

    def empty_state(self, batch_size: int) -> CellState:
        """Zeros: the state before the first position."""
        return (jnp.zeros((batch_size, self.hidden_dim), wide(self.dtype)),) * self.num_states


class GRUCell(Cell):
    """`gru_step` with its parameters."""

    num_gates, num_states = 3, 1

    def __init__(
        self, input_dim: int, hidden_dim: int, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **options: Any
    ) -> None:
        super().__init__(input_dim, hidden_dim, param_dtype=param_dtype, rngs=rngs, **options)
        self.gates = self._recurrent(2, param_dtype, rngs)
        self.candidate = self._recurrent(1, param_dtype, rngs)

    def step(self, inputs_BG: Float[Array, "B G"], state: CellState) -> CellState:
        """(h',) from (h,)."""
        (hidden_BD,) = state
        gates_DG, candidate_DD = (linear.kernel[...].astype(self.dtype) for linear in (self.gates, self.candidate))
        return (gru_step(inputs_BG, hidden_BD, gates_DG, candidate_DD),)


class LSTMCell(Cell):
    """`lstm_step` with its parameters. The forget gate's bias starts at 1 (Jozefowicz et al. 2015)."""

    num_gates, num_states = 4, 2

    def __init__(
        self, input_dim: int, hidden_dim: int, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **options: Any
    ) -> None:
        super().__init__(input_dim, hidden_dim, param_dtype=param_dtype, rngs=rngs, **options)
        self.gates = self._recurrent(4, param_dtype, rngs)
        bias = self.input.bias
        assert bias is not None
        bias.set_value(bias[...].at[hidden_dim : 2 * hidden_dim].set(1))

    def step(self, inputs_BG: Float[Array, "B G"], state: CellState) -> CellState:
        """(h', c') from (h, c)."""
        hidden_BD, memory_BD = state
        return lstm_step(inputs_BG, hidden_BD, memory_BD, self.gates.kernel[...].astype(self.dtype))


CELLS: dict[str, type[Cell]] = {"gru": GRUCell, "lstm": LSTMCell}
"""Recurrent cells by name."""


def scan_cell(
    cell: Cell,
    x_BTI: Float[Array, "B T I"],
    state: CellState,
    *,
    valid_BT: Bool[Array, "B T"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "B T D"], CellState]:
    """Run a cell over a sequence, forward or in reverse.

    Args:
        valid_BT: a position that is not valid leaves the state exactly as it was, in either direction.

    Returns:
        The output at each position, in the cell's type, and the state after the last position (the first, in reverse).
    """

    def body(state: CellState, inputs: tuple[Array, Array | None]) -> tuple[CellState, Array]:
        inputs_BG, valid_B = inputs
        state = where_valid(valid_B, cell.step(inputs_BG, state), state)
        return state, state[0].astype(cell.dtype)

    with jax.named_scope("recurrent"):
        inputs_TBG = cell.project(jnp.moveaxis(x_BTI, 1, 0))
        state, out_TBD = jax.lax.scan(
            body, state, (inputs_TBG, None if valid_BT is None else valid_BT.T), reverse=reverse
        )
        return jnp.moveaxis(out_TBD, 0, 1), state


def where_valid(valid_B: Bool[Array, " B"] | None, new: Any, old: Any) -> Any:
    """The new tree's rows where valid, the old tree's rows elsewhere; the arrays of both have a leading B."""
    if valid_B is None:
        return new
    return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(valid_B, range(1, a.ndim)), a, b), new, old)


def _product(x_BD: Array, kernel_DG: Array) -> Array:
    return widen(dense(x_BD.astype(kernel_DG.dtype), kernel_DG, None))


def _orthogonal_gates(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """A square orthogonal matrix for each gate, concatenated."""
    init, (rows, columns) = nnx.initializers.orthogonal(), shape
    return jnp.concatenate(
        [init(gate_key, (rows, rows), dtype) for gate_key in jax.random.split(key, columns // rows)], axis=1
    )
