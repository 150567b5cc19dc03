"""What recurrent encoders and decoders are made of: GRU and LSTM cells, a scan over a sequence, attention step by step.

B batch, T position, S source position, I input features, D hidden_dim, G all gates' features (3 D of a GRU, 4 D of an LSTM),
E features of an encoder state, A alignment features, M features and V value features of fast weights.

What depends on the input alone is one product for the whole sequence, before the scan; inside it are only the products
with the state, which is kept in float32 or wider, whatever the products are computed in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.additive import additive_scores
from transformer.attention.common import check_name, context, softmax
from transformer.attention.fast_weights import fast_weights
from transformer.attention.feature_maps import dpfp, elu_plus_one, unit_length
from transformer.attention.hard import argmax_weights, gumbel_weights
from transformer.attention.mask import AttentionMask
from transformer.attention.multiplicative import dot_scores, local_weights, predicted_positions
from transformer.layers.linear import Linear, dense
from transformer.precision import einsum
from transformer.types import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, wide, widen

KINDS = ("none", "additive", "dot", "general", "concat", "local_m", "local_p", "hard", "linear", "delta")
"""How a decoder may look at its source."""
ADDITIVE = ("additive", "concat", "hard")
"""Kinds of attention whose score is vᵀ tanh(W q + U k)."""
GENERAL = ("general", "local_m", "local_p")
"""Kinds whose score is qᵀ W k."""
FAST = ("linear", "delta")
"""Kinds that read a memory of fixed size."""

CellState = tuple[Array, ...]
"""[B, D] each: (h,) of a GRU, (h, c) of an LSTM. The first is the cell's output."""


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
    enter_BD, keep_BD, leave_BD = gates_BG[:, :D], gates_BG[:, D : 2 * D], gates_BG[:, 2 * D :]
    memory = (keep_BD * memory_BD + enter_BD * jnp.tanh(sums_BG[:, 3 * D :])).astype(memory_BD.dtype)
    return (leave_BD * jnp.tanh(memory)).astype(state_BD.dtype), memory


class Cell(nnx.Module):
    """What the two cells share: the product with the input, for a whole sequence at once.

    Args:
        input_dim, hidden_dim: I and D.
        kernel_init: of the input's kernel; those of the state start orthogonal, gate by gate (Saxe et al. 2014).
    """

    num_gates = 0
    """Linear maps of the input."""
    num_states = 0
    """Arrays that make the state."""

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
        """The input's part of every gate, which depends on no state."""
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
"""Cells by name."""


def scan_cell(
    cell: Cell,
    x_BTI: Float[Array, "B T I"],
    state: CellState,
    *,
    valid_BT: Bool[Array, "B T"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "B T D"], CellState]:
    """Run a cell along a sequence, or from its end to its start.

    Args:
        valid_BT: a position that is not valid leaves the state as it was, exactly, in either direction.

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
    """Of two trees with leading B, the new one's rows where valid, the old one's elsewhere."""
    if valid_B is None:
        return new
    return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(valid_B, range(1, a.ndim)), a, b), new, old)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """An encoder's states, and what attention made of them once for all queries."""

    valid_BS: Bool[Array, "B S"]
    states_BSE: Float[Array, "B S E"]
    """The annotations of Bahdanau et al. 2014."""
    summary_BE: Float[Array, "B E"]
    """The last state: of each direction, the one that has read everything."""
    keys_BSA: Float[Array, "B S A"] | None
    """What scores the states, where that depends on no query."""
    fast_BMV: Float[Array, "B M V"] | None
    """Fast weights that all the states have written."""


class SourceAttention(nnx.Module):
    """A recurrent decoder's attention to its encoder's states, one query at a time.

    Args:
        kind: one of `KINDS`: `none` gives the last state to every query, `local_m` and `local_p` score as `general` does, `hard`
            as `additive`; `linear` and `delta` read a memory of fixed size that the states have written.
        query_dim, memory_dim, attention_dim: D, E and A.
        window: to each side, of local attention.
        temperature: of the relaxed draw whose gradient hard attention takes.

    Raises:
        ValueError: an unknown kind, or `dot` of a query and states of different widths.
    """

    def __init__(
        self,
        kind: str,
        query_dim: int,
        memory_dim: int,
        attention_dim: int,
        *,
        window: int = 10,
        temperature: float = 1.0,
        kernel_init: Callable[..., Array],
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_name("SourceAttention", "kind", kind, KINDS)
        if kind == "dot" and query_dim != memory_dim:
            raise ValueError(
                f"SourceAttention: query_dim={query_dim} and memory_dim={memory_dim}; dot needs them equal"
            )
        self.kind, self.window, self.temperature = kind, window, temperature
        D, E, A = query_dim, memory_dim, attention_dim

        def project(size: int, *out_shape: int, use_bias: bool = False, dtype: DTypeLike = dtype) -> Linear:
            return Linear(
                (size,), out_shape, axes=("embed", "mlp") if out_shape else ("mlp",), use_bias=use_bias,
                kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        keyed = kind in ADDITIVE + FAST
        self.query = (
            project(D, A, use_bias=kind in ("additive", "hard"))
            if keyed
            else project(D, E) if kind in GENERAL else None
        )  # fmt: skip
        self.key = project(E, A) if keyed else None
        self.vector = project(A) if kind in ADDITIVE else None
        # Among hundreds of states a position in a narrow type would be off by a good part of the window.
        self.position = project(D, A, dtype=wide(dtype)) if kind == "local_p" else None
        self.position_vector = project(A) if kind == "local_p" else None
        self.strength = project(E, 1, use_bias=True) if kind == "delta" else None

    def prepare(
        self, states_BSE: Float[Array, "B S E"], valid_BS: Bool[Array, "B S"], summary_BE: Float[Array, "B E"]
    ) -> Source:
        """What the decoder reads at each step, with everything that depends on no query."""
        if self.key is None:
            return Source(valid_BS, states_BSE, summary_BE, None, None)
        keys_BSA = self.key(states_BSE)
        if self.kind not in FAST:
            return Source(valid_BS, states_BSE, summary_BE, keys_BSA, None)
        values_BS1V, strength_BS1, rule = widen(states_BSE)[:, :, None], None, "delta"
        if self.strength is None:
            # A value of 1 beside the others sums what the weights are divided by.
            rule = "sum"
            values_BS1V = jnp.concatenate([values_BS1V, jnp.ones_like(values_BS1V[..., :1])], axis=-1)
        else:
            strength_BS1 = jax.nn.sigmoid(widen(self.strength(states_BSE)))
        keys_BS1A = keys_BSA[:, :, None]
        # Every state writes, and no query reads yet.
        _, fast_B1MV = fast_weights(
            keys_BS1A[:, :, :0], keys_BS1A, values_BS1V, strength_BS1, rule=rule, feature_map=self._features,
            valid_BT=valid_BS,
        )  # fmt: skip
        return Source(valid_BS, states_BSE, summary_BE, keys_BSA, fast_B1MV[:, 0])

    def __call__(
        self,
        query_BD: Float[Array, "B D"],
        source: Source,
        step_B: Int[Array, " B"],
        *,
        key: PRNGKeyArray | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B S"] | None]:
        """The context, and the weights where they are asked for and exist.

        Args:
            step_B: the number of the query, for local_m.
            key: draws the state that hard attention takes; without one it is the likeliest.
        """
        if self.kind == "none":
            return source.summary_BE, None
        with jax.named_scope("source_attention"):
            if source.fast_BMV is not None:
                return self._recall(query_BD, source, return_weights)
            query_B1D, states_BSE, allowed_B1S = query_BD[:, None], source.states_BSE, source.valid_BS[:, None]
            queries = query_B1D if self.query is None else self.query(query_B1D)
            if source.keys_BSA is not None and self.vector is not None:
                scores_B1S = additive_scores(queries, source.keys_BSA, self.vector.kernel[...])
            else:
                scores_B1S = dot_scores(queries, states_BSE)
            if self.kind == "hard":
                weights_B1S = (
                    argmax_weights(scores_B1S, allowed_B1S)
                    if key is None
                    else gumbel_weights(scores_B1S, allowed_B1S, key=key, temperature=self.temperature)
                )
            elif self.kind == "local_m":
                mask = AttentionMask.padding(source.valid_BS)
                weights_B1S = local_weights(scores_B1S, step_B[:, None], self.window, mask)
            elif self.position is not None and self.position_vector is not None:
                centres_B1 = predicted_positions(
                    self.position(widen(query_B1D)), self.position_vector.kernel[...], source.valid_BS.sum(-1)
                )
                mask = AttentionMask.padding(source.valid_BS)
                weights_B1S = local_weights(scores_B1S, centres_B1, self.window, mask, gaussian=True)
            else:
                weights_B1S = softmax(scores_B1S, allowed_B1S)
            return context(weights_B1S, states_BSE)[:, 0], weights_B1S[:, 0] if return_weights else None

    def _recall(self, query_BD: Array, source: Source, return_weights: bool) -> tuple[Array, Array | None]:
        """What the query reads from the fast weights. Only linear attention's weights are a distribution."""
        assert self.query is not None and source.fast_BMV is not None and source.keys_BSA is not None
        fast_BMV = source.fast_BMV
        query_BM = self._features(widen(self.query(query_BD)))
        read_BV = einsum("BM,BMV->BV", query_BM, fast_BMV)
        if self.strength is not None:
            return read_BV.astype(source.states_BSE.dtype), None
        sums_B1 = read_BV[:, -1:] + 1e-6
        weights_BS = None
        if return_weights:
            scores_BS = einsum("BM,BSM->BS", query_BM, self._features(widen(source.keys_BSA)))
            weights_BS = jnp.where(source.valid_BS, scores_BS, 0) / sums_B1
        return (read_BV[:, :-1] / sums_B1).astype(source.states_BSE.dtype), weights_BS

    def _features(self, x: Array) -> Array:
        # The scale before the map goes out behind it; what starts small is not to fall below the guard of the division there.
        return unit_length(dpfp(unit_length(x))) if self.kind == "delta" else elu_plus_one(x)


def _product(x_BD: Array, kernel_DG: Array) -> Array:
    return widen(dense(x_BD.astype(kernel_DG.dtype), kernel_DG, None))


def _orthogonal_gates(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """A square orthogonal matrix a gate, side by side."""
    init, (rows, columns) = nnx.initializers.orthogonal(), shape
    return jnp.concatenate(
        [init(gate_key, (rows, rows), dtype) for gate_key in jax.random.split(key, columns // rows)], axis=1
    )
