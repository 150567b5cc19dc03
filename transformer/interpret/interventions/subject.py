"""A model to look into: which parts it has, what it reads, and where its answer is.

B batch, T position, S source position, D embed, N query heads, V vocab, C scores: tokens of the vocabulary, or classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import UserError
from transformer.hooks import Change, Hooks
from transformer.models.bert import Bert
from transformer.models.layer_stack import LayerStack, hooked, stacks_of
from transformer.types import Array, Float, Int

Edits = Mapping[str, tuple[Array | np.ndarray, Array | np.ndarray]]
"""By place: where to change the value (a mask), and to what. Both broadcast to the value; they have one row, or one per input."""
Head = tuple[str, int, int]
"""The part, the layer and the number of a head."""

TOKENS_OF_PASS = 4096
_ROWS_OF_PASS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a model reads: texts as rows, padded at their ends."""

    tokens_BT: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    """Of an encoder-decoder the target, preceded by its start token."""
    segments_BT: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    """1, and 0 for padding."""
    at_B: Int[Array, " B"] | Int[np.ndarray, " B"]
    """The position whose scores are the answer: the last one, or that of the mask."""
    targets_BT: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    """The token that each position should predict."""
    weights_BT: Float[Array, "B T"] | Float[np.ndarray, "B T"]
    """1 where there is such a token, else 0."""
    source_BS: Int[Array, "B S"] | Int[np.ndarray, "B S"] | None = None
    source_segments_BS: Int[Array, "B S"] | Int[np.ndarray, "B S"] | None = None

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]

    @property
    def has_targets(self) -> bool:
        """Whether a loss is defined."""
        return bool(np.asarray(self.weights_BT).any())

    def rows(self, start: int, count: int) -> Inputs:
        """`count` rows from `start` on, so that one program serves all chunks: after the last row come rows of padding alone,
        without targets."""
        is_row = np.arange(start, start + count) < len(self)
        taken = jax.tree.map(lambda rows: _rows(rows, start, count), self)
        source_BS = taken.source_segments_BS
        return dataclasses.replace(
            taken,
            segments_BT=taken.segments_BT * is_row[:, None],
            weights_BT=taken.weights_BT * is_row[:, None].astype(np.float32),
            source_segments_BS=None if source_BS is None else source_BS * is_row[:, None],
        )

    def repeated(self, count: int) -> Inputs:
        """All rows, `count` times."""
        return jax.tree.map(lambda rows: np.tile(rows, (count, *[1] * (rows.ndim - 1))), self)


def next_token_inputs(texts: Collection[Any]) -> Inputs:
    """Texts, as token ids, for a model that predicts each token from those before it (GPT)."""
    return _padded([np.asarray(ids) for ids in texts], [len(ids) - 1 for ids in texts], predicts=True)


def encoder_inputs(texts: Collection[Any], at: Collection[int]) -> Inputs:
    """Texts, as token ids, for an encoder, and the position of each whose scores are its answer."""
    return _padded([np.asarray(ids) for ids in texts], list(at), predicts=False)


def pair_inputs(sources: Collection[Any], targets: Collection[Any], start: int, end: int) -> Inputs:
    """Sources and what is known of their targets, as token ids, for an encoder-decoder.

    Args:
        start: the token that the decoder reads first.
        end: the token after a target; of a target that is not empty it is predicted too.
    """
    made = _padded([np.array([start, *ids]) for ids in targets], [len(ids) for ids in targets], predicts=True)
    weights_BT, targets_BT = np.array(made.weights_BT), np.array(made.targets_BT)
    for row, ids in enumerate(targets):
        if len(ids):
            weights_BT[row, len(ids)], targets_BT[row, len(ids)] = 1, end
    read = _padded([np.asarray(ids) for ids in sources], [0] * len(sources), predicts=False)
    return dataclasses.replace(
        made,
        targets_BT=targets_BT,
        weights_BT=weights_BT,
        source_BS=read.tokens_BT,
        source_segments_BS=read.segments_BT,
    )


def _padded(texts: list[np.ndarray], at: list[int], *, predicts: bool) -> Inputs:
    B, T = len(texts), max(map(len, texts))
    tokens_BT, segments_BT, targets_BT = (np.zeros((B, T), np.int32) for _ in range(3))
    weights_BT = np.zeros((B, T), np.float32)
    for row, ids in enumerate(texts):
        tokens_BT[row, : len(ids)], segments_BT[row, : len(ids)] = ids, 1
        if predicts:
            targets_BT[row, : len(ids) - 1], weights_BT[row, : len(ids) - 1] = ids[1:], 1
    return Inputs(
        tokens_BT=tokens_BT, segments_BT=segments_BT, at_B=np.array(at, np.int32), targets_BT=targets_BT,
        weights_BT=weights_BT,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """The attention of one kind in the layers of one stack."""

    name: str
    """`attention`; of an encoder-decoder `encoder.attention`, `decoder.attention` and `decoder.cross`."""
    heads: tuple[int, ...]
    """The number of heads of each layer."""
    has_distributions: tuple[bool, ...]
    """Whether each layer's weights are positive and sum to 1."""
    reads_memory: bool = False
    is_causal: bool = False

    @property
    def stack(self) -> str:
        """The prefix of the stack's places."""
        return self.name.rpartition(".")[0] + "." if "." in self.name else ""

    def place(self, layer: int, what: str) -> str:
        """The place `heads`, `weights` or `out` of a layer."""
        return f"{self.stack}layers.{layer}.{self.name.rpartition('.')[2]}.{what}"


class Subject:
    """A model as a function of inputs and edits, with its parts.

    Args:
        model: `GPT`; `Bert` with a head that scores tokens (masked) or the classes of a row; or `EncoderDecoder`.
        tokens_of_pass: about as many tokens are computed at once; a single row may have more.

    Raises:
        UserError: any other model.
    """

    def __init__(self, model: Any, *, tokens_of_pass: int = TOKENS_OF_PASS) -> None:
        self.stacks = stacks_of(model)
        config = model.config
        if not self.stacks:
            raise UserError(
                f"model.family: {config.family!r} has no blocks of attention to look into; allowed: gpt, bert, vaswani, t5"
            )
        self.config = config
        if isinstance(model, Bert) and (_head_of(model) is None or config.family != "bert"):
            raise UserError(
                f"model.head: {config.head.kind!r} gives neither scores of tokens nor of classes; allowed: masked, "
                "pretraining, classification, structured"
            )
        self.model, self._tokens_of_pass = model, tokens_of_pass
        self.scores_rows = isinstance(model, Bert) and _head_of(model) != "masked"
        """Whether the scores are those of a row's classes, not of a token at a position."""
        self.last = list(self.stacks)[-1]
        """The prefix of the stack whose stream becomes the scores."""
        self.parts = {part.name: part for part in parts_of(model)}
        self.graphdef, self.params = nnx.split(model)
        self._scored = jax.jit(self._scored_impl, static_argnames="with_loss")

    def call(self, params: nnx.State, inputs: Inputs, hooks: Hooks) -> Any:
        """The model, with hooks, after it has read the inputs. To be traced; the scores come from `readout`.

        Raises:
            ValueError: the model did not meet a place of the hooks.
        """
        model = hooked(nnx.merge(self.graphdef, params), hooks)
        if inputs.source_BS is None:
            model(inputs.tokens_BT, segments_BT=inputs.segments_BT)
        else:
            model(
                inputs.source_BS, inputs.tokens_BT, source_segments_BS=inputs.source_segments_BS,
                segments_BT=inputs.segments_BT,
            )  # fmt: skip
        hooks.check()
        return model

    def readout(self, model: Any, final_BTD: Array, segments_BT: Array) -> Float[Array, "B T C"]:
        """The scores of a stream after the final norm, in float32; of classes, T is 1."""
        if not isinstance(model, Bert):
            return model.logits(final_BTD)
        if self.scores_rows:
            valid_BT = segments_BT != 0
            if model.structured_head is not None:
                return model.structured_head(final_BTD, valid_BT)[0][:, None]
            assert model.pooled_head is not None
            return model.pooled_head(final_BTD, valid_BT)[:, None]
        assert model.masked_head is not None
        return model.masked_head(final_BTD, model.embed)[0]

    def answer_scores(self, model: Any, final_BTD: Array, inputs: Inputs) -> Float[Array, "B C"]:
        """The scores at the position of each row's answer."""
        if not self.scores_rows:
            final_BTD = jnp.take_along_axis(final_BTD, jnp.asarray(inputs.at_B)[:, None, None], axis=1)
        return self.readout(model, final_BTD, jnp.asarray(inputs.segments_BT))[:, 0]

    def kept(self, inputs: Inputs, places: Collection[str]) -> dict[str, Array]:
        """The values at some places."""

        @jax.jit
        def values(params: nnx.State, inputs: Inputs) -> dict[str, Array]:
            hooks = Hooks(keep=places)
            self.call(params, inputs, hooks)
            return hooks.kept

        return values(self.params, inputs)

    def scores(
        self, inputs: Inputs, edits: Edits | None = None, *, with_loss: bool = False
    ) -> tuple[Float[np.ndarray, "B C"], Float[np.ndarray, " B"] | None]:
        """The scores of each row's answer, and the sum of its tokens' losses in nats, with some values replaced.

        Args:
            edits: one program is compiled for each set of places, which runs on a chunk of rows at a time.
        """
        scores: list[np.ndarray] = []
        losses: list[np.ndarray] = []
        for start, own in self.chunks(inputs):
            few = {
                place: tuple(one if one.shape[0] == 1 else _rows(one, start, len(own)) for one in edit)
                for place, edit in (edits or {}).items()
            }
            scores_BC, loss_B = self._scored(self.params, own, few, with_loss=with_loss)
            scores.append(np.asarray(scores_BC))
            if loss_B is not None:
                losses.append(np.asarray(loss_B))
        B = len(inputs)
        return np.concatenate(scores)[:B], np.concatenate(losses)[:B] if losses else None

    def chunks(self, inputs: Inputs) -> Iterator[tuple[int, Inputs]]:
        """All rows in chunks of one size, with the first row of each. The last one may end with rows of padding."""
        count = -(-len(inputs) // self._rows_at_once(inputs))
        size = -(-len(inputs) // count)
        for start in range(0, len(inputs), size):
            yield start, inputs.rows(start, size)

    def _scored_impl(
        self, params: nnx.State, inputs: Inputs, edits: Edits, *, with_loss: bool
    ) -> tuple[Array, Array | None]:
        final = f"{self.last}final"
        hooks = Hooks({place: _change(*edit) for place, edit in edits.items()}, keep=(final,))
        model = self.call(params, inputs, hooks)
        final_BTD = hooks.kept[final]

        def loss_of(row: tuple[Array, ...]) -> Array:
            # One row at a time, so that the logits of one are in memory.
            hidden_TD, segments_T, targets_T, weights_T = row
            logits_TV = self.readout(model, hidden_TD[None], segments_T[None])[0]
            chosen_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]
            return jnp.sum((jax.nn.logsumexp(logits_TV, axis=-1) - chosen_T) * weights_T)

        rows = tuple(map(jnp.asarray, (inputs.segments_BT, inputs.targets_BT, inputs.weights_BT)))
        loss_B = jax.lax.map(loss_of, (final_BTD, *rows)) if with_loss else None
        return self.answer_scores(model, final_BTD, inputs), loss_B

    def rows_of_pass(self, inputs: Inputs) -> int:
        """How many variants of the inputs to compute at once."""
        return max(1, self._rows_at_once(inputs) // len(inputs))

    def _rows_at_once(self, inputs: Inputs) -> int:
        lengths = (0 if inputs.source_BS is None else inputs.source_BS.shape[1]) + inputs.tokens_BT.shape[1]
        return max(1, min(_ROWS_OF_PASS, self._tokens_of_pass // lengths))

    def all_heads(self) -> list[Head]:
        """Every head, by part, layer and number."""
        return [
            (part.name, layer, head)
            for part in self.parts.values()
            for layer, count in enumerate(part.heads)
            for head in range(count)
        ]

    def chosen_heads(self, heads: Collection[tuple[Any, ...]]) -> list[Head]:
        """Heads given as (layer, head), or (part, layer, head), in full. Raises `UserError` for one that does not exist."""
        found = []
        for given in heads:
            full = (next(iter(self.parts)), *given) if len(given) == 2 and len(self.parts) == 1 else tuple(given)
            if len(full) != 3 or full[0] not in self.parts:
                form = "(layer, head)" if len(self.parts) == 1 else "(part, layer, head)"
                raise UserError(f"heads: got {given}; allowed: {form}, with part one of {', '.join(self.parts)}")
            name, layer, head = full
            counts = self.parts[name].heads
            if not 0 <= layer < len(counts):
                raise UserError(f"heads: got layer {layer}; allowed: 0 to {len(counts) - 1}")
            if not 0 <= head < counts[layer]:
                raise UserError(f"heads: got head {head} of layer {layer}; allowed: 0 to {counts[layer] - 1}")
            found.append((name, int(layer), int(head)))
        if not found:
            raise UserError("heads: got none; give at least one (layer, head)")
        return found

    def tables(self, values: Mapping[Head, float]) -> dict[str, np.ndarray]:
        """Values of heads as a table [layers, heads] for each part; nan where there is no value."""
        tables = {part.name: np.full((len(part.heads), max(part.heads)), np.nan) for part in self.parts.values()}
        for (name, layer, head), value in values.items():
            tables[name][layer, head] = value
        return tables


def _rows(rows: Array | np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` rows from `start` on; after the last one comes the first one again."""
    numbers = np.arange(start, start + count)
    return np.asarray(rows)[np.where(numbers < len(rows), numbers, 0)]


def _change(mask: Array | np.ndarray, value: Array | np.ndarray) -> Change:
    return lambda old: jnp.where(mask, jnp.asarray(value).astype(old.dtype), old)


def _head_of(model: Bert) -> str | None:
    if model.masked_head is not None:
        return "masked"
    pooled = model.pooled_head is not None and model.config.head.kind == "classification"
    return "classes" if pooled or model.structured_head is not None else None


def parts_of(model: Any) -> list[Part]:
    """The parts of a model, or of its description; none of a recurrent one."""
    return [part for prefix, stack in stacks_of(model).items() for part in _parts(prefix, stack)]


def _parts(prefix: str, stack: LayerStack) -> list[Part]:
    heads = tuple(getattr(mixer, "num_heads", 1) for mixer in stack.mixers)
    parts = [Part(f"{prefix}attention", heads, tuple(mixer.has_distributions for mixer in stack.mixers),
                  is_causal=stack.is_causal)]  # fmt: skip
    if prefix == "decoder.":
        cross = stack.config.cross_attention.num_heads
        parts.append(Part(f"{prefix}cross", (cross,) * len(heads), (True,) * len(heads), reads_memory=True))
    return parts


def answer_and_instead(
    scores_C: Float[np.ndarray, " C"],
    answer: int | None,
    instead: int | None,
    other_C: Float[np.ndarray, " C"] | None = None,
) -> tuple[int, int]:
    """The two answers to compare, with defaults: the likeliest one; and the likeliest other one, of `other_C` if given."""
    first = int(np.argmax(scores_C)) if answer is None else answer
    if instead is not None:
        if instead == first:
            raise UserError("instead: it is the answer itself; give another one")
        return first, instead
    others = np.array(scores_C if other_C is None else other_C)
    others[first] = -np.inf
    return first, int(np.argmax(others))
