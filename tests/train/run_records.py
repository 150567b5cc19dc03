"""Reading what a run recorded."""

from __future__ import annotations

import json
from pathlib import Path


def records(run_dir, name="train/loss"):
    """Step → value of one metric."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record[name] for record in map(json.loads, lines) if name in record}
