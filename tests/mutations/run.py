"""Runs thousands of mutants: bad configs, files, checkpoints and arguments, none of which may end in a traceback.

    python -m tests.mutations.run --count 5000 --out benchmarks/results/mutations.json
    python -m tests.mutations.run --kind config --seed 17 --count 1

The second command runs one of them again.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.mutations.worker import environment

SHARES = {"config": 44, "data": 26, "tokenizer": 12, "run": 4, "weights": 10, "arguments": 4}
"""Mutants of each kind, in a hundred."""
SECONDS = 20.0
"""The time that a call may take."""
Outcome = dict[str, Any]


class Worker:
    """A process that runs mutants, started again where one of them ended it."""

    def __init__(self, work: Path, seconds: float) -> None:
        self._work, self._seconds, self._log = work, seconds, work / "worker.log"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def run(self, kind: str, seed: int) -> Outcome:
        """What became of a mutant."""
        found = self._answer(kind, seed)
        if found.get("message", "").startswith("not done"):
            # A program may have been compiled meanwhile, or the machine been busy.
            found = self._answer(kind, seed)
        return found

    def _answer(self, kind: str, seed: int) -> Outcome:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{kind} {seed}\n")
        process.stdin.flush()
        if line := process.stdout.readline():
            return json.loads(line)
        where = f"the process ended with status {process.wait()}"
        self._stop()
        said = self._log.read_text(encoding="utf-8", errors="replace")[-2_000:]
        return {"kind": kind, "seed": seed, "about": "", "what": "finding", "message": said, "where": where}

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.mutations.worker", str(self._work), str(self._seconds)],
                cwd=Path(__file__).parents[2], env=environment(self._work), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            said = self._log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the process that runs mutants did not start:\n{said}")
        return self._process

    def _stop(self) -> None:
        if self._process is None:
            return
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        self._process.kill()
        self._process.wait()
        self._process = None


def outcomes(
    mutants: Sequence[tuple[str, int]], work: Path, seconds: float = SECONDS, jobs: int = 1
) -> Iterator[Outcome]:
    """What became of each mutant, given as kind and seed, in any order.

    Args:
        jobs: number of processes.
    """
    waiting: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def run(one: tuple[str, int]) -> Outcome:
        worker = waiting.get()
        try:
            return worker.run(*one)
        finally:
            waiting.put(worker)

    with contextlib.ExitStack() as stack:
        for number in range(jobs):
            # Each has material of its own, and looks whether it is as it was.
            folder = work / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            waiting.put(stack.enter_context(Worker(folder, seconds)))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(jobs))
        for future in concurrent.futures.as_completed([pool.submit(run, one) for one in mutants]):
            yield future.result()


def planned(count: int, first: int = 0, kind: str | None = None) -> list[tuple[str, int]]:
    """Mutants of one kind, or of all by their shares: their kinds and seeds."""
    if kind is not None:
        return [(kind, first + number) for number in range(count)]
    each = {name: max(1, round(count * share / 100)) for name, share in SHARES.items()}
    return [(name, first + number) for name, many in each.items() for number in range(many)]


def summary(found: Sequence[Outcome]) -> dict[str, Any]:
    """Counts by kind and outcome, the seeds, and all findings."""
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(one["kind"] for one in found):
        own = [one for one in found if one["kind"] == kind]
        counts = collections.Counter(one["what"] for one in own)
        seeds = [one["seed"] for one in own]
        kinds[kind] = {
            "mutants": len(own), "refused": counts["refused"], "accepted": counts["accepted"], "findings": counts["finding"],
            "seeds": [min(seeds), max(seeds)],
        }  # fmt: skip
    names = ("mutants", "refused", "accepted", "findings")
    total = {name: sum(one[name] for one in kinds.values()) for name in names}
    return {"kinds": kinds, "total": total, "findings": [one for one in found if one["what"] == "finding"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.run", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="how many mutants (500)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed of each kind (0)")
    parser.add_argument("--kind", choices=list(SHARES), help="mutants of this kind alone")
    parser.add_argument("--limit", type=float, default=SECONDS, metavar="S", help=f"seconds of one call ({SECONDS:g})")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes run them (1)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a folder for runs and caches, kept for the next time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the counts and findings here")
    parser.add_argument("--show", action="store_true", help="print every mutant, with what the user is told")
    options = parser.parse_args(arguments)
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console, found = Console(highlight=False, soft_wrap=True, stderr=True), []
    mutants = planned(options.count, options.seed, options.kind)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutations-")))
        progress = stack.enter_context(Progress(*columns, console=console, disable=not console.is_terminal))
        task = progress.add_task("mutants", total=len(mutants))
        for one in outcomes(mutants, work.absolute(), options.limit, options.jobs):
            found.append(one)
            progress.update(task, advance=1, description=one["kind"])
            if one["what"] == "finding" or options.show:
                line = f"{one['what']}: --kind {one['kind']} --seed {one['seed']} --count 1\n    {one['about']}"
                console.print(f"{line}\n    {one['message']!r}\n    {one['where']}", markup=False)
    place = {one: number for number, one in enumerate(mutants)}
    result = summary(sorted(found, key=lambda one: place[one["kind"], one["seed"]]))
    for kind, counts in result["kinds"].items():
        console.print(f"{kind:10} {', '.join(f'{value} {name}' for name, value in counts.items())}", markup=False)
    if options.out is not None:
        _write(options.out, result, sys.argv[1:] if arguments is None else arguments)
    return 1 if result["findings"] else 0


def _write(path: Path, result: dict[str, Any], arguments: Sequence[str]) -> None:
    from benchmarks.record import with_origin

    record = with_origin(f"python -m tests.mutations.run {' '.join(arguments)}", result)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
