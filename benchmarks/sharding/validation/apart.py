"""Measurements in processes of their own: each has its number of devices, and its peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformer.errors import UserError


def answer_of(module: str, task: dict[str, Any], what: str) -> dict[str, Any]:
    """What `answer()` of a module of this folder prints last, as JSON, in a process of its own that gets the task as its input.

    Args:
        what: is measured, for the error.

    Raises:
        UserError: the process failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from benchmarks.sharding.validation import {module}; {module}.answer()"],
        input=json.dumps(task), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3]), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )  # fmt: skip
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        raise UserError(f"plan: the measurement of {what} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])
