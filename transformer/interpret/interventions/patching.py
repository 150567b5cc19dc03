"""Activation patching: where a model holds the difference between two inputs.

A corrupted input is run with single values of the clean one put in their places; what brings the clean answer back holds what
the answer depends on (Wang et al. 2022, sections 2 and 3; Heimersheim & Nanda 2024).

T position, L layers, N query heads, D embed, H features of a head's output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from transformer.errors import UserError
from transformer.interpret.interventions.subject import Head, Inputs, Subject, answer_and_instead
from transformer.types import Array, Float


@dataclasses.dataclass(frozen=True)
class Patching:
    """How much of the clean answer each value brings back: 0 as corrupted, 1 as clean; by the stack's prefix or the part."""

    answer: int
    instead: int
    clean: float
    """The logit of `answer` minus that of `instead`, on the clean input."""
    corrupted: float
    """The same on the corrupted input."""
    stream: dict[str, Float[np.ndarray, "L1 T"]]
    """The residual stream of each stack, before its first layer and after each one, at each position."""
    outputs: dict[str, Float[np.ndarray, "L T"]]
    """What attention (`attention.out`, `cross.out`) and feed-forward layers (`mlp.out`) add, at each position."""
    heads: dict[str, Float[np.ndarray, "L N"]]
    """Each head's output at all positions, by part; nan where a layer has fewer heads."""


def patch(
    subject: Subject, clean: Inputs, corrupted: Inputs, *, answer: int | None = None, instead: int | None = None
) -> Patching:
    """Patch every value of the clean input into the corrupted one, each alone.

    Args:
        clean, corrupted: one row each, of equal length.
        answer, instead: the scores that are compared; by default the likeliest on the clean input, and the likeliest other one on
            the corrupted input.

    Raises:
        UserError: inputs of different lengths, or that give the two answers the same logit difference.
    """
    _check_lengths(clean, corrupted)
    places = _places(subject)
    values = subject.kept(clean, places)
    clean_C, corrupted_C = (subject.scores(inputs)[0][0] for inputs in (clean, corrupted))
    answer, instead = answer_and_instead(clean_C, answer, instead, corrupted_C)
    least, most = (float(scores[answer] - scores[instead]) for scores in (corrupted_C, clean_C))
    if abs(most - least) < 1e-6 * max(1.0, abs(most)):
        raise UserError(
            "corrupted: it gives the two answers the same logit difference as the clean text; change what matters"
        )
    cells = [(place, index) for place in places for index in range(_width(place, values[place]))]
    per_pass = min(subject.rows_of_pass(corrupted), len(cells))
    repeated = corrupted.repeated(per_pass)
    restored: dict[tuple[str, int], float] = {}
    for first in range(0, len(cells), per_pass):
        some = cells[first : first + per_pass]
        scores, _ = subject.scores(repeated, _edits(some, per_pass, values))
        for cell, scores_C in zip(some, scores, strict=False):
            restored[cell] = (float(scores_C[answer] - scores_C[instead]) - least) / (most - least)

    def table(of: list[str]) -> np.ndarray:
        return np.array([[restored[place, index] for index in range(_width(place, values[place]))] for place in of])

    stream: dict[str, np.ndarray] = {}
    outputs: dict[str, np.ndarray] = {}
    for prefix, stack in subject.stacks.items():
        layers = [f"{prefix}layers.{layer}." for layer in range(stack.num_layers)]
        stream[prefix] = table([f"{prefix}embed", *(f"{layer}out" for layer in layers)])
        kinds = ["attention.out", "cross.out", "mlp.out"] if prefix == "decoder." else ["attention.out", "mlp.out"]
        outputs |= {f"{prefix}{kind}": table([f"{layer}{kind}" for layer in layers]) for kind in kinds}
    heads: dict[Head, float] = {
        (part.name, layer, head): restored[part.place(layer, "heads"), head]
        for part in subject.parts.values()
        for layer, count in enumerate(part.heads)
        for head in range(count)
    }
    return Patching(answer, instead, most, least, stream, outputs, subject.tables(heads))


def _places(subject: Subject) -> list[str]:
    places = [part.place(layer, what) for part in subject.parts.values() for layer in range(len(part.heads))
              for what in ("heads", "out")]  # fmt: skip
    for prefix, stack in subject.stacks.items():
        places.append(f"{prefix}embed")
        for layer in range(stack.num_layers):
            places += [f"{prefix}layers.{layer}.mlp.out", f"{prefix}layers.{layer}.out"]
    return places


def _width(place: str, value: Array) -> int:
    """How many values of a place are patched one by one: its heads, or its positions."""
    return value.shape[2] if place.endswith(".heads") else value.shape[1]


def _edits(cells: list[tuple[str, int]], rows: int, values: dict[str, Array]) -> dict[str, tuple[Any, Any]]:
    masks = {}
    for place, value in values.items():
        shape = (rows, 1, value.shape[2], 1) if place.endswith(".heads") else (rows, value.shape[1], 1)
        masks[place] = np.zeros(shape, bool)
    for row, (place, index) in enumerate(cells):
        masks[place][(row, 0, index) if place.endswith(".heads") else (row, index)] = True
    return {place: (masks[place], value) for place, value in values.items()}


def _check_lengths(clean: Inputs, corrupted: Inputs) -> None:
    def lengths(inputs: Inputs) -> list[tuple[int, ...]]:
        return [leaf.shape for leaf in jax.tree.leaves(inputs)]

    if lengths(clean) != lengths(corrupted):
        both = []
        for inputs in (clean, corrupted):
            rows = inputs.tokens_BT if inputs.source_BS is None else inputs.source_BS
            both.append(rows.shape[1])
        if both[0] == both[1]:
            both = [inputs.tokens_BT.shape[1] for inputs in (clean, corrupted)]
        raise UserError(
            f"corrupted: it has {both[1]} tokens and the clean text {both[0]}; give texts of as many tokens"
        )
