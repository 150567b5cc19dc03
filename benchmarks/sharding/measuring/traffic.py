"""`manyheads-bench sharding CONFIG --target ...`: communication and memory of each strategy, compiled for devices that are not
available, compared with the theoretical minimum of communication and the ideal share of the state."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

import jax
from rich import box
from rich.progress import track
from rich.table import Table

from benchmarks import record
from benchmarks.environments import compilers
from benchmarks.sharding.devices.targets import parse_target
from benchmarks.sharding.measuring.layouts import NAMES, command_of, layouts, subset, variants
from benchmarks.sharding.predict.ahead import Compiled, Compiler, require_any
from benchmarks.sharding.predict.analytic import sharded_bytes
from benchmarks.sharding.predict.least import SYMBOLS, least
from benchmarks.units import amount, duration
from train.config import load
from train.files import writing
from train.parallel.mesh import MESH_AXES, MeshConfig, Rules
from train.program.program import described_state
from train.report.display import console
from train.report.page import page, table
from transformer.errors import UserError

HEADS = (
    "strategy", "mesh", "formula", "minimum", "compiled", "compiled ÷ minimum", "state", "ideal state", "temporary", "step",
    "compile",
)  # fmt: skip


def run(
    path: str,
    target_name: str,
    *,
    overrides: tuple[str, ...] = (),
    strategies: list[str] | None = None,
    vary: Sequence[str] = (),
    python: str | None = None,
    install: bool = False,
    output: str | None = None,
) -> dict[str, Any]:
    """Compile the config under every strategy for the target; print a table, write figures and a page.

    Raises:
        UserError: no such target or strategy, no compiler for it, or every compile failed.
    """
    target = parse_target(target_name)
    config = dataclasses.replace(load(path, overrides), mesh=MeshConfig())
    target = dataclasses.replace(target, dtype=config.model.dtype)
    configs = variants(path, overrides, vary)
    if target.chip.platform == "gpu" and any(one.mesh.offload_optimizer for one in configs.values()):
        raise UserError(
            "mesh.offload_optimizer: got true; the compiler for GPUs leaves everything on the device when it compiles ahead; "
            "measure it on one, without --target"
        )
    if not compilers.covers(target.chip.platform, target.kind):
        raise UserError(
            f"sharding: no compiler's figures are known for {target.kind}; `plan` makes an estimate by formula for it"
        )
    folder = record.report_folder(output)
    if (found := compilers.find(target.chip.platform, python, make=install)) is None:
        raise UserError(f"sharding: {compilers.absent(target.chip.platform)}")
    # pmap needs real devices; it cannot use abstract ones.
    chosen, refused = layouts(configs, target.num_devices, [name for name in strategies or NAMES if name != "pmap"])
    one_device = dict.fromkeys(MESH_AXES, 1)
    compiler, rows = Compiler(target, found), {}
    compiled_steps: list[Compiled] = []
    try:
        for name, one in track(chosen.items(), description="compiling", transient=True):
            compiled = compiler.compile(one)
            compiled_steps.append(compiled)
            sizes = dict(zip(MESH_AXES, one.mesh.sizes(target.num_devices), strict=True))
            state = described_state(one)
            wanted = least(one, sizes, sum(leaf.size for leaf in jax.tree.leaves(state.params)))
            parts: dict[str, tuple[Any, Rules]] = {"parameters": (state.params, one.mesh.rules)}
            if not one.mesh.offload_optimizer:
                parts["optimizer"] = ((state.opt_state, state.ema), one.mesh.optimizer_rules)
            held = sum(sharded_bytes(tree, rules, sizes) for tree, rules in parts.values())
            whole = {part: sharded_bytes(tree, rules, one_device) for part, (tree, rules) in parts.items()}
            slices = sizes["fsdp"] * sizes["tensor"] * sizes["expert"] * sizes["pipeline"]
            of_parameters = slices if one.mesh.slices_parameters or sizes["fsdp"] == 1 else slices // sizes["fsdp"]
            rows[name] = {
                "mesh": {axis: size for axis, size in sizes.items() if size > 1},
                "least": [dataclasses.asdict(axis) for axis in wanted],
                "least_bytes": sum(axis.bytes for axis in wanted),
                "sent_bytes": sum(kind["bytes"] for kind in compiled.collectives),
                "state_bytes": held,
                "ideal_bytes": whole["parameters"] / of_parameters + whole.get("optimizer", 0.0) / slices,
                "compiled": dataclasses.asdict(dataclasses.replace(compiled, timeline=None)),
            }
    finally:
        compiler.close()
    require_any(compiled_steps, target)
    result = {"config": config.name, "target": target.name, "strategies": rows, "refused": refused}
    cells = [_cells(name, row) for name, row in rows.items()]
    grid = Table(title=f"{config.name} on {target.name}", title_justify="left", box=box.SIMPLE_HEAD)
    for head in HEADS:
        grid.add_column(head, justify="left" if head in HEADS[:3] else "right")
    for line in cells:
        grid.add_row(*line)
    out = console()
    out.print(grid)
    for name, why in refused.items():
        out.print(f"{name}: not possible for this model: {why}")
    name = f"traffic_{config.name}_{target.name.replace(':', '_')}{subset(strategies, vary)}"
    file = folder / f"{name}.html"
    title = f"{config.name} on {target.name}: what each strategy sends"
    text = page(title, [f"<p>{html.escape(SYMBOLS)}</p>", table(HEADS, cells, text=(0, 1, 2))])
    with writing(file):
        file.write_text(text, encoding="utf-8")
    print(f"report: {file}")
    command = command_of(path, strategies, vary, overrides, f"--target {target.name}")
    record.save(name, command, result, show=False, folder=folder)
    return result


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    compiled, wanted = row["compiled"], row["least_bytes"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
    formula = " + ".join(one["formula"] for one in row["least"])
    if compiled["prediction"] is None:
        return [
            name,
            mesh,
            formula,
            amount(wanted),
            compiled["error"] or "",
            "",
            amount(row["state_bytes"]),
            amount(row["ideal_bytes"]),
            "",
            "",
            "",
        ]
    return [
        name, mesh, formula, amount(wanted), amount(row["sent_bytes"]), f"{row['sent_bytes'] / wanted:.3f}" if wanted else "–",
        amount(row["state_bytes"]), f"{row['state_bytes'] / row['ideal_bytes'] - 1:+.2%}", amount(compiled["temporary"]),
        duration(compiled["prediction"]["seconds"]), duration(compiled["seconds_to_compile"]),
    ]  # fmt: skip
