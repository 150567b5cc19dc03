"""Runs as processes of their own: what surrounds them, and what they recorded."""

from __future__ import annotations

import json
import os
from pathlib import Path


def surroundings(**changes):
    """The environment of a process with one device, whose programs are compiled as quickly as the suite's own."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(flags)} | changes


def records(run_dir, name="train/loss"):
    """Step → value of one metric."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record[name] for record in map(json.loads, lines) if name in record}
