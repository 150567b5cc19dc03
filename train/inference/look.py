"""`manyheads look`: what is inside a model on one text, as a page, with the main findings as text.

T position, L layers, N query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from train.inference.inside import Inside
from train.inference.look_page import bars, document, heat_map, paragraph, section, side_by_side, word_table
from train.run.run_files import load_run
from transformer.errors import UserError
from transformer.interpret.capture import readable
from transformer.interpret.interventions import (
    Attribution,
    HeadStatistics,
    Importance,
    Inputs,
    Lens,
    Patching,
    attribute,
    head_importance,
    head_statistics,
    induction_scores,
    logit_lens,
    patch,
)
from transformer.interpret.interventions.subject import Head, answer_and_instead
from transformer.interpret.labels import visible

PAGE = "look.html"
_MOST_BARS = 24
_SHOWN = 3
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that is looked at. What a model does not have is a text that says why."""

    answer: str
    instead: str
    probability: float
    difference: float
    """The logit of the answer minus that of `instead`."""
    at: int
    """The position of the answer."""
    lens: Lens
    importance: Importance
    attribution: Attribution | str
    statistics: dict[str, HeadStatistics] | str
    induction: np.ndarray | str
    patching: Patching | None


def look(
    run: Path, text: str, *, corrupted: str | None = None, answer: str | None = None, instead: str | None = None,
    target: str = "", how: str = "zero", out: Path | None = None, step: str = "best",
) -> None:  # fmt: skip
    """Write the page, and print what stands out.

    Args:
        corrupted: a text of as many tokens with another answer: also patch.
        answer, instead: the answers that are compared; by default the likeliest ones.
        target: of an encoder-decoder, the beginning of what it writes.
        how: of the ablation of heads, `zero` or `mean`.
        out: the folder to write into; `look` in the run's folder by default.

    Raises:
        UserError: no such run, a model or text that does not fit, or a folder that cannot be written.
    """
    loaded = load_run(run, step)
    inside = Inside(loaded, str(run))
    inputs = inside.inputs(text, target)
    other = None if corrupted is None else inside.inputs(corrupted, target)
    first = None if answer is None else inside.answer_number("answer", answer)
    second = None if instead is None else inside.answer_number("instead", instead)
    with inside.on_mesh():
        found = _find(inside, inputs, other, first, second, how)
    tokens = {prefix: list(map(visible, names)) for prefix, names in inside.labels(inputs).items()}
    for line in _said(found, tokens):
        print(line)
    words = [[visible(inside.answer_label(int(best[0]))) for best in line] for line in found.lens.tokens_LTK]
    title = f"Inside {loaded.config.name}"
    summary = (
        f"{' '.join(f'{len(names):,} tokens' for names in tokens.values())} · answer {found.answer}, "
        f"instead of {found.instead}: logit difference {found.difference:+.2f}"
    )
    folder = run / "look" if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page = folder / PAGE
        page.write_text(document(title, summary, _sections(found, tokens, words)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    print(f"page         {page} ({readable(page.stat().st_size)})")


def _find(
    inside: Inside, inputs: Inputs, other: Inputs | None, answer: int | None, instead: int | None, how: str
) -> Findings:
    subject = inside.subject
    # Patching first: texts that do not match are refused before anything long runs.
    patching = None if other is None else patch(subject, inputs, other, answer=answer, instead=instead)
    scores_C = subject.scores(inputs)[0][0]
    if patching is not None:
        answer, instead = patching.answer, patching.instead
    answer, instead = answer_and_instead(scores_C, answer, instead)
    return Findings(
        visible(inside.answer_label(answer)), visible(inside.answer_label(instead)),
        float(jax.nn.softmax(scores_C)[answer]), float(scores_C[answer] - scores_C[instead]),
        0 if subject.scores_rows else int(inputs.at_B[0]),
        logit_lens(subject, inputs, top=1, answer=answer),
        head_importance(subject, inputs, how, answer=answer, instead=instead),
        _or_why(lambda: attribute(subject, inputs, answer=answer, instead=instead)),
        _or_why(lambda: head_statistics(subject, inputs)), _or_why(lambda: induction_scores(subject)), patching,
    )  # fmt: skip


def _or_why(act: Callable[[], T]) -> T | str:
    try:
        return act()
    except UserError as error:
        return str(error)


def _said(found: Findings, tokens: Mapping[str, list[str]]) -> list[str]:
    """The main findings, line by line."""
    ranks = found.lens.target_rank_LT[:, found.at]
    layers = len(ranks) - 1
    first = next((layer for layer in range(layers + 1) if (ranks[layer:] == 1).all()), None)
    place = f"the likeliest after layer {first} of {layers} and later" if first is not None else f"at rank {ranks[-1]}"
    ablated = [f"{_head_name(head)} {-value:+.3f}" for head, value in found.importance.ranked()[:_SHOWN]]
    lines = [
        f"text         {', '.join(f'{len(names):,} tokens' for names in tokens.values())}",
        f"answer       {found.answer} with probability {found.probability:.3f}; logit difference to {found.instead} "
        f"{found.difference:+.3f}",
        f"lens         the answer is {place}",
        f"ablation     changes the difference most: {', '.join(ablated)}",
    ]
    if isinstance(found.attribution, Attribution):
        parts = [f"{name} {value:+.3f}" for name, value in _parts(found.attribution)[:_SHOWN]]
        lines.append(f"attribution  {', '.join(parts)}")
    else:
        lines.append(f"attribution  none: {found.attribution}")
    for title, values, _ in _measures(found):
        if "token before" in title or title == "induction":
            layer, head = np.unravel_index(np.nanargmax(values), values.shape)
            lines.append(f"heads        {title}: most in layer {layer} head {head}, {values[layer, head]:.2f}")
    if found.patching is not None:
        heads = [(head, value) for head, value in _ranked(found.patching.heads)[:_SHOWN]]
        lines.append(f"patching     heads: {', '.join(f'{_head_name(head)} {value:.2f}' for head, value in heads)}")
        for prefix, table in found.patching.stream.items():
            where = [
                f"{tokens[prefix][table[layer].argmax()]} ({table[layer].argmax()})" for layer in range(len(table))
            ]
            lines.append(f"patching     {prefix}stream, from layer to layer, most at {' '.join(where)}")
    return lines


def _sections(found: Findings, tokens: Mapping[str, list[str]], words: list[list[str]]) -> Iterator[str]:
    """The page's sections. `words` are the likeliest tokens after each layer at each position."""
    last = list(tokens)[-1]
    after = [str(layer) for layer in range(len(words))]
    named = tokens[last] if len(words[0]) == len(tokens[last]) else ["class"]
    of_answer = np.stack(
        [found.lens.target_probability_LT[:, found.at], found.lens.target_rank_LT[:, found.at]], axis=1
    )  # fmt: skip
    yield section(
        "Logit lens",
        "What the model would predict after each layer, if the final norm and the output projection read the residual stream "
        "there; 0 is before the first layer.",
        word_table(words, found.lens.probabilities_LTK[:, :, 0], named, after),
        heat_map(f"The answer {found.answer}", of_answer[:, :1], ["probability"], after, largest=1.0, digits=3),
        paragraph("Its rank after each layer: " + ", ".join(f"{rank:.0f}" for rank in of_answer[:, 1])),
    )
    yield section(
        "Direct logit attribution",
        f"What each part adds to the logit of {found.answer} minus that of {found.instead}, with the scale of the final norm "
        "as it is here.",
        *_attribution(found),
    )  # fmt: skip
    yield section(
        "Ablation of heads",
        f"Each head alone is replaced ({found.importance.how}). Positive: {found.importance.measure}; the model needs the head.",
        side_by_side(_map(part, table) for part, table in found.importance.tables.items()),
    )
    measures = _measures(found)
    yield section(
        "What the heads look at",
        "Means over this text's queries. Induction: the weight of the token after the last copy, on random tokens that repeat."
        if measures
        else str(found.statistics),
        side_by_side(_map(title, table, largest) for title, table, largest in measures),
    )
    if found.patching is not None:
        yield _patching(found.patching, found, tokens)


def _attribution(found: Findings) -> Iterator[str]:
    if isinstance(found.attribution, str):
        yield paragraph(found.attribution)
        return
    parts = _parts(found.attribution)
    if len(parts) > _MOST_BARS:
        rest = sum(value for _, value in parts[_MOST_BARS:])
        parts = [*parts[:_MOST_BARS], (f"{len(parts) - _MOST_BARS} others", rest)]
    yield bars([*parts, ("sum", found.attribution.total)])


def _patching(patching: Patching, found: Findings, tokens: Mapping[str, list[str]]) -> str:
    maps = []
    for prefix, table in patching.stream.items():
        rows = [str(layer) for layer in range(len(table))]
        maps.append(
            heat_map(f"{prefix}residual stream", table, tokens[prefix], rows, largest=1.0, corner="after layer")
        )
    for place, table in patching.outputs.items():
        prefix = place[: place.index(".") + 1] if place.startswith(("encoder.", "decoder.")) else ""
        rows = [str(layer) for layer in range(len(table))]
        maps.append(heat_map(place, table, tokens[prefix], rows, largest=1.0))
    maps += [_map(f"heads of {part}", table, 1.0) for part, table in patching.heads.items()]
    return section(
        "Activation patching",
        f"The corrupted text with one value of this text's run in its place: how much of the difference between {found.answer} "
        f"and {found.instead} comes back. 0 is the corrupted text ({patching.corrupted:+.2f}), 1 this one "
        f"({patching.clean:+.2f}).",
        *maps,
    )


def _map(title: str, table: np.ndarray, largest: float | None = None) -> str:
    """A heat map of layers and heads."""
    columns = [f"head {head}" if head == 0 else str(head) for head in range(table.shape[1])]
    return heat_map(title, table, columns, [str(layer) for layer in range(len(table))], largest=largest)


def _measures(found: Findings) -> list[tuple[str, np.ndarray, float | None]]:
    """Titles, tables, and the value of the strongest shade."""
    rows: list[tuple[str, np.ndarray, float | None]] = []
    if not isinstance(found.induction, str):
        rows.append(("induction", found.induction, 1.0))
    for part, one in {} if isinstance(found.statistics, str) else found.statistics.items():
        own = "" if part == "attention" else f"{part}: "
        named = [("token before", one.previous, 1.0), ("first token", one.first, 1.0), ("entropy (bits)", one.entropy, None),
                 ("mean distance (tokens)", one.distance, None)]  # fmt: skip
        rows += [(own + title, table, largest) for title, table, largest in named if table is not None]
    return rows


def _parts(attribution: Attribution) -> list[tuple[str, float]]:
    """The parts of a logit difference by name, the largest first."""
    parts = [("embedding", attribution.embedding), ("biases", attribution.biases)]
    parts += [(f"mlp layer {layer}", float(value)) for layer, value in enumerate(attribution.mlps)]
    parts += [(_head_name(head), value) for head, value in _ranked(attribution.heads)]
    return sorted(parts, key=lambda part: -abs(part[1]))


def _ranked(tables: Mapping[str, np.ndarray]) -> list[tuple[Head, float]]:
    return Importance("", "zero", dict(tables)).ranked()


def _head_name(head: Head) -> str:
    part, layer, number = head
    return f"{'' if part == 'attention' else f'{part} '}layer {layer} head {number}"
