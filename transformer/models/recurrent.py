"""Translation before the Transformer: a recurrent encoder, and a recurrent decoder that attends to its states.

B batch, T target position, S source position, I embed_dim, D hidden_dim, E features of an encoder state, A alignment features,
G all gates' features of a cell, V vocab.

    Cho et al. 2014, Sutskever et al. 2014: the source is one vector (attention of kind none)
    Bahdanau et al. 2014: the decoder's state before a step attends to the source (style: bahdanau)
    Luong et al. 2015: its state after the step does (style: luong)

The decoder computes one query at a time, since each attention depends on the previous ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.alignment.multiplicative import attentional_state
from transformer.alignment.registry import make_alignment
from transformer.alignment.source import Source
from transformer.layers.embedding import Embedding
from transformer.layers.linear import Linear
from transformer.layers.recurrent import CELLS, CellState, scan_cell, where_valid
from transformer.loss import Projection
from transformer.models.embed import projection_of
from transformer.models.recurrent_config import RecurrentConfig
from transformer.randomness import dropout, split
from transformer.sharding import constrain
from transformer.types import DTYPES, Array, Float, Int, Keys, ModelOutput, wide, widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentMemory:
    """The encoded source, as the decoder reads it. Every array has a leading B."""

    initial: tuple[CellState, ...]
    """State of each decoder layer before the first token."""
    source: Source


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """The state of a decoder between two tokens. Every array has a leading B."""

    layers: tuple[CellState, ...]
    fed_BD: Float[Array, "B D"] | None
    """The attentional state of the previous step, with input feeding."""
    step_B: Int[Array, " B"]
    """How many tokens were read."""


class RecurrentTranslator(nnx.Module):
    """A recurrent encoder-decoder.

    Each row must hold one sentence: packed rows would carry a state from one to the next.
    """

    def __init__(self, config: RecurrentConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        init = nnx.initializers.normal(c.init_std)
        options: dict[str, Any] = {"kernel_init": init, "dtype": DTYPES[c.dtype], "rngs": rngs}
        tables: dict[str, Any] = {"init": init, "dtype": DTYPES[c.dtype], "rngs": rngs}
        self.source_embed = Embedding(c.source_vocab_size, c.embed_dim, **tables)
        self.embed = Embedding(c.vocab_size, c.embed_dim, **tables)

        cell, layers = CELLS[c.cell], range(c.num_layers)

        def encoder() -> nnx.List:
            sizes = [c.embed_dim if layer == 0 else c.memory_dim for layer in layers]
            return nnx.List([cell(size, c.dim_of_encoder, **options) for size in sizes])

        self.forward_cells = encoder()
        self.backward_cells = encoder() if c.bidirectional else None
        self.bridge = (
            None
            if c.copies_states
            else Linear(
                (c.bridge_dim,), (c.num_layers * cell.num_states * c.hidden_dim,), axes=("embed", "mlp"), **options
            )
        )
        self.attention = make_alignment(c.attention, c.hidden_dim, c.memory_dim, **options)
        self.cells = nnx.List(
            [cell(c.embed_dim if layer == 0 else c.hidden_dim, c.hidden_dim, **options) for layer in layers]
        )
        # The first layer's input is the token and the fed-back state. They have separate products, so that the token's is
        # computed for all steps at once.
        self.feed = (
            Linear(
                (c.fed_dim,), (cell.num_gates * c.hidden_dim,), axes=("embed", "mlp"), use_bias=False, **options
            )
            if c.fed_dim
            else None
        )  # fmt: skip
        out_dim = c.hidden_dim if c.style == "luong" else c.embed_dim * (2 if c.readout == "maxout" else 1)
        self.combine = Linear(
            (c.combined_dim,), (out_dim,), axes=("mlp", "embed"), use_bias=c.style == "bahdanau", **options
        )
        head_dim = c.hidden_dim if c.style == "luong" else c.embed_dim
        self.head = Linear((head_dim,), (c.vocab_size,), axes=("embed", "vocab"), **options)

    def encode(
        self,
        source_tokens_BS: Int[Array, "B S"],
        *,
        source_segments_BS: Int[Array, "B S"] | None = None,
        source_positions_BS: Int[Array, "B S"] | None = None,
        key: Keys | None = None,
    ) -> RecurrentMemory:
        """Encode sources.

        Args:
            source_tokens_BS: token ids below source_vocab_size.
            source_segments_BS: 1 for a token and 0 for padding, which follows the tokens and has no influence.
            source_positions_BS: ignored: a recurrent model uses only the order.
            key: enables dropout.

        Raises:
            ValueError: packed rows, with a segment above 1. Traced segments are not checked: 2 counts as 1 there.
        """
        c = self.config
        _refuse_packed("source_segments", source_segments_BS)
        B, S = source_tokens_BS.shape
        valid_BS = jnp.ones((B, S), bool) if source_segments_BS is None else source_segments_BS != 0
        keys = [None] * c.num_layers if key is None else list(split(key, c.num_layers))
        finals: list[list[CellState]] = []
        with jax.named_scope("encoder"):
            x_BSE = constrain(self.source_embed(source_tokens_BS), "batch", "seq", None)
            for layer, layer_key in enumerate(keys):
                x_BSE = dropout(x_BSE, c.dropout, layer_key)
                cells = [self.forward_cells[layer]]
                if self.backward_cells is not None:
                    cells.append(self.backward_cells[layer])
                outputs, states = zip(
                    *(
                        scan_cell(cell, x_BSE, cell.empty_state(B), valid_BT=valid_BS, reverse=reverse)
                        for cell, reverse in zip(cells, (False, True), strict=False)
                    ),
                    strict=True,
                )
                x_BSE = jnp.concatenate(outputs, axis=-1)
                finals.append(list(states))
        summary_BE = jnp.concatenate([state[0] for state in finals[-1]], axis=-1)
        source = self.attention.prepare(x_BSE, valid_BS, summary_BE.astype(x_BSE.dtype))
        return RecurrentMemory(self._initial(finals, summary_BE), source)

    def _initial(self, finals: list[list[CellState]], summary_BE: Array) -> tuple[CellState, ...]:
        """The decoder's first state: the encoder's last one, layer by layer, or a learned function of it.

        s_0 = tanh(W_s h←_1) in Bahdanau et al. 2014, appendix A.2.2.
        """
        if self.bridge is None:
            return tuple(
                tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*directions, strict=True))
                for directions in finals
            )
        source = finals[-1][-1][0] if self.config.style == "bahdanau" else summary_BE
        states = widen(jnp.tanh(self.bridge(source)))
        num_states = CELLS[self.config.cell].num_states
        parts = jnp.split(states, self.config.num_layers * num_states, axis=-1)
        return tuple(tuple(parts[start : start + num_states]) for start in range(0, len(parts), num_states))

    def begin(self, memory: RecurrentMemory, max_length: int) -> RecurrentState:
        """The state before the first token. Its size does not depend on `max_length`."""
        c = self.config
        B = memory.source.valid_BS.shape[0]
        fed_BD = jnp.zeros((B, c.hidden_dim), wide(DTYPES[c.dtype])) if c.style == "luong" and c.input_feeding else None
        return RecurrentState(memory.initial, fed_BD, jnp.zeros(B, jnp.int32))

    def step(
        self,
        token_B: Int[Array, " B"],
        state: RecurrentState,
        memory: RecurrentMemory,
        *,
        return_weights: bool = False,
    ) -> tuple[Any, ...]:
        """One token more: the logits [B, V] of the next one, float32, and the state; with `return_weights` the weights
        [B, S] too, or None for attention that has none."""
        embedded_BI = self.embed(token_B)
        state, features, weights_BS = self._advance(
            self.cells[0].project(embedded_BI), state, memory, None, return_weights=return_weights
        )
        logits_BV = self._logits(self._readout(embedded_BI, features, None))
        return (logits_BV, state, weights_BS) if return_weights else (logits_BV, state)

    def __call__(
        self,
        source_tokens_BS: Int[Array, "B S"],
        tokens_BT: Int[Array, "B T"],
        *,
        source_segments_BS: Int[Array, "B S"] | None = None,
        source_positions_BS: Int[Array, "B S"] | None = None,
        source_lengths_BM: Int[Array, "B M"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        lengths_BM: Int[Array, "B M"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        key: Keys | None = None,
        return_weights: bool = False,
    ) -> ModelOutput:
        """Scores of each next token of the targets (teacher forcing).

        Args:
            source_tokens_BS, source_segments_BS, source_positions_BS: as for `encode`.
            tokens_BT: target tokens, from the start token on.
            segments_BT: 1 for a token and 0 for padding, which has no influence.
            positions_BT, source_lengths_BM, lengths_BM: ignored.
            key: enables dropout, and the random draws of hard attention.
            return_weights: also return the weights, [1, B, 1, T, S], of attention that has them: not of `none` and `delta`.

        Raises:
            ValueError: packed rows, as in `encode`.
        """
        _refuse_packed("segments", segments_BT)
        encode_key, embed_key, step_key, out_key = (None,) * 4 if key is None else split(key, 4)
        memory = self.encode(source_tokens_BS, source_segments_BS=source_segments_BS, key=encode_key)
        T = tokens_BT.shape[1]

        def body(state: RecurrentState, inputs: tuple[Array, Array | None, Array | None]) -> tuple[RecurrentState, Any]:
            inputs_BG, valid_B, key = inputs
            after, features, weights_BS = self._advance(inputs_BG, state, memory, key, return_weights=return_weights)
            return where_valid(valid_B, after, state), (features, weights_BS)

        if self.config.remat == "full":
            # Under a scan the barrier against common subexpressions is not needed, and costs fusions.
            body = jax.checkpoint(body, prevent_cse=False)
        with jax.named_scope("decoder"):
            embedded_BTI = constrain(self.embed(tokens_BT), "batch", "seq", None)
            embedded_BTI = dropout(embedded_BTI, self.config.dropout, embed_key)
            inputs_TBG = self.cells[0].project(jnp.moveaxis(embedded_BTI, 1, 0))
            valid_TB = None if segments_BT is None else (segments_BT != 0).T
            keys_T = None if step_key is None else split(step_key, T)
            _, (features, weights_TBS) = jax.lax.scan(body, self.begin(memory, T), (inputs_TBG, valid_TB, keys_T))
        features = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), features)
        hidden_BTD = self._readout(embedded_BTI, features, out_key)
        logits_BTV = constrain(self._logits(hidden_BTD), "batch", "seq", "vocab")
        weights = None if weights_TBS is None else jnp.moveaxis(weights_TBS, 0, 1)[None, :, None]
        return ModelOutput(logits=logits_BTV, hidden=hidden_BTD, weights=weights)

    def projection(self) -> Projection:
        """What turns the output's `hidden` into its `logits`."""
        return projection_of(self.embed, self.head)

    def _advance(
        self,
        inputs_BG: Array,
        state: RecurrentState,
        memory: RecurrentMemory,
        key: Array | None,
        *,
        return_weights: bool,
    ) -> tuple[RecurrentState, tuple[Array, ...], Array | None]:
        """One step of the decoder from the token's projected embedding: the next state, the features for the output, and
        the weights."""
        c = self.config
        attend_key, *layer_keys = [None] * c.num_layers if key is None else split(key, c.num_layers)
        fed = state.fed_BD
        if c.style == "bahdanau":
            context_BE, weights_BS = self.attention(
                state.layers[-1][0], memory.source, state.step_B, key=attend_key, return_weights=return_weights
            )
            fed = context_BE
        if self.feed is not None and fed is not None:
            inputs_BG = inputs_BG + self.feed(fed)
        layers: list[CellState] = []
        for cell, old, layer_key in zip(self.cells, state.layers, [None, *layer_keys], strict=True):
            if layers:
                inputs_BG = cell.project(dropout(layers[-1][0], c.dropout, layer_key))
            layers.append(cell.step(inputs_BG, old))
        hidden_BD = layers[-1][0]
        if c.style == "bahdanau":
            features: tuple[Array, ...] = (hidden_BD, context_BE)
        else:
            context_BE, weights_BS = self.attention(
                hidden_BD, memory.source, state.step_B, key=attend_key, return_weights=return_weights
            )
            features = (attentional_state(context_BE[:, None], hidden_BD[:, None], self.combine)[:, 0],)
        fed_BD = None if state.fed_BD is None else features[0].astype(state.fed_BD.dtype)
        return RecurrentState(tuple(layers), fed_BD, state.step_B + 1), features, weights_BS

    def _readout(self, embedded: Array, features: tuple[Array, ...], key: Array | None) -> Array:
        """What the output projection reads: the attentional state, or a deep output of embedding, state and context.

        p(y_i) = g(y_i-1, s_i, c_i) is equation 4 of Bahdanau et al. 2014, g a layer of maxout units in appendix A.2.2.
        """
        with jax.named_scope("readout"):
            if self.config.style == "luong":
                (x,) = features
            else:
                hidden, seen = (x.astype(embedded.dtype) for x in features)
                x = self.combine(jnp.concatenate([hidden, embedded, seen], axis=-1))
                x = x.reshape(*x.shape[:-1], -1, 2).max(-1) if self.config.readout == "maxout" else jnp.tanh(x)
            return dropout(x, self.config.dropout, key)

    def _logits(self, hidden: Array) -> Array:
        """[..., V] float32."""
        with jax.named_scope("logits"):
            return self.head.logits(hidden).astype(jnp.float32)


def flops_per_token(config: RecurrentConfig, length: int) -> float:
    """Floating-point operations of one target token's forward pass, for a source and a target of `length` tokens each, so
    with those of one source token; a training step takes three times that.

    A multiply-add counts as two. Counted: every matrix product, the output projection, and attention's scores and mean over
    the states that are seen: local attention's window at its width. Not counted: lookups, gates, activations, softmax, the
    decoder's first state, and whatever rematerialisation repeats.
    """
    c = config
    gates = CELLS[c.cell].num_gates
    D, E, H, embed = c.hidden_dim, c.memory_dim, c.dim_of_encoder, c.embed_dim
    directions = 2 if c.bidirectional else 1
    encoder = directions * gates * H * (embed + (c.num_layers - 1) * E + c.num_layers * H)
    decoder = gates * D * (embed + c.fed_dim + (c.num_layers - 1) * D + c.num_layers * D)
    if c.style == "luong":
        out, head_dim = D, D
    else:
        out, head_dim = embed * (2 if c.readout == "maxout" else 1), embed
    attention = c.attention.flops(D, E, length)
    return 2.0 * (encoder + decoder + c.combined_dim * out + head_dim * c.vocab_size) + attention


def _refuse_packed(name: str, segments: Array | None) -> None:
    if segments is None or isinstance(segments, jax.core.Tracer):
        return
    # With NumPy, since under tracing even the maximum of a concrete array is traced.
    if (most := int(np.asarray(segments).max(initial=0))) > 1:
        raise ValueError(f"{name}: got segment {most}; a recurrent model takes unpacked rows: 1, and 0 for padding")
