"""Compiles the layouts of a plan in several processes, and keeps what was found for later plans."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import queue
import threading
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.environments import compilers
from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.planning.candidates import describe
from benchmarks.sharding.planning.entry import Entry, ranked
from benchmarks.sharding.planning.objective import Objective
from benchmarks.sharding.predict.ahead import Compiler, from_data, refused
from benchmarks.units import duration
from train.config import RunConfig
from train.files import cache_dir, writing
from transformer.errors import UserError

PREDICTOR = 5
"""Version of the analysis of compiled programs, so that the cache returns no results of an older analysis."""


def compile_all(
    entries: list[Entry], target: Target, python: str, workers: int, objective: Objective = "time"
) -> tuple[bool, int]:
    """Compile the entries in order; return whether it was stopped from the keyboard, and how many were cached."""
    versions = json.dumps(compilers.versions_of(python))
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
        if stopping.is_set():
            return compiler.close()
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
            progress.update(task, advance=1, best=_best_line(entries, target, objective))

    columns = (
        TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("best so far: {task.fields[best]}"),
    )  # fmt: skip
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        with Progress(*columns) as progress:
            task = progress.add_task(
                "", total=len(entries), completed=known, best=_best_line(entries, target, objective)
            )
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


def _best_line(entries: list[Entry], target: Target, objective: Objective) -> str:
    best = ranked(entries, target, objective)[0]
    return f"{describe(best.config)}, {duration(best.seconds)}"


def _kept(config: RunConfig, target: Target, versions: str) -> Path:
    """The cache file of a result, named by everything that determines it."""
    content = [
        dataclasses.asdict(config.model), dataclasses.asdict(config.mesh), dataclasses.asdict(config.optimizer),
        dataclasses.asdict(config.loss), dataclasses.asdict(config.objective), config.data.packing, config.batch_size,
        config.sequence_length, config.microbatches, dataclasses.asdict(target), versions, PREDICTOR,
    ]  # fmt: skip
    key = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()
    return cache_dir() / "plans" / f"{key}.json"
