"""Columns of a plan and what they mean, and the verdict on how far to trust it."""

from __future__ import annotations

from typing import Any

from benchmarks.sharding.planning.objective import TIE
from benchmarks.sharding.predict.analytic import OVERLAP
from benchmarks.sharding.validation.validate import on_record
from benchmarks.units import duration

HEADS = (
    "", "layout", "step", "tokens/s", "MFU", "memory", "matmul", "memory-bound", "sent", "exposed", "bound by", "cost",
)  # fmt: skip
NARROW = ("", "layout", "step", "MFU", "memory", "bound by", "cost")
NARROWEST = ("", "layout", "step", "memory")
TEXT = ("layout", "bound by")
SURE, ENOUGH = 0.10, 0.15
"""Errors on record up to which a prediction of time is good to rent on, and from which it is only enough to shortlist."""


def times_of(row: dict[str, Any]) -> dict[str, float]:
    """Seconds of a layout's step by part, and of all that is sent; `bubble` of a pipeline, which only a formula gives apart."""
    prediction, estimate = (row["compiled"] or {}).get("prediction"), row["estimate"]
    if prediction:
        return {
            "matmul": prediction["compute"],
            # The gaps between operations, which only a profile knows, are with the operations that no arithmetic limits.
            "memory-bound": prediction["memory"] + prediction.get("gaps", 0.0),
            "sent": prediction["exposed"] + prediction["overlapped"], "exposed": prediction["exposed"], "bubble": 0.0,
        }  # fmt: skip
    rest = estimate["seconds"] - estimate["arithmetic"] - estimate["traffic"] - estimate["sending"]
    return {
        "matmul": estimate["arithmetic"], "memory-bound": estimate["traffic"], "sent": estimate["sent"],
        "exposed": estimate["sending"], "bubble": rest if rest > 1e-9 * estimate["seconds"] else 0.0,
    }  # fmt: skip


def heads(result: dict[str, Any]) -> list[str]:
    """The columns of a plan: the cost only with a price."""
    return [head for head in HEADS if head != "cost" or result.get("price")]


def legend(result: dict[str, Any]) -> dict[str, str]:
    """What each column means."""
    compiled = bool(result["compiled"])
    source = "by the compiler" if compiled else "by formula"
    exposed = (
        "the part of it during which the compiled program computes nothing"
        if compiled
        else f"the part of it that adds to the step: along the axes data and fsdp, and on TPUs tensor, the time beyond "
        f"{OVERLAP:.0%} of matmul, along the other axes all of it"
    )
    found = {
        "layout": "strategy, sizes of the mesh axes above 1, remat policy and microbatches",
        "step": "predicted time of a training step: matmul + memory-bound + exposed"
        if compiled
        else "predicted time of a training step: (matmul + memory-bound) × (1 + pipeline bubble) + exposed",
        "tokens/s": "of all devices together",
        "MFU": "the model's FLOPs, without recomputation, as a fraction of the devices' peak",
        "memory": f"peak on one device, {source}",
        "matmul": "time of the operations that arithmetic limits",
        "memory-bound": "time of the operations that the memory's bandwidth limits",
        "sent": "time of all communication, overlapped or not",
        "exposed": exposed,
        "bound by": "the largest of matmul, memory-bound and exposed",
        "cost": "of a billion tokens, in the currency of --price",
    }
    return {head: text for head, text in found.items() if head in heads(result)}


def ties(result: dict[str, Any]) -> str:
    """How the ranking treats what is almost equal."""
    if result.get("objective") == "memory":
        return f"Layouts are ordered by memory; those within {TIE:.0%} of each other by time."
    return f"Layouts are ordered by time; those within {TIE:.0%} of each other by memory."


def verdict(result: dict[str, Any]) -> str:
    """How far to trust the best layout's time, by the errors on record."""
    row = result["layouts"][0]
    kind = result["target"].partition(":")[0]
    error = on_record(kind)
    if error is None:
        return "Verdict: enough to shortlist. Unvalidated: no measurements on this kind of device are on record."
    if not result["compiled"]:
        return (
            "Verdict: enough to shortlist. Errors are on record for compiled predictions, and this one is by formula."
        )
    time = error["time"]
    most = f"to {duration(row['seconds'] / (1 - time))}" if time < 1 else "upwards"
    span = f"{duration(row['seconds'] / (1 + time))} {most} a step"
    errors = f"Maximum errors of predictions on {kind}: time {time:.0%}, memory {error['memory']:.0%}; {span}."
    if time <= SURE:
        return f"Verdict: good to rent on. {errors}"
    if time <= ENOUGH:
        return f"Verdict: good to rent on with a margin of {time:.0%}. {errors}"
    return f"Verdict: enough to shortlist. {errors}"
