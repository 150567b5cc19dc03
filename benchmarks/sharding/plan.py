"""`manyheads-bench plan`: ranks shardings for accelerators that need not be available, and checks that they fit.

Every layout is estimated by formulas; the most promising are compiled by the target's own compiler, and ranked by the
compiled programs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import compilers, record
from benchmarks.sharding import plan_report
from benchmarks.sharding.ahead import Compiled, Compiler, from_data, refused, require_any
from benchmarks.sharding.analytic import Analysis, Estimate
from benchmarks.sharding.candidates import candidates, describe
from benchmarks.sharding.targets import Target, parse_target
from benchmarks.units import duration
from train.config import RunConfig, dump, load, to_data
from train.files import cache_dir, writing
from train.parallel.mesh import MESH_AXES
from train.report.display import console
from transformer.errors import UserError
from transformer.interpret.capture import readable
from transformer.models.families import flops_per_token

CANDIDATES = 24
PREDICTOR = 4
"""Version of the analysis of compiled programs, so that the cache returns no results of an older analysis."""


@dataclasses.dataclass
class Entry:
    """A layout with its estimate and compiled figures."""

    config: RunConfig
    estimate: Estimate
    compiled: Compiled | None = None

    @property
    def seconds(self) -> float:
        """Seconds of a step: from the compiled program, else by formula."""
        if self.compiled is not None and self.compiled.prediction is not None:
            return self.compiled.prediction["seconds"]
        return self.estimate.seconds

    def fits(self, target: Target) -> bool:
        """Whether it fits into a device's memory, by the compiler, else by formula."""
        return self.compiled.fits if self.compiled is not None else self.estimate.memory <= target.chip.memory


def run(
    path: str,
    target_name: str,
    *,
    overrides: tuple[str, ...] = (),
    number: int = CANDIDATES,
    python: str | None = None,
    install: bool = False,
    analytic: bool = False,
    tokens: float | None = None,
    workers: int | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Rank layouts of a config on a target, print them, and write a report, the figures and the best config.

    Args:
        path: of a config, whose batch size is kept.
        number: how many layouts to compile.
        python: interpreter of an environment with the target's compiler; the one installed before by default.
        install: make that environment if there is none.
        analytic: compile nothing.
        tokens: of a whole training, to report its duration.
        workers: number of processes that compile concurrently.
        output: folder of the report and the config; `plans` by default.

    Raises:
        UserError: no such target, no layout that divides the model's sizes, no compiler at the given path, or every compile
            failed.
    """
    target, config = parse_target(target_name), load(path, overrides)
    target = dataclasses.replace(target, dtype=config.model.dtype).profiled()
    folder = record.report_folder(output)
    start = time.monotonic()
    entries = estimated(config, target)
    chosen = promising(entries, target, number)
    fitting = sum(entry.fits(target) for entry in entries)
    print(
        f"{config.name} on {target.name}: {len(entries)} layouts by formula in {time.monotonic() - start:.1f} s, "
        f"{fitting} of them fit; the best is {describe(chosen[0].config)}: "
        f"{duration(chosen[0].seconds)}, {readable(int(chosen[0].estimate.memory))} a device",
        flush=True,
    )
    compiler = None
    if not analytic:
        compiler = compilers.find(target.chip.platform, python, make=install)
        if compiler is None:
            print(f"this plan is by formula only: {compilers.absent(target.chip.platform)}", flush=True)
    stopped, kept = False, 0
    if compiler is not None:
        stopped, kept = compile_all(chosen, target, compiler, workers or min(os.cpu_count() or 1, 4))
        if not stopped:
            require_any((entry.compiled for entry in chosen), target)
    result = summarised(config, target, chosen, tokens, len(entries), time.monotonic() - start, stopped, kept)
    result["fitting"] = fitting
    name = f"{config.name}_{target.name.replace(':', '_')}"
    best = ranked(chosen, target)[0]
    with writing(folder):
        if best.fits(target):
            (folder / f"{name}.yaml").write_text(dump(best.config), encoding="utf-8")
        plan_report.write(result, folder / f"{name}.html")
    plan_report.show(result, console())
    written = f"best config: {folder / name}.yaml; " if best.fits(target) else ""
    print(f"{written}report: {folder / name}.html")
    if result["compiled"]:
        command = " ".join([f"manyheads-bench plan {path} --target {target.name}", *overrides])
        record.save(f"plan_{name}", command, result, show=False, folder=folder)
    return result


def estimated(config: RunConfig, target: Target) -> list[Entry]:
    """Every layout with its estimate, the fastest that fits first.

    Raises:
        UserError: there is none.
    """
    analysis = Analysis(config)
    entries = [Entry(one, analysis.estimate(one, target)) for one in candidates(config, target)]
    if not entries:
        raise UserError(
            f"plan: no layout over {target.num_devices} devices divides batch_size {config.batch_size}, the heads and the "
            "widths of the model; try a batch_size that is a multiple of the devices"
        )
    return sorted(entries, key=lambda entry: (not entry.fits(target), entry.seconds))


def promising(entries: list[Entry], target: Target, number: int) -> list[Entry]:
    """The `number` layouts to compile, best first: those that may fit, at most two settings of one mesh before others, and
    at most a sixth of them pipelines, whose many schedules would otherwise fill the list."""
    likely = [entry for entry in entries if entry.estimate.memory <= 1.4 * target.chip.memory] or entries
    likely = sorted(likely, key=lambda entry: entry.seconds * (1 if entry.fits(target) else 1.2))
    first: list[Entry] = []
    later: list[Entry] = []
    seen: dict[Any, int] = {}
    for entry in likely:
        mesh, most = entry.config.mesh, 2
        key: Any = mesh
        if (mesh.pipeline or 1) > 1:
            key, most = "pipeline", max(number // 6, 1)
        seen[key] = seen.get(key, 0) + 1
        (first if seen[key] <= most else later).append(entry)
    chosen = [*first, *later][:number]
    # The reference for every other layout, whatever its rank by formula.
    plain = next((entry for entry in likely if _is_plain(entry.config)), None)
    if plain is not None and plain not in chosen:
        chosen[-1] = plain
    return chosen


def _is_plain(config: RunConfig) -> bool:
    """Whether every device has the whole model, and its share of the batch."""
    return all((getattr(config.mesh, axis) or 1) == 1 for axis in MESH_AXES if axis != "data")


def compile_all(entries: list[Entry], target: Target, python: str, workers: int) -> tuple[bool, int]:
    """Compile the entries in order; return whether it was stopped from the keyboard, and how many were cached."""
    versions = _versions(python, target)
    open_ones: queue.Queue[Entry] = queue.Queue()
    for entry in entries:
        kept = _kept(entry.config, target, versions)
        if kept.exists():
            entry.compiled = from_data(json.loads(kept.read_text(encoding="utf-8")))
        else:
            open_ones.put(entry)
    known = len(entries) - open_ones.qsize()
    running: list[Compiler] = []
    stopping = threading.Event()

    def work(progress: Progress, task: Any) -> None:
        compiler = Compiler(target, python)
        running.append(compiler)
        while True:
            try:
                entry = open_ones.get_nowait()
            except queue.Empty:
                return compiler.close()
            try:
                entry.compiled = compiler.compile(entry.config)
            except UserError as error:
                if stopping.is_set():
                    return None
                # Some programs crash the compiler; the others get a new process.
                progress.console.print(f"{describe(entry.config)}: {error}", highlight=False)
                entry.compiled = refused(error, 0.0, target)
                running.remove(compiler)
                compiler.close()
                compiler = Compiler(target, python)
                running.append(compiler)
                progress.update(task, advance=1)
                continue
            if entry.compiled.memory is not None:
                path = _kept(entry.config, target, versions)
                with writing(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(dataclasses.asdict(entry.compiled)), encoding="utf-8")
            else:
                progress.console.print(f"{describe(entry.config)}: {entry.compiled.error}", highlight=False)
            progress.update(task, advance=1, best=_best_line(entries, target))

    columns = (
        TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("best so far: {task.fields[best]}"),
    )  # fmt: skip
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("", total=len(entries), completed=known, best=_best_line(entries, target))
            done = [pool.submit(work, progress, task) for _ in range(min(workers, open_ones.qsize()))]
            for future in concurrent.futures.as_completed(done):
                future.result()
        return False, known
    except KeyboardInterrupt:
        return True, known
    finally:
        stopping.set()
        with open_ones.mutex:
            open_ones.queue.clear()
        for compiler in running:
            compiler.close()
        pool.shutdown(wait=False, cancel_futures=True)


def ranked(entries: list[Entry], target: Target) -> list[Entry]:
    """Sort key: compiled before estimated, fitting before others, the fastest first."""
    return sorted(entries, key=lambda entry: (not entry.fits(target), entry.compiled is None, entry.seconds))


def summarised(
    config: RunConfig, target: Target, entries: list[Entry], tokens: float | None, considered: int, seconds: float,
    stopped: bool, kept: int,
) -> dict[str, Any]:  # fmt: skip
    """The ranking as plain data."""
    per_step = config.batch_size * config.sequence_length
    flops = 3 * flops_per_token(config.model, config.sequence_length) * per_step
    rows: list[dict[str, Any]] = []
    has_compiled = any(entry.compiled is not None for entry in entries)
    for entry in ranked(entries, target):
        if has_compiled and entry.compiled is None:
            continue
        compiled = dataclasses.asdict(entry.compiled) if entry.compiled is not None else None
        rows.append(
            {
                "layout": describe(entry.config),
                "mesh": {name: value for name, value in to_data(entry.config)["mesh"].items() if value is not None},
                "remat": entry.config.model.remat,
                "microbatches": entry.config.microbatches,
                "fits": entry.fits(target),
                "seconds": entry.seconds,
                "tokens_per_second": per_step / entry.seconds,
                "mfu": flops / entry.seconds / (target.num_devices * target.peak_flops),
                "memory": entry.estimate.memory
                if compiled is None or compiled["memory"] is None
                else compiled["memory"],
                "estimate": dataclasses.asdict(entry.estimate) | {"memory": entry.estimate.memory},
                "compiled": compiled,
            }
        )
    result: dict[str, Any] = {
        "config": config.name,
        "target": target.name,
        "devices": target.num_devices,
        "device_memory": target.chip.memory,
        "basis": target.basis,
        "tokens_per_step": per_step,
        "considered": considered,
        "compiled": sum(entry.compiled is not None and not entry.compiled.failed for entry in entries),
        "failed": [entry.compiled.error for entry in entries if entry.compiled is not None and entry.compiled.failed],
        "seconds": seconds,
        "stopped": stopped,
        "kept_from_before": kept,
        "layouts": rows,
    }
    if tokens is not None and rows:
        took = tokens / float(rows[0]["tokens_per_second"])
        result["training"] = {"tokens": tokens, "days": took / 86400, "device_hours": took / 3600 * target.num_devices}
    return result


def _best_line(entries: list[Entry], target: Target) -> str:
    best = ranked(entries, target)[0]
    return f"{describe(best.config)}, {duration(best.seconds)}"


def _versions(python: str, target: Target) -> str:
    """The compiler's version, which is part of the cache key."""
    packages = ("jaxlib", *(name.replace("_", "-") for name in compilers.PACKAGES[target.chip.platform]))
    code = (
        "import importlib.metadata as m\n"
        f"for name in {packages}:\n  try: print(name, m.version(name))\n  except m.PackageNotFoundError: pass"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout


def _kept(config: RunConfig, target: Target, versions: str) -> Path:
    """The cache file of a result, named by everything that determines it."""
    content = [
        dataclasses.asdict(config.model), dataclasses.asdict(config.mesh), dataclasses.asdict(config.optimizer),
        dataclasses.asdict(config.loss), dataclasses.asdict(config.objective), config.data.packing, config.batch_size,
        config.sequence_length, config.microbatches, dataclasses.asdict(target), versions, PREDICTOR,
    ]  # fmt: skip
    key = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()
    return cache_dir() / "plans" / f"{key}.json"
