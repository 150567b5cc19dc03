"""Ablation: what a model loses without some of its heads (Michel et al. 2019; Voita et al. 2019).

B batch, T position, N query heads, H features of a head's output, C scores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.errors import UserError
from transformer.hooks import Hooks
from transformer.interpret.interventions.subject import Head, Inputs, Subject
from transformer.types import Array, Float

HOW = ("zero", "mean")
"""What replaces the output of a head: zeros, or its mean over all tokens of the inputs."""


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A model's scores and loss with and without some heads."""

    heads: tuple[Head, ...]
    """The heads that were ablated, as (part, layer, head)."""
    how: str
    scores_BC: Float[np.ndarray, "B C"]
    """Of each text's answer, before: logits of the next or the masked token, or of classes."""
    ablated_scores_BC: Float[np.ndarray, "B C"]
    loss: float | None
    """Nats per predicted token before; None where no token is predicted."""
    ablated_loss: float | None

    @property
    def change_BC(self) -> Float[np.ndarray, "B C"]:
        """By how much the ablation raises each score."""
        return self.ablated_scores_BC - self.scores_BC

    @property
    def loss_change(self) -> float | None:
        """By how much the ablation raises the loss, in nats per token."""
        return None if self.loss is None or self.ablated_loss is None else self.ablated_loss - self.loss


@dataclasses.dataclass(frozen=True)
class Importance:
    """What each head's ablation alone does."""

    measure: str
    """In words: what is positive for a head that the model needs."""
    how: str
    tables: dict[str, Float[np.ndarray, "L N"]]
    """By part; nan where a layer has fewer heads."""

    def ranked(self) -> list[tuple[Head, float]]:
        """All heads, those that matter most first, helpful or harmful."""
        found = [
            ((part, int(layer), int(head)), float(table[layer, head]))
            for part, table in self.tables.items()
            for layer, head in np.argwhere(~np.isnan(table))
        ]
        return sorted(found, key=lambda one: -abs(one[1]))


def ablate(subject: Subject, inputs: Inputs, heads: Collection[tuple[Any, ...]], how: str = "zero") -> Ablation:
    """Replace the outputs of some heads, all at once.

    Args:
        heads: as (layer, head), from 0; of an encoder-decoder as (part, layer, head).

    Raises:
        UserError: a head that does not exist, or another `how`.
    """
    chosen = subject.chosen_heads(heads)
    values = _replacements(subject, inputs, how)
    B = len(inputs)
    before, loss = subject.scores(inputs, with_loss=inputs.has_targets)
    edits = _edits(subject, [chosen] * B, values)
    after, ablated_loss = subject.scores(inputs, edits, with_loss=inputs.has_targets)
    tokens = max(float(np.sum(np.asarray(inputs.weights_BT))), 1.0)
    return Ablation(
        tuple(chosen), how, before, after,
        None if loss is None else float(loss.sum()) / tokens,
        None if ablated_loss is None else float(ablated_loss.sum()) / tokens,
    )  # fmt: skip


def head_importance(
    subject: Subject, inputs: Inputs, how: str = "zero", *, answer: int | None = None, instead: int | None = None
) -> Importance:
    """Ablate each head alone.

    Args:
        answer, instead: measure by how much the ablation lowers the logit of the one minus that of the other, averaged over the
            inputs. By default the measure is by how much the loss per token rises; where no token is predicted, by how much the
            log-probability of each input's likeliest answer falls.

    Raises:
        UserError: another `how`.
    """
    values = _replacements(subject, inputs, how)
    with_loss = answer is None and inputs.has_targets
    B, heads = len(inputs), subject.all_heads()
    tokens = max(float(np.sum(np.asarray(inputs.weights_BT))), 1.0)
    before, _ = subject.scores(inputs)
    best_B = before.argmax(-1)

    def measured(scores_BC: np.ndarray, loss_B: np.ndarray | None) -> float:
        """What is high for a model that does well."""
        if loss_B is not None:
            return -float(loss_B.sum()) / tokens
        if answer is not None and instead is not None:
            return float(np.mean(scores_BC[:, answer] - scores_BC[:, instead]))
        wanted_B = best_B if answer is None else np.full(B, answer)
        return float(np.mean(np.asarray(jax.nn.log_softmax(scores_BC))[np.arange(B), wanted_B]))

    # The first of all cells changes nothing: it is measured in the same way as the others.
    cells: list[list[Head]] = [[], *([head] for head in heads)]
    per_pass = min(subject.rows_of_pass(inputs), len(cells))
    repeated = inputs.repeated(per_pass)
    found: list[float] = []
    for first in range(0, len(cells), per_pass):
        some = cells[first : first + per_pass]
        padded = some + [[]] * (per_pass - len(some))
        edits = _edits(subject, [cell for cell in padded for _ in range(B)], values)
        scores, loss = subject.scores(repeated, edits, with_loss=with_loss)
        for number in range(len(some)):
            own = slice(number * B, (number + 1) * B)
            found.append(measured(scores[own], None if loss is None else loss[own]))
    drops = {head: found[0] - value for head, value in zip(heads, found[1:], strict=True)}
    if with_loss:
        measure = "rise of the loss, in nats per token"
    elif answer is not None and instead is not None:
        measure = "fall of the logit difference of the two answers"
    else:
        measure = "fall of the answer's log-probability, in nats"
    return Importance(measure, how, subject.tables(drops))


def _replacements(subject: Subject, inputs: Inputs, how: str) -> dict[str, Array]:
    """What replaces the outputs of a place's heads, broadcastable to [B, T, N, H]."""
    if how not in HOW:
        raise UserError(f"how: got {how!r}; allowed: 'zero', 'mean'")
    places = [part.place(layer, "heads") for part in subject.parts.values() for layer in range(len(part.heads))]
    if how == "zero":
        return {place: jnp.zeros((1, 1, 1, 1), jnp.float32) for place in places}

    @jax.jit
    def sums(params: nnx.State, inputs: Inputs) -> dict[str, tuple[Array, Array]]:
        hooks = Hooks(keep=places)
        subject.call(params, inputs, hooks)
        found = {}
        for place, value_BTNH in hooks.kept.items():
            reads_source = place.startswith("encoder.")
            valid_BT = jnp.asarray(inputs.source_segments_BS if reads_source else inputs.segments_BT) != 0
            weights = valid_BT[..., None, None].astype(jnp.float32)
            found[place] = ((value_BTNH.astype(jnp.float32) * weights).sum((0, 1), keepdims=True), weights.sum())
        return found

    of_chunks = [sums(subject.params, own) for _, own in subject.chunks(inputs)]
    total = functools.reduce(functools.partial(jax.tree.map, jnp.add), of_chunks)
    return {place: value / count for place, (value, count) in total.items()}


def _edits(subject: Subject, rows: Sequence[Sequence[Head]], values: dict[str, Array]) -> dict[str, tuple[Any, Any]]:
    """For each row the heads that are replaced; every place is in the result, so that one program serves all."""
    edits = {}
    for part in subject.parts.values():
        for layer, count in enumerate(part.heads):
            place = part.place(layer, "heads")
            mask = np.zeros((len(rows), 1, count, 1), bool)
            for row, heads in enumerate(rows):
                for name, of_layer, head in heads:
                    if (name, of_layer) == (part.name, layer):
                        mask[row, 0, head] = True
            edits[place] = (mask, values[place])
    return edits
