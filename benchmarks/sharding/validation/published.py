"""`manyheads-bench plan --published`: training runs that others published, against their steps as predicted here.

Each is predicted by formula, and with a compiler also from the program that the target's compiler makes. Predictions rest on the
chips' published figures alone, never on a profile of the user's own, so that they are the same everywhere.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import statistics
import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks import record
from benchmarks.environments import compilers
from benchmarks.sharding.planning.compiling import compile_all
from benchmarks.sharding.planning.entry import Entry
from benchmarks.sharding.predict.ahead import Compiled
from benchmarks.sharding.predict.analytic import Analysis, Estimate, basis, efficiencies
from benchmarks.sharding.validation.published_fit import Step, by_halves, fitted, leave_one_out
from benchmarks.sharding.validation.published_runs import PublishedRun, published_runs
from benchmarks.units import duration
from train.config import RunConfig
from train.parallel.mesh import MeshConfig
from train.report.display import console
from transformer.errors import UserError
from transformer.interpret.capture import readable

CLOSE = 0.2
"""The largest error of a prediction that counts as close."""
FAMILIES = {"tpu": "TPU", "gpu": "NVIDIA"}
"""Kinds of chips by their platform; no published run is of another vendor's."""


def run(
    only: Sequence[str] | None = None, *, compiled: bool = False, python: str | None = None, output: str | None = None
) -> dict[str, Any]:
    """Predict the published runs, print the table and the errors, and record them if they are all of them, or in `output`.

    Args:
        only: names of some of the runs.
        compiled: also compile each ahead, where its compiler is installed.
        python: interpreter of an environment with the targets' compiler, instead of the one installed before.
        output: folder of the record; by default that of the published ones, for all runs.

    Raises:
        UserError: no run has one of these names, or nothing can be compiled.
    """
    runs = published_runs(only)
    folder = record.report_folder(output) if output else None
    result = compared(runs, compiled=compiled, python=python, whole=only is None)
    console().print(table(result["published"]))
    for line in sentences(result):
        print(line)
    if only is None or output:
        names = ["--only", *only] if only else []
        command = ["manyheads-bench", "plan", "--published", *(["--compile"] if compiled else []), *names]
        record.save("published", shlex.join(command), result, show=False, folder=folder)
    return result


def compared(
    runs: Sequence[PublishedRun], *, compiled: bool = False, python: str | None = None, whole: bool = True
) -> dict[str, Any]:
    """Published and predicted steps, and the errors, as plain data.

    Args:
        compiled, python: as for `run`.
        whole: also fit the formula's efficiencies to these runs, of which a family has two or more.
    """
    began = time.monotonic()
    estimates = estimated(runs)
    programs = compiled_ahead(runs, estimates, python) if compiled else {}
    rows = [_row(one, estimates[one.name], programs.get(one.name)) for one in runs]
    result = {"published": rows} | judged(rows) | ({"fits": fits(runs, estimates)} if whole else {})
    return result | {"seconds": time.monotonic() - began}


def estimated(runs: Sequence[PublishedRun]) -> dict[str, Estimate]:
    """The estimate of each run by formula; runs of one model share what is traced of it."""
    analyses: dict[RunConfig, Analysis] = {}
    found = {}
    for one in runs:
        model = dataclasses.replace(one.config.model, remat="none")
        shared = dataclasses.replace(
            one.config, name="published", model=model, mesh=MeshConfig(), batch_size=1, microbatches=1
        )
        if shared not in analyses:
            analyses[shared] = Analysis(shared)
        found[one.name] = analyses[shared].estimate(one.config, one.target)
    return found


def compiled_ahead(
    runs: Sequence[PublishedRun], estimates: dict[str, Estimate], python: str | None
) -> dict[str, Compiled]:
    """What the targets' compilers find of the runs, as for a plan, whose cache it shares; Ctrl-C keeps what was compiled.

    Raises:
        UserError: there is no compiler for any of the runs.
    """
    platforms = {one.target.chip.platform for one in runs}
    pythons: dict[str, str | None] = {}
    for platform in platforms:
        try:
            pythons[platform] = compilers.find(platform, python)
        except UserError:
            # An interpreter that is given has the compiler of one platform.
            if len(platforms) == 1:
                raise
            pythons[platform] = None
    if not any(pythons.values()):
        absent = " or ".join(sorted(platforms))
        raise UserError(
            f"plan --published --compile: no compiler for {absent}; a plan for such a target with --install makes an "
            "environment with it, --compiler-python PATH names an existing one"
        )
    entries = {one.name: Entry(one.config, estimates[one.name]) for one in runs}
    for target in {one.target.name: one.target for one in runs}.values():
        if (interpreter := pythons[target.chip.platform]) is None:
            continue
        print(f"{target.name}: compiling", flush=True)
        some = [entries[one.name] for one in runs if one.target == target]
        stopped, _ = compile_all(some, target, interpreter, min(os.cpu_count() or 1, 4, len(some)))
        if stopped:
            break
    return {name: entry.compiled for name, entry in entries.items() if entry.compiled is not None}


def bound_of(estimate: Estimate) -> str:
    """The largest part of a step."""
    parts = {"matmul": estimate.arithmetic, "memory": estimate.traffic, "links": estimate.sending}
    return max(parts, key=lambda part: parts[part])


def _row(one: PublishedRun, estimate: Estimate, compiled: Compiled | None) -> dict[str, Any]:
    published = one.seconds
    row: dict[str, Any] = {
        "name": one.name, "source": one.source, "assumed": one.assumed, "target": one.target.name,
        "family": FAMILIES[one.target.chip.platform], "figure": one.figure, "unit": one.unit, "seconds": published,
        "estimate": dataclasses.asdict(estimate) | {"memory": estimate.memory},
        "error": estimate.seconds / published - 1, "fits": estimate.memory <= one.target.chip.memory,
        "bound": bound_of(estimate), "basis": basis(one.target),
    }  # fmt: skip
    if compiled is not None:
        prediction = compiled.prediction
        row["compiled"] = {
            "seconds": None if prediction is None else prediction["seconds"],
            "error": None if prediction is None else prediction["seconds"] / published - 1,
            "bound": None if prediction is None else prediction["bound"],
            "parts": {name: prediction[name] for name in ("compute", "memory", "exposed", "gaps")} if prediction else None,
            "memory": compiled.memory, "fits": compiled.fits, "message": compiled.error,
            "seconds_to_compile": compiled.seconds_to_compile,
        }  # fmt: skip
    return row


def judged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far the predictions are from what was published: over all rows and by family of chips, by formula and compiled."""
    families = {name: [row for row in rows if row["family"] == name] for name in FAMILIES.values()}
    compiled = [row["compiled"]["error"] for row in rows if row.get("compiled", {}).get("error") is not None]
    return {
        "by_formula": _summary([row["error"] for row in rows]),
        "families": {name: _summary([row["error"] for row in some]) for name, some in families.items() if some},
    } | ({"by_compiler": _summary(compiled)} if compiled else {})


def fits(runs: Sequence[PublishedRun], estimates: dict[str, Estimate]) -> dict[str, Any]:
    """The formula's two efficiencies as these runs fit them, by family of chips, and the errors of runs left out of a fit."""
    found = {}
    for platform, family in FAMILIES.items():
        steps = [
            Step.of(estimates[one.name], efficiencies(one.target), one.seconds)
            for one in runs
            if one.target.chip.platform == platform and one.fitted
        ]
        products, memory = fitted(steps)
        found[family] = {
            "products": products, "memory": memory, "leave_one_out": _summary(leave_one_out(steps)),
            "by_halves": _summary(by_halves(steps)),
        }  # fmt: skip
    return found


def _summary(errors: Sequence[float]) -> dict[str, float]:
    sizes = sorted(abs(error) for error in errors)
    return {
        "rows": len(errors),
        "close": sum(size <= CLOSE for size in sizes),
        "median": statistics.median(sizes),
        "worst": sizes[-1],
        "mean": statistics.mean(errors),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line for each run."""
    has_compiled = any("compiled" in row for row in rows)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    heads = ["run", "target", "published", "step", "by formula", "error", "bound by", "memory"]
    for head in [*heads, *(("compiled", "error") if has_compiled else ())]:
        grid.add_column(head, justify="left" if head in ("run", "target", "bound by") else "right", no_wrap=True)
    for row in rows:
        estimate, program = row["estimate"], row.get("compiled", {})
        too_much = "" if row["fits"] else " (too much)"
        cells = [
            row["name"], row["target"], f"{row['figure']:,g} {row['unit']}", duration(row["seconds"]),
            duration(estimate["seconds"]), f"{row['error']:+.0%}", row["bound"], readable(int(estimate["memory"])) + too_much,
        ]  # fmt: skip
        if has_compiled:
            known = program.get("error") is not None
            cells += [duration(program["seconds"]), f"{program['error']:+.0%}"] if known else ["", ""]
        grid.add_row(*cells)
    return grid


def sentences(result: dict[str, Any]) -> list[str]:
    """The errors over all rows."""
    lines = [
        f"{what}: {found['close']} of {found['rows']} within {CLOSE:.0%}; median {found['median']:.0%}, worst "
        f"{found['worst']:.0%}, mean {found['mean']:+.0%}"
        for what, found in (
            ("by formula", result["by_formula"]),
            *((f"of them {name}", found) for name, found in result["families"].items()),
            *((("by the target's compiler", result["by_compiler"]),) if "by_compiler" in result else ()),
        )
    ]
    for family, found in result.get("fits", {}).items():
        one, half = found["leave_one_out"], found["by_halves"]
        lines.append(
            f"{family}, fitted to {one['rows']} of them: products reach {found['products']:.0%}, all other work "
            f"{found['memory']:.0%} of the bandwidth; within {CLOSE:.0%} are {one['close']} if each is left out of it (worst "
            f"{one['worst']:.0%}), and {half['close']} if a half is, by every second run (worst {half['worst']:.0%})"
        )
    large = sum(not row["fits"] for row in result["published"])
    lines.append(
        f"memory by formula: {large} of {len(result['published'])} are too large for their devices, and all of them ran"
    )
    misses = [row["name"] for row in result["published"] if abs(row["error"]) > CLOSE]
    if misses:
        lines.append(f"missed by more: {', '.join(misses)}")
    return [*lines, f"in {result['seconds']:.0f} s"]
