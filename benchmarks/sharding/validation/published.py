"""`manyheads-bench plan --published`: training runs that others published, against their steps as predicted here.

Each is predicted by formula, and with a compiler also from the program that the target's compiler makes. Predictions rest on the
chips' published figures alone, never on a profile of the user's own, so that they are the same everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks import record
from benchmarks.environments import compilers
from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.predict.ahead import Compiled, Compiler, refused
from benchmarks.sharding.predict.analytic import Analysis, Estimate
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
    only: Sequence[str] | None = None, *, compiled: bool = False, limit: float = 600.0, python: str | None = None
) -> dict[str, Any]:
    """Predict the published runs, print the table and the errors, and record them if they are all of them.

    Args:
        only: names of some of the runs.
        compiled: also compile each ahead, where its compiler is installed.
        limit: seconds for each compile.
        python: interpreter of an environment with the targets' compiler, instead of the one installed before.

    Raises:
        UserError: no run has one of these names, or nothing can be compiled.
    """
    runs = published_runs(only)
    began = time.monotonic()
    estimates = estimated(runs)
    programs = dict(compiled_ahead(runs, limit, python)) if compiled else {}
    rows = [_row(one, estimates[one.name], programs.get(one.name)) for one in runs]
    result = {"published": rows} | judged(rows) | {"seconds": time.monotonic() - began}
    console().print(table(rows))
    for line in sentences(result):
        print(line)
    if only is None:
        flag = " --compile" if compiled else ""
        record.save("published", f"manyheads-bench plan --published{flag}", result, show=False)
    return result


def estimated(runs: Sequence[PublishedRun]) -> dict[str, Estimate]:
    """The estimate of each run by formula; runs of one model share what is traced of it."""
    analyses: dict[RunConfig, Analysis] = {}
    found = {}
    for one in runs:
        model = dataclasses.replace(one.config.model, remat="none")  # type: ignore[arg-type]
        shared = dataclasses.replace(
            one.config, name="published", model=model, mesh=MeshConfig(), batch_size=1, microbatches=1
        )
        if shared not in analyses:
            analyses[shared] = Analysis(shared)
        found[one.name] = analyses[shared].estimate(one.config, one.target)
    return found


def compiled_ahead(
    runs: Sequence[PublishedRun], limit: float, python: str | None
) -> Iterator[tuple[str, Compiled]]:
    """What the targets' compilers find of the runs, each of which may take `limit` seconds.

    Raises:
        UserError: there is no compiler for any of the runs.
    """
    pythons = {platform: compilers.find(platform, python) for platform in {one.target.chip.platform for one in runs}}
    if not any(pythons.values()):
        raise UserError(f"plan --published --compile: {compilers.absent(next(iter(pythons)))}")
    for one in runs:
        interpreter = pythons[one.target.chip.platform]
        if interpreter is None:
            continue
        with contextlib.closing(Compiler(one.target, interpreter)) as compiler:
            try:
                found = compiler.compile(one.config, timeout=limit)
            except UserError as error:
                found = refused(error, limit, one.target)
        took = f"{found.seconds_to_compile:.0f} s" if found.error is None else found.error
        print(f"{one.name}: compiled: {took}", flush=True)
        yield one.name, found


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
        "bound": bound_of(estimate), "basis": one.target.basis,
    }  # fmt: skip
    if compiled is not None:
        prediction = compiled.prediction
        row["compiled"] = {
            "seconds": None if prediction is None else prediction["seconds"],
            "error": None if prediction is None else prediction["seconds"] / published - 1,
            "bound": None if prediction is None else prediction["bound"],
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
    misses = [row["name"] for row in result["published"] if abs(row["error"]) > CLOSE]
    if misses:
        lines.append(f"missed by more: {', '.join(misses)}")
    return [*lines, f"in {result['seconds']:.0f} s"]
