"""Runs of four families that are killed at random moments, and moved between numbers of devices and processes.

Each is held against a run without interruption (`manyheads verify-resume`): in one layout bit for bit, across layouts by the
examples of each step and by losses.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.record import folder_for, save
from benchmarks.stage import folder_of, kept
from train.config import RunConfig
from train.config.load import parse
from train.data.prepared.prepare import prepare
from train.examine.interrupted import Layout
from train.examine.verify_resume import REPORT, TOLERANCE, verify_resume
from train.run.begin import batches_of
from transformer.errors import UserError

DIRECTORY = "runs/resume"
_LENGTH = 32
_TEXTS = str(Path(__file__).parents[2] / "docs" / "**" / "*.md")
_COMMON: dict[str, Any] = {
    "steps": 40, "batch_size": 8, "length": _LENGTH, "optimizer": {"learning_rate": 0.003, "warmup_steps": 5},
    "evaluation": {"every": 8, "batches": 8, "translations": 8}, "checkpoint": {"every": 5}, "log": {"trackers": []},
    "sample": {"every": 0, "max_tokens": 0},
}  # fmt: skip
_STACK = {
    "max_length": 4 * _LENGTH, "num_layers": 2, "embed_dim": 64, "attention": {"num_heads": 8}, "dropout": 0.1,
}  # fmt: skip
_TEXT = {"sources": [{"kind": "files", "path": _TEXTS, "separator": "\n\n"}], "validation_fraction": 0.1}
_BPE = {"kind": "bpe", "vocab_size": 504}
_PAIRS = {
    "sources": [{"kind": "synthetic", "limit": 2000}], "tokenizer": _BPE, "packing": "pad", "validation_fraction": 0.1
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt": {"model": {"family": "gpt", **_STACK, "vocab_size": 512}, "data": {**_TEXT, "tokenizer": _BPE}},
    "bert": {
        "model": {"family": "bert", **_STACK, "vocab_size": 512},
        "objective": {"kind": "masked"},
        "data": {
            **_TEXT,
            "tokenizer": {**_BPE, "special_tokens": ["[MASK]", "[CLS]", "[SEP]"]},
            "packing": "documents",
        },
    },
    "t5": {
        "model": {"family": "t5", **_STACK, "vocab_size": 640},
        "objective": {"kind": "span_corruption", "source_length": _LENGTH},
        "length": 24,
        "data": {**_TEXT, "tokenizer": {**_BPE, "sentinels": 100}},
    },
    "recurrent": {
        "model": {
            "family": "recurrent", "vocab_size": 512, "max_length": _LENGTH, "num_layers": 1, "embed_dim": 64,
            "hidden_dim": 64, "attention": {"kind": "additive", "dim": 64},
        },
        "objective": {"kind": "seq2seq"},
        "data": _PAIRS,
    },
}  # fmt: skip
DEVICES = [Layout(count) for count in (8, 4, 2, 1, 8)]
PROCESSES = [Layout(4, count) for count in (2, 1, 2)]


def config_of(family: str, strategy: str = "dp") -> RunConfig:
    """The small run of a family."""
    return parse({**_COMMON, **CONFIGS[family], "name": family, "mesh": {"strategy": strategy}}, family)


def run(kills: int, directory: str) -> None:
    """Kill each family's run `kills` times on one device; then move it along `DEVICES` and `PROCESSES`; store the reports.

    Finished parts are kept in `directory`, and not run again.

    Raises:
        UserError: a run does not end as the one without interruption.
    """
    command = f"manyheads-bench resume --kills {kills}"
    result: dict[str, Any] = {"tolerance": TOLERANCE, "resume": {}}
    parts = {
        "one device": ("dp", kills, [Layout(1)]),
        "8, 4, 2, 1, 8 devices": ("fsdp", len(DEVICES), DEVICES),
        "2, 1, 2 processes": ("fsdp", len(PROCESSES), PROCESSES),
    }
    for name, (strategy, times, layouts) in parts.items():
        for number, family in enumerate(CONFIGS):
            folder = folder_of(directory, family, name, times)
            report = kept(folder / REPORT)
            if report is None:
                print(f"{family}, {name}", flush=True)
                # What an interruption of this command left is no part of it.
                shutil.rmtree(folder, ignore_errors=True)
                verify_resume(config_of(family, strategy), folder, kills=times, layouts=layouts, seed=number)
                report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            if report["differences"]:
                raise UserError(f"{folder}: {'; '.join(report['differences'])}")
            result["resume"].setdefault(family, {})[name] = _figures(report)
    result["first_batch_milliseconds"] = {family: _seconds_to_first_batch(config_of(family)) for family in CONFIGS}
    save("resume", command, result, folder=folder_for(directory, DIRECTORY, "resume", command))


def _seconds_to_first_batch(config: RunConfig) -> dict[int, float]:
    """Step → milliseconds until a run that resumes after it has its first batch, on prepared data."""
    prepared, found = prepare(config.data, progress=False), dict[int, float]()
    for step in (1, 1_000_000):
        seconds = []
        for _ in range(7):
            began = time.perf_counter()
            with contextlib.closing(batches_of(config, prepared).iterate(step)) as batches:
                next(batches)
            seconds.append(time.perf_counter() - began)
        found[step] = 1e3 * statistics.median(seconds)
    return found


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    kills = report["kills"]
    return {
        "kills": len(kills),
        "while_saving": sum(kill["while_saving"] for kill in kills),
        "while_evaluating": sum(kill["while_evaluating"] for kill in kills),
        "while_starting": sum(kill["meant"] == "start" for kill in kills),
        "after_steps": [kill["step"] for kill in kills],
        "runs": report["runs"],
        "steps": report["steps"],
        "seed": report["seed"],
        "differences": len(report["differences"]),
        "largest_difference": report["largest_difference"],
    }
