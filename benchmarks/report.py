"""`manyheads-bench report`: the stored results as one Markdown table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.mechanisms import markdown
from benchmarks.record import RESULTS
from transformer.errors import UserError


def report(folder: Path | None = None) -> str:
    """One row for each figure, made from the JSON files alone.

    Raises:
        UserError: there are no results.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder or RESULTS).glob("*.json"))]
    if not records:
        raise UserError(f"{folder or RESULTS}: no results yet; run make bench (or make bench-gpu)")
    lines = ["| measured | figure | spread | command | device, date |", "|---|---|---|---|---|"]
    for record in records:
        device = f"{record['device']['kind']}, {record['device']['cpu_cores']} cores, {record['date'][:10]}"
        for what, figure, spread in _rows(record["result"]):
            lines.append(f"| {what} | {figure} | {spread} | `{record['command']}` | {device} |")
    return "\n".join([*lines, *_mechanisms(records)])


def _mechanisms(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The tables of the mechanisms, where they are on record."""
    for record in records:
        for part in record["result"].get("mechanisms", {}).values():
            title = part["title"][0].upper() + part["title"][1:]
            yield (
                f"\n{title}, {record['result']['minutes']:g} minutes of training each (`{record['command']}`; from "
                f"`{part['config']}`):\n"
            )
            yield markdown(part)


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if "regret" in result:
        yield from _regret_rows(result["regret"])
        return
    if {"layouts", "strategies", "kind", "published"} & result.keys():
        yield from _sharding_rows(result)
        return
    if "ratio_to" in result:
        step = "training step" + {"packed": ", packed documents", "large": ", 1.3 billion parameters"}.get(
            result.get("case", ""), ""
        )
        yield f"{step}, tokens/s", *_figure(result["tokens_per_second"]["manyheads"], "{:.0f}")
        for peer, values in result["ratio_to"].items():
            yield f"{step}, speed over {peer}", *_figure(values, "{:.2f}×")
        if result.get("mfu") is not None:
            yield f"{step}, MFU", f"{result['mfu']:.1%}", ""
    for batch in ("batch_1", "batch_8"):
        if batch in result:
            yield (
                f"greedy decoding, {batch.replace('_', ' ')}, speed over transformers",
                *_figure(result[batch]["ratio"], "{:.2f}×"),
            )
    for case in result.get("cases", ()):
        if "blockwise_over_reference" in case and case["passes"] != "forward":
            what = f"{case['length']} tokens, {'causal' if case['causal'] else 'all pairs'}"
            figure = _figure(case["blockwise_over_reference"], "{:.2f}×")
            yield f"blockwise attention, both passes, {what}, speed over the plain equation", *figure
    for arm, values in result.get("accuracy", {}).items():
        what = f"{result['classifier']}, held-out accuracy from {arm} weights"
        yield what, f"{values['mean']:.1%}", f"{values['min']:.1%} to {values['max']:.1%}, {values['seeds']} seeds"
    for arm, values in result.get("finetuned", {}).items():
        what = f"{result['classifier']}, held-out accuracy, {arm}, median"
        yield what, f"{values['median']:.1%}", f"{values['min']:.1%} to {values['max']:.1%}, {values['seeds']} seeds"
    if "finetuning_ratio_to" in result:
        step = "fine-tuning step" + (", padded rows" if result.get("case") == "padded" else "")
        for peer, values in result["finetuning_ratio_to"].items():
            yield f"{step}, speed over {peer}", *_figure(values, "{:.2f}×")
    for layout, found in result.get("import_layouts", {}).items():
        what = f"imported encoder, {layout} on {result['devices']} devices"
        yield f"{what}, largest difference", f"{found['largest_difference']:.1e}", ""
        yield f"{what}, smallest cosine", f"{found['least_cosine']:.7f}", ""
    if "embedding_ratio" in result:
        yield "embedding, texts/s over sentence-transformers'", *_figure(result["embedding_ratio"], "{:.2f}×")
    if "embedding_ratio_onnx" in result:
        what = "embedding, texts/s over sentence-transformers' with its ONNX backend"
        yield what, *_figure(result["embedding_ratio_onnx"], "{:.2f}×")
    if "auto_over_best" in result:
        yield "attention, time of auto over the best backend, at worst", f"{result['auto_over_best']:.2f}×", ""
    for name, spread in result.get("flat", {}).items():
        if not name.startswith("softmax"):
            yield f"{name}, slowest over fastest token, 4k to 128k tokens", f"{spread:.2f}×", ""
    if "worst" in result:
        yield (
            "attention, mechanisms and backends within their limits of float64",
            f"{result['passed']}",
            f"{result['failed']} beyond",
        )
    yield from _expert_rows(result)
    yield from _robustness_rows(result)
    if "host_mebibytes_above_inputs" in result:
        what = f"blockwise attention, both passes, {result['length']:,} tokens of one head"
        yield f"{what}, memory above the inputs", f"{result['host_mebibytes_above_inputs']:.0f} MiB", ""
        yield f"{what}, time", f"{result['seconds']:.0f} s", ""
    elif "seconds" in result and "ratio" in result:
        yield "compile time of the step, 48 layers over 6", *_figure(result["ratio"], "{:.2f}×")
    elif "ratio" in result:
        for loader, values in result["ratio"].items():
            yield f"{loader}, tokens/s over the step's", *_figure(values, "{:.0f}×")


def _expert_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The time of a mixture of experts over the number of tokens, and over a dense layer's."""
    for name, found in result.get("experts", {}).items():
        what = f"{result['num_experts']} experts, {result['experts_per_token']} per token, {name}, both passes, time"
        fewest, most = result["tokens"][0], result["tokens"][-1]
        yield f"{what} of {most:,} tokens over {fewest:,}", *_figure(found["most_over_fewest_tokens"], "{:.1f}×")
        yield (
            f"{what} over a dense layer's of equal active FLOPs, {most:,} tokens",
            *_figure(found["over_dense"][str(most)], "{:.2f}×"),
        )


def _robustness_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Runs that were killed and resumed, a long run, and mutated inputs."""
    for family, parts in result.get("resume", {}).items():
        for name, found in parts.items():
            what = f"{family}, killed and resumed on {name}, steps or arrays that differ from a whole run"
            spread = f"{found['kills']} kills, {found['while_saving']} in a save, {found['while_evaluating']} in an evaluation"
            if found["largest_difference"]:
                spread += f"; losses within {found['largest_difference']:.0e}"
            yield what, f"{found['differences']}", spread
    for family, found in result.get("first_batch_milliseconds", {}).items():
        figure = f"{found['1']:.0f} ms and {found['1000000']:.0f} ms"
        yield f"{family}, first batch of a run that resumes after step 1, and after step 1,000,000", figure, ""
    if (soak := result.get("soak")) is not None:
        what = f"a run of {soak['steps']:,} steps with {soak['checkpoints']} checkpoints"
        yield f"{what}, growth of resident memory after warm-up", f"{soak['resident_growth']:.1%}", ""
        yield (
            f"{what}, growth of open files",
            f"{soak['open_files']['at_the_end'] - soak['open_files']['after_warm_up']:.0f}",
            "",
        )
        yield f"{what}, time that checkpoints hold up the steps", f"{soak['checkpoint_stall']:.1%}", ""
    if (suite := result.get("suite")) is not None:
        what = f"{'the quick tests' if suite['fast'] else 'all tests'}, nothing compiled before, time"
        machine = f"10 million additions in Python {suite['seconds_of_ten_million_additions']:.1f} s"
        yield what, f"{suite['seconds'] / 60:.0f} min", f"{suite['tests']:,} tests; {machine}"
    for kind, found in result.get("kinds", {}).items():
        what = f"mutated inputs, {kind}: tracebacks, hangs and stray writes"
        yield (
            what,
            f"{found['findings']}",
            f"{found['mutants']:,} mutants, {found['refused']:,} refused, the others worked",
        )


def _regret_rows(regret: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """A plan's picks against the best layout that was measured."""
    cases = regret["cases"]
    what = f"the plan's pick against the best measured layout on {regret['kind']}, {len(cases)} models and numbers of devices"
    layouts = sum(case["measured"] for case in cases)
    yield f"{what}, slower at worst", f"{regret['worst']:.1%}", f"{layouts} layouts measured"
    yield f"{what}, within 5%", f"{regret['within_5_percent']} of {len(cases)}", ""


def _sharding_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Figures of a plan, of strategies measured or compiled for a target, and of predictions compared with measurements."""
    if "layouts" in result:
        best = next((row for row in result["layouts"] if row["fits"]), None)
        what = f"plan of {result['config']} on {result['target']}, {result['compiled']} layouts compiled"
        if not result.get("kept_from_before"):
            yield f"{what}, time", f"{result['seconds']:.0f} s", ""
        if best is not None:
            figure = f"{best['seconds'] * 1e3:.0f} ms, MFU {best['mfu']:.0%}"
            yield f"the best of them, predicted: {best['layout']}", figure, ""
    elif "target" in result:
        ratios = {
            name: row["sent_bytes"] / row["least_bytes"]
            for name, row in result["strategies"].items()
            if row["least_bytes"] and row["sent_bytes"]
        }
        what = f"{result['config']} on {result['target']}, bytes sent over the theoretical minimum"
        yield what, ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()), ""
    elif "strategies" in result:
        rows = result["strategies"].values()
        for part, of in (("loss", "losses"), ("gradient", "the first gradient")):
            what = f"{result['config']} on {result['devices']} devices, {len(rows)} strategies: {of} against one device, at worst"
            yield what, f"{max(row[f'{part}_difference'] for row in rows):.0e}", ""
    elif "published" in result:
        parts = {"by formula": result["by_formula"], **result["families"], "compiled ahead": result.get("by_compiler")}
        for name, errors in parts.items():
            if errors is not None:
                what = f"training runs that others published, steps predicted within 20%, {name}"
                spread = f"median error {errors['median']:.0%}, at worst {errors['worst']:.0%}"
                yield what, f"{errors['close']} of {errors['rows']}", spread
    else:
        for part, error in result["worst"].items():
            yield f"prediction on {result['kind']}, error of {part} at worst", f"{error:.0%}", ""


def _figure(values: dict[str, float], form: str) -> tuple[str, str]:
    """Median, and smallest to largest."""
    return form.format(values["median"]), f"{form.format(values['min'])} to {form.format(values['max'])}"
