"""`manyheads-bench report`: the results on record as one Markdown table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from transformer.errors import UserError


def report(folder: Path | None = None) -> str:
    """A row a figure, made from the JSON files alone.

    Raises:
        UserError: there are no results.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder or RESULTS).glob("*.json"))]
    if not records:
        raise UserError(f"{folder or RESULTS}: no results yet; make bench (or make bench-gpu) makes them")
    lines = ["| measured | figure | spread | command | device, date |", "|---|---|---|---|---|"]
    for record in records:
        device = f"{record['device']['kind']}, {record['device']['cpu_cores']} cores, {record['date'][:10]}"
        for what, figure, spread in _rows(record["result"]):
            lines.append(f"| {what} | {figure} | {spread} | `{record['command']}` | {device} |")
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if "ratio_to" in result:
        yield "training step, tokens/s", *_figure(result["tokens_per_second"]["manyheads"], "{:.0f}")
        for peer, values in result["ratio_to"].items():
            yield f"training step, speed over {peer}", *_figure(values, "{:.2f}×")
        if result.get("mfu") is not None:
            yield "training step, MFU", f"{result['mfu']:.1%}", ""
    for batch in ("batch_1", "batch_8"):
        if batch in result:
            yield (
                f"greedy decoding, {batch.replace('_', ' ')}, speed over transformers",
                *_figure(result[batch]["ratio"], "{:.2f}×"),
            )
    if "seconds" in result:
        yield "compile time of the step, 48 layers over 6", *_figure(result["ratio"], "{:.2f}×")
    elif "ratio" in result:
        for loader, values in result["ratio"].items():
            yield f"{loader}, tokens/s over the step's", *_figure(values, "{:.0f}×")


def _figure(values: dict[str, float], form: str) -> tuple[str, str]:
    """Median, and smallest to largest."""
    return form.format(values["median"]), f"{form.format(values['min'])} to {form.format(values['max'])}"
