"""The report: findings, tables and pictures, as a self-contained page and as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.history.findings import Figures, findings, title
from benchmarks.history.models import ENTRIES
from benchmarks.history.plots import alignment_sheet, by_length, loss_curves
from train.report.page import page
from train.report.page import table as as_html

HEADING = "Attention through history"
PICTURES: dict[str, tuple[str, Callable[[Sequence[Figures]], str]]] = {
    "loss": ("Loss over the steps; in training the mean of five neighbouring readings", loss_curves),
    "length": ("Quality of held-out translations by the source's length", by_length),
    "alignment": ("Alignment of one held-out sentence", alignment_sheet),
}

Cells = list[list[str]]
"""Rows of cells, header first; `**` around a cell marks the best of its column."""


def write(result: dict[str, Any], path: Path) -> None:
    """Write the page `path`, and next to it the same report as Markdown with its pictures."""
    parts, markdown = [], [f"# {HEADING}", ""]
    for paragraph in introduction(result):
        parts.append("<p>" + re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(paragraph)) + "</p>")
        markdown += [paragraph, ""]
    for name, task in result["tasks"].items():
        stages = task["stages"]
        parts.append(f"<h2>{html.escape(task['title'])}</h2><p class=muted>{html.escape(_amounts(task))}</p>")
        markdown += [f"## {task['title']}", "", _amounts(task), ""]
        if len(stages) > 1:
            found = findings(stages)
            parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in found) + "</ul>")
            markdown += [*(f"- {line}" for line in found), ""]
        for caption, cells in tables(stages):
            parts.append(f"<h3>{html.escape(caption)}</h3>{as_html(cells[0], cells[1:], text=(0,))}")
            markdown += [f"**{caption}**", "", *_markdown(cells), ""]
        for kind, (caption, draw) in PICTURES.items():
            picture = draw(stages)
            file = path.with_name(f"{path.stem}_{name}_{kind}.svg")
            file.write_text(picture, encoding="utf-8")
            caption += _caption(stages) if kind == "alignment" else ""
            parts.append(f"<h3>{html.escape(caption)}</h3>{picture}")
            markdown += [f"**{caption}**", "", f"![{caption}]({file.name})", ""]
        cells = example_table(stages)
        parts.append(f"<h3>That sentence, translated greedily</h3>{as_html(cells[0], cells[1:], long=(0, 1))}")
        markdown += ["**That sentence, translated greedily**", "", *_markdown(cells), ""]
    path.write_text(page(HEADING, parts), encoding="utf-8")
    path.with_suffix(".md").write_text("\n".join(markdown), encoding="utf-8")


def introduction(result: dict[str, Any]) -> list[str]:
    """The setup, which is identical for all models."""
    settings = result["settings"]
    dropouts = sorted({model["dropout"] for model in settings["models"].values()})
    rates = sorted({one["learning_rate"] for task in result["tasks"].values() for one in task["stages"]})
    return [
        f"Made by `{result['command']}`. Each model has {settings['parameters']:,} parameters, give or take "
        f"{settings['tolerance']:.0%}, and takes {settings['steps']:,} steps of {settings['batch_size']} pairs: the same "
        "pairs in the same batches and the same order, by the same tokenizer. AdamW, cosine schedule with a tenth of "
        f"warm-up, dropout {' or '.join(f'{rate:g}' for rate in dropouts)}; the highest learning rate is "
        f"{' or '.join(f'{rate:g}' for rate in rates)}. Seed {settings['seed']}.",
        "Recurrent models have a GRU encoder in both directions and a GRU decoder, so that they differ only in how the decoder "
        "attends to the source; Bahdanau's, hard, linear and delta attend before a step, Luong's after it. The Transformer is "
        "pre-norm, three layers a side. Losses are nats per target token of all held-out pairs; "
        "speeds are target tokens a second in training; AER is the alignment error rate; translations are greedy, "
        "scored by sacrebleu. One seed and one learning rate: small gaps say little.",
    ]


def tables(stages: Sequence[Figures]) -> list[tuple[str, Cells]]:
    """Captions and tables of one task."""
    by_head: dict[str, tuple[Callable[[Figures], float | None], str, int]] = {
        "parameters": (lambda one: one["parameters"], ",.0f", 0),
        "learning rate": (lambda one: one["learning_rate"], "g", 0),
        "held-out loss": (lambda one: one["held_out_loss"], ".3f", -1),
        "BLEU": (lambda one: one["bleu"], ".2f", 1),
        "chrF": (lambda one: one["chrf"], ".2f", 1),
        "tokens/s": (lambda one: one["tokens_per_second"], ",.0f", 1),
    }
    if any(one["alignment"] for one in stages):
        by_head["AER"] = (
            lambda one: one["alignment"] and one["alignment"]["error_rate"], ".3f", -1
        )  # fmt: skip
    columns = [[title(one) for one in stages]]
    columns += [_column([value(one) for one in stages], form, sign) for value, form, sign in by_head.values()]
    papers = [ENTRIES[one["model"]].paper for one in stages]
    found = [("Each model", _table(["model", "after", *by_head], [columns[0], papers, *columns[1:]]))]
    buckets = stages[0]["by_length"]
    heads = [f"{kind}, {bucket['words']}" for kind in ("BLEU", "chrF") for bucket in buckets]
    counts = ", ".join(f"{bucket['words']}: {bucket['pairs']}" for bucket in buckets)
    cells = [
        _column([one["by_length"][i][kind] for one in stages], ".2f", 1)
        for kind in ("bleu", "chrf")
        for i in range(len(buckets))
    ]
    found.append(
        (
            f"By the source's length in words (held-out pairs of {counts})",
            _table(["model", *heads], [columns[0], *cells]),
        )
    )
    return found


def example_table(stages: Sequence[Figures]) -> Cells:
    """The example sentence, its reference and each model's translation."""
    first = stages[0]["example"]
    rows = [["source", first["source"]], ["reference", first["reference"]]]
    return [["", "text"], *rows, *([title(one), one["example"]["translation"] or "(nothing)"] for one in stages)]


def _amounts(task: dict[str, Any]) -> str:
    tokens = task["tokens"]
    return (
        f"Every model reads {tokens['source']:,} source tokens and predicts {tokens['target']:,} target tokens in training "
        f"({tokens['pairs']:,} pairs)."
    )


def _caption(stages: Sequence[Figures]) -> str:
    """Explanation of the alignments' axes and marks."""
    text = "; rows are the reference's words, columns the source's"
    if stages[0]["example"]["gold"]:
        return text + ". Rings mark the true alignment. Of several heads, the best-aligning one is shown"
    return text + ". Several heads are averaged"


def _column(values: Sequence[float | None], form: str, sign: int) -> list[str]:
    """Cells, the best one marked: the greatest for sign 1, the least for -1, none for 0."""
    known = [value for value in values if value is not None]
    best = (max if sign > 0 else min)(known) if sign and len(known) > 1 else None
    cells = ["–" if value is None else f"{value:{form}}" for value in values]
    return [
        f"**{cell}**" if value is not None and value == best else cell
        for cell, value in zip(cells, values, strict=True)
    ]


def _table(heads: list[str], columns: list[list[str]]) -> Cells:
    return [heads, *(list(row) for row in zip(*columns, strict=True))]


def _markdown(table: Cells) -> list[str]:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|---|{'---:|' * (len(table[0]) - 1)}", *lines[1:]]
