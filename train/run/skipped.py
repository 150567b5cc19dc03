"""Records the steps whose updates were skipped, with their examples, in skipped.jsonl of the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.data.decoded import texts_of
from train.data.loader import Batch
from train.data.prepared.store import Prepared
from train.report.meter import Reading
from train.report.metrics import SKIPPED, read_records
from train.run.order import Order

_SHOWN = 400
"""Characters of each text that are recorded."""


def why_skipped(reading: Reading) -> str:
    """What is wrong with a step whose update was skipped, as text."""
    loss, norm = reading.values["loss"], reading.values["grad_norm"]
    if reading.is_spike:
        return f"loss {loss:.4f} is a spike (z-score {reading.values['loss_z']:.1f})"
    return f"loss {loss} or gradient norm {norm} is not finite"


def record_of(
    reading: Reading, batch: Batch, prepared: Prepared, rolled_back_to: int | None, order: Order
) -> dict[str, Any]:
    """A line of the record: the step's metrics, the ids of its examples and the beginning of their texts.

    Args:
        batch: the rows of the step that this process has.
        rolled_back_to: the step of the checkpoint from which training continues; None: with the next step.
        order: in which the step took its batch.
    """
    rows = range(len(batch["example"]))
    return {
        "step": reading.step,
        "reason": "spike" if reading.is_spike else "not finite",
        "loss": reading.values["loss"],
        "loss_z": reading.values.get("loss_z"),
        "grad_norm": reading.values["grad_norm"],
        "examples": batch["example"].tolist(),
        "rolled_back_to": rolled_back_to,
        "passed": order.passed,
        "texts": [" | ".join(texts_of(batch, row, prepared))[:_SHOWN] for row in rows],
    }


def read_skipped(directory: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; empty if no update was skipped."""
    return [record for _, record in read_records(directory / SKIPPED)]
