"""Whether an objective can be trained on the prepared data: told before the first step, with what to change."""

from __future__ import annotations

from train.data.corrupt import lengths_filling
from train.data.objective_config import LABELLED, MASKED, PAIRED, ObjectiveConfig, sentinels
from train.data.spans import most_sentinels, ul2_lengths
from train.data.store import Prepared
from train.data.words import WordPieces
from transformer.errors import UserError

_LEAST_LENGTH = {
    "masked": 3, "next_sentence": 5, "sentence_order": 5, "prefix": 2, "span_corruption": 3, "ul2": 8,
    "classification": 3, "regression": 3, "token_classification": 3, "answer": 5, "choice": 5, "contrastive": 3,
}  # fmt: skip

_MAY_BE_PAIRS = ("classification", "regression", "answer", "choice")
_LABELS = {"class": "a class", "number": "a number", "tags": "a tag for each word", "answers": "answers"}


def check_objective(prepared: Prepared, objective: ObjectiveConfig, length: int) -> None:
    """Raise a `UserError` unless the data suits the objective, with sequences of `length` tokens to predict."""
    kind = objective.kind
    if kind in PAIRED and not prepared.pairs:
        raise UserError(f"objective.kind: {kind!r} needs pairs, the sources give single texts; set their target_field")
    if kind not in (*PAIRED, *_MAY_BE_PAIRS) and prepared.pairs:
        raise UserError(
            f"objective.kind: {kind!r} is for single texts, the sources give pairs; set it to {' or '.join(PAIRED)}"
        )
    if kind != "choice" and any(array.others > 1 for array in prepared.train):
        raise UserError(f"objective.kind: {kind!r} is not for texts with choices; set it to 'choice'")
    if kind != "seq2seq" and prepared.own_target_tokenizer is not None:
        raise UserError(f"data.target_tokenizer: one encoder reads both sides of a {kind} pair; set it to null")
    if kind in LABELLED:
        _check_label_kind(prepared, objective)
    _check_lengths(objective, length)
    _check_special_tokens(prepared, objective, length)
    _check_held_out(prepared, objective, length)
    if kind in MASKED and objective.whole_word:
        WordPieces(prepared.tokenizer)
    if kind == "next_sentence" and any(len(array.offsets) < 3 for array in prepared.train):
        raise UserError(
            "objective.kind: 'next_sentence' needs at least two documents in each source; cut a long text into documents "
            "with the source's separator, or use sentence_order"
        )


def _check_label_kind(prepared: Prepared, objective: ObjectiveConfig) -> None:
    kind, given = objective.kind, prepared.meta.label_kind
    wanted = LABELLED[kind]
    if given is None:
        raise UserError(
            f"objective.kind: {kind!r} needs documents with {_LABELS[wanted]}, the sources give none; set their label_field"
        )
    if given != wanted:
        fitting = " or ".join(repr(other) for other, label in LABELLED.items() if label == given)
        raise UserError(
            f"objective.kind: {kind!r} needs documents with {_LABELS[wanted]} (label_kind {wanted!r}), the sources give "
            f"{_LABELS[given]}; set their label_kind, or the objective to {fitting}"
        )
    if kind == "choice":
        if not prepared.pairs:
            raise UserError("objective.kind: 'choice' needs texts with choices; set choice_fields of the sources")
        if other := [
            array for array in (*prepared.train, *prepared.validation) if array.others != objective.num_choices
        ]:
            raise UserError(
                f"objective.num_choices: got {objective.num_choices}; the documents of {other[0].name} have "
                f"{other[0].others} choices"
            )
        check_labels(prepared, objective.num_choices, "objective.num_choices")


def check_labels(prepared: Prepared, num_labels: int, field: str = "model.num_labels") -> None:
    """Raise a `UserError` unless a model of `num_labels` classes has those of the data; `field` is where it says so."""
    labels = prepared.meta.labels
    names = ", ".join(labels)
    if len(labels) == 1:
        raise UserError(f"data: all documents are of one class, {names}: there is nothing to tell apart")
    if len(labels) != num_labels:
        raise UserError(f"{field}: got {num_labels}; the data has {len(labels)} classes: {names}")


def _check_lengths(objective: ObjectiveConfig, length: int) -> None:
    kind = objective.kind
    least = _LEAST_LENGTH.get(kind, 1)
    if length < least:
        raise UserError(f"length: got {length}; {kind} needs at least {least} tokens")
    width = objective.source_width(length)
    if objective.has_source and width < least:
        raise UserError(f"objective.source_length: got {width}; {kind} needs at least {least} tokens")
    if kind == "span_corruption":
        _, needed = batch_lengths(objective, length)
        if needed > length:
            raise UserError(
                f"length: got {length}; a source of {width} tokens gives targets of {needed}: set length to at least "
                f"{needed}, or objective.source_length to less"
            )


def batch_lengths(objective: ObjectiveConfig, length: int) -> tuple[int | None, int]:
    """The width of the source, if there is one, and of what is predicted, in the (widest) batches.

    With span corruption the latter follows from the former, and `length` is only the most that it may be.
    """
    if not objective.has_source:
        return None, length
    source = objective.source_width(length)
    if objective.kind != "span_corruption":
        return source, length
    return source, lengths_filling(source, objective.noise_density, objective.mean_span).target


def _check_held_out(prepared: Prepared, objective: ObjectiveConfig, length: int) -> None:
    """Held-out text that is too short for one sequence would only be noticed at the first evaluation."""
    if objective.kind not in ("span_corruption", "ul2") or not prepared.validation:
        return
    width = objective.source_width(length)
    if objective.kind == "ul2":
        needed = max(lengths.tokens for lengths in ul2_lengths(objective, length))
    else:
        needed = lengths_filling(width, objective.noise_density, objective.mean_span).tokens
    longest = max(len(array.tokens) - 1 for array in prepared.validation)
    if longest < needed:
        raise UserError(
            f"data.validation: {longest} held-out tokens are fewer than one sequence of {needed}; hold out more, or make "
            "objective.source_length smaller"
        )


def _check_special_tokens(prepared: Prepared, objective: ObjectiveConfig, length: int) -> None:
    tokenizer = prepared.tokenizer
    wanted = objective.special_tokens
    if missing := [name for name in wanted if tokenizer.special(name) is None]:
        names = ", ".join(f'"{name}"' for name in wanted)
        raise UserError(
            f"objective.kind: {objective.kind!r} takes {', '.join(missing)}, which the vocabulary lacks; set "
            f"data.tokenizer.special_tokens: [{names}]"
        )
    if objective.kind in ("span_corruption", "ul2"):
        needed, there = most_sentinels(objective, length), len(sentinels(tokenizer))
        if there < needed:
            raise UserError(
                f"objective.kind: {objective.kind!r} takes a sentinel for each of up to {needed} spans, the vocabulary "
                f"has {there}; set data.tokenizer.sentinels: {needed}"
            )
