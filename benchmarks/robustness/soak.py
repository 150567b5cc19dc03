"""A long run with evaluations, checkpoints, samples and logs: whether its memory and open files stay as they are."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.record import folder_for, save
from benchmarks.robustness.resume import config_of
from train.config import dump, to_data
from train.config.load import parse
from train.examine.interrupted import Layout, Running, last_step
from train.files import check_new, writing
from train.run.run_files import read_metrics

DIRECTORY = "runs/soak"
_WARM_UP = 0.25
"""The part of the steps after which nothing is new to the process any more."""
_WINDOW = 0.1
"""The part of the steps over which a value is taken: the median of what was seen."""


def run(steps: int, directory: str) -> None:
    """Train for `steps` steps in a process of its own, look at it all the time, and store what was seen.

    Raises:
        UserError: the run fails, or the folder is there already.
    """
    folder = Path(directory)
    check_new(folder)
    with writing(folder):
        folder.mkdir(parents=True)
    sections = {
        "evaluation": {"every": 100}, "checkpoint": {"every": 100}, "sample": {"every": 100, "max_tokens": 16},
        "log": {"every": 10},
    }  # fmt: skip
    data = to_data(config_of("gpt"))
    config = parse(
        {**data, "steps": steps, **{name: data[name] | section for name, section in sections.items()}}, "soak"
    )
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    one = folder / "run"
    running = Running(folder / "config.yaml", one, Layout(1))
    seen: list[dict[str, Any]] = []
    while running.is_alive:
        if (found := _look_at(running.pid)) is not None:
            seen.append({"step": last_step(one), "seconds": time.monotonic(), **found})
        time.sleep(0.25)
    running.finish()
    command_line = f"manyheads-bench soak --steps {steps}"
    figures = _figures(seen, steps, read_metrics(one).get("checkpoint/stall_seconds", {}))
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")
    save("soak", command_line, {"soak": figures}, folder=folder_for(directory, DIRECTORY, "soak", command_line))


def _figures(seen: list[dict[str, Any]], steps: int, stalls: dict[int, float]) -> dict[str, Any]:
    during = [one for one in seen if one["step"] > 0]
    first = [one for one in during if _WARM_UP <= one["step"] / steps < _WARM_UP + _WINDOW]
    last = [one for one in during if one["step"] / steps >= 1 - _WINDOW]

    def of(part: list[dict[str, Any]], name: str) -> float:
        return statistics.median(one[name] for one in part)

    seconds = during[-1]["seconds"] - during[0]["seconds"]
    return {
        "steps": steps,
        "checkpoints": len(stalls),
        "resident_mebibytes": {
            "after_warm_up": of(first, "resident") / 2**20,
            "at_the_end": of(last, "resident") / 2**20,
        },
        "resident_growth": of(last, "resident") / of(first, "resident") - 1,
        "open_files": {"after_warm_up": of(first, "files"), "at_the_end": of(last, "files")},
        "threads": {"after_warm_up": of(first, "threads"), "at_the_end": of(last, "threads")},
        "checkpoint_stall": sum(stalls.values()) / seconds,
        "seconds": seconds,
    }


def _look_at(pid: int) -> dict[str, int] | None:
    """Resident memory in bytes, open files and threads of a process; None once it has ended."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        )
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return {"resident": int(status["VmRSS"].split()[0]) * 1024, "files": files, "threads": int(status["Threads"])}
    except (OSError, KeyError):
        return None
