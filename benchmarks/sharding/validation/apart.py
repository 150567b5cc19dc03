"""Measurements in processes of their own: each has its number of devices, and its peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environments import compilers
from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.validation.cases import Case
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
        raise UserError(f"the measurement of {what} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def task_at_hand(cases_of: Callable[[str, int], list[Case]]) -> tuple[dict[str, Any], Case, Target]:
    """What this process was given to measure: the task in its input, the case of its `title`, and its `target`, whose virtual
    devices are made if it is a CPU.

    Args:
        cases_of: platform and number of devices → the cases.
    """
    task = json.load(sys.stdin)
    target = Target.from_data(task["target"])
    if target.chip.platform == "cpu":
        compilers.devices_of("cpu", target.topology)
    (case,) = (one for one in cases_of(target.chip.platform, target.num_devices) if one.title == task["title"])
    return task, case, target
