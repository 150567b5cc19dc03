"""What to change so that a step takes less time, and how much: rules on what was seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax

from train.config import RunConfig
from train.examine.doctor.breakdown import Breakdown
from train.examine.doctor.operations import ATTENTION, COLLECTIVE, COPY, ELEMENTWISE, MATRIX
from train.examine.doctor.peaks import Peaks
from train.parallel.hardware import peak_flops
from train.report.attention_backends import Choice
from transformer.stack import FEW_LAYERS

_WORTH = 0.02
"""The least part of a step that is worth a change."""
_FUSED = 0.5
"""What a fused attention kernel reaches of the peak at least: FlashAttention-2 is at 50 to 73 % on an A100 (Dao 2023)."""
_LARGE = 0.7
"""What large matrix products reach of the peak."""
_ROOM = 0.8
"""The part of the memory that a change may fill."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """All that the rules look at. Times are in seconds of a step."""

    config: RunConfig
    device: jax.Device
    breakdown: Breakdown
    peaks: Peaks
    choices: tuple[Choice, ...]
    seconds: float
    """Without the profiler."""
    waiting: float
    """For the next batch."""
    padding: float
    """The part of all positions that is padding."""
    memory: tuple[float, float] | None
    """Bytes of one device that are used, and that there are."""
    kept: float
    """Bytes of one device that the forward pass would keep in addition without rematerialisation."""

    @property
    def on_cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.device.platform == "cpu"

    @property
    def free(self) -> float:
        """Bytes of one device that a change may fill."""
        return 0.0 if self.memory is None else _ROOM * self.memory[1] - self.memory[0]

    @property
    def idle(self) -> float:
        """Without the profiler, which makes a step longer, but not the work of the devices."""
        return min(self.breakdown.idle, max(self.seconds - (self.breakdown.step - self.breakdown.idle), 0.0))

    def spent(self, category: str) -> float:
        """Seconds of a category."""
        return self.breakdown.categories()[category].seconds


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change of the config, or of how it runs."""

    change: str
    """What to do, in a few words."""
    reason: str
    """What was seen, in a sentence or two."""
    gain: float
    """The most seconds of a step that it saves; of a larger batch, for as many examples as a step has now."""


def advise(seen: Seen) -> list[Advice]:
    """What to change, with the largest gain first; empty where nothing stands out."""
    rules = (_fused_attention, _bfloat16, _no_remat, _unrolled, _data, _larger_batch, _copies, _sharding, _padding)
    found = [advice for rule in rules for advice in rule(seen)]
    found = [one for one in found if one.gain >= _WORTH * seen.breakdown.step]
    return sorted(found, key=lambda one: -one.gain)


def _fused_attention(seen: Seen) -> Iterator[Advice]:
    # A CPU has no fused kernel.
    slow = [one for one in seen.choices if one.own_reasons]
    if seen.on_cpu or not slow:
        return
    work = sum(one.operation.flops * one.times for one in seen.breakdown.spent if one.operation.category == ATTENTION)
    backends = " and ".join(dict.fromkeys(one.here for one in slow))
    reasons = "; ".join(dict.fromkeys(reason for one in slow for reason in one.own_reasons))
    yield Advice(
        "let attention run in a fused kernel",
        f"It ran on {backends}, which writes the scores to memory or computes them in parts. Why not a faster one: {reasons}.",
        seen.spent(ATTENTION) - work / (_FUSED * seen.peaks.flops),
    )


def _bfloat16(seen: Seen) -> Iterator[Advice]:
    narrow, wide = (peak_flops(seen.device, dtype) for dtype in ("bfloat16", "float32"))
    # Some older GPUs do not have it.
    lacks = narrow is None and wide is not None
    if seen.on_cpu or seen.config.model.dtype != "float32" or lacks:
        return
    # Without a data sheet, twice as fast, as on most GPUs that are listed.
    saved = 0.5 if narrow is None or wide is None else 1 - wide / narrow
    by_memory = seen.breakdown.where(lambda one: one.category in (COPY, ELEMENTWISE) and one.phase != "update")
    yield Advice(
        "model.dtype bfloat16",
        "The step computes in float32. In bfloat16, products are faster and activations take half of the memory; parameters and "
        "the optimiser's state stay in float32.",
        saved * (seen.spent(MATRIX) + seen.spent(ATTENTION)) + 0.5 * by_memory,
    )


def _no_remat(seen: Seen) -> Iterator[Advice]:
    again = seen.breakdown.where(lambda one: one.phase == "recomputed")
    if seen.config.model.remat == "none" or again == 0 or seen.free < seen.kept:
        return
    yield Advice(
        "model.remat none",
        f"The backward pass computes parts of the forward pass again (model.remat {seen.config.model.remat}). Keeping them takes "
        f"about {seen.kept / 2**20:,.0f} MiB more of a device's memory, of which {seen.free / 2**20:,.0f} MiB are left.",
        again,
    )


def _unrolled(seen: Seen) -> Iterator[Advice]:
    model = seen.config.model
    scan = getattr(model, "scan_layers", False)
    if not scan or model.num_layers > FEW_LAYERS or (scan == "auto" and seen.device.platform == "gpu"):
        return
    yield Advice(
        "model.scan_layers false",
        f"The scan over {model.num_layers} layers copies parameters, and what the backward pass needs, out of stacked arrays "
        "and into them. An unrolled loop does not; it takes longer to compile.",
        # Slices of stacked arrays have the scope of the stack, and not that of a part of a layer.
        seen.breakdown.where(lambda one: one.category == COPY and one.scope.rpartition("/")[2] == "layers"),
    )


def _data(seen: Seen) -> Iterator[Advice]:
    if seen.waiting < 0.5 * seen.idle:
        return
    yield Advice(
        "more data.num_workers, or a larger data.prefetch",
        f"In each step the host waits {1e3 * seen.waiting:,.1f} ms for the next batch, and the devices with it.",
        min(seen.waiting, seen.idle),
    )


def _larger_batch(seen: Seen) -> Iterator[Advice]:
    """Twice as many examples at a time: the optimiser takes as long, and so does the host; products get closer to the peak."""
    parts = seen.config.microbatches
    # A smaller divisor also divides the batch.
    fewer = next((number for number in range(parts // 2, 0, -1) if parts % number == 0), 1)
    times = 2 if parts == 1 else parts // fewer
    if seen.memory is not None and times * seen.memory[0] > _ROOM * seen.memory[1]:
        return
    optimizer = seen.breakdown.where(lambda one: one.phase == "update") if parts == 1 else 0.0
    products, idle = seen.breakdown.categories()[MATRIX], max(seen.idle - seen.waiting, 0.0)
    reached = 1.0 if seen.on_cpu or not products.least else products.least / products.seconds
    faster = products.seconds * max(1 - reached / min(2 * reached, _LARGE), 0.0)
    reasons = {
        f"the optimiser takes {seen.breakdown.share(optimizer):.0%} of the step, whatever the batch is": optimizer / 2,
        f"the devices are idle for {seen.breakdown.share(idle):.0%}, between operations that are too short": idle / 2,
        f"matrix products reach {reached:.0%} of the peak": faster,
    }
    said = "; ".join(text for text, gain in reasons.items() if gain >= _WORTH * seen.breakdown.step)
    if not said:
        return
    change = f"batch_size {2 * seen.config.batch_size}" if parts == 1 else f"microbatches {fewer}"
    note = " Twice as many examples take less than twice as long; tune the learning rate." if parts == 1 else ""
    yield Advice(change, f"{said[0].upper()}{said[1:]}.{note}", sum(reasons.values()))


def _copies(seen: Seen) -> Iterator[Advice]:
    """Those that no other rule names."""
    copies = [
        one
        for one in seen.breakdown.spent
        if one.operation.category == COPY and one.operation.scope.rpartition("/")[2] != "layers"
    ]
    total = sum(one.seconds for one in copies)
    if total < 0.1 * seen.breakdown.step:
        return
    where = list(dict.fromkeys(one.operation.scope for one in copies))[:3]
    yield Advice(
        "look at the copies",
        f"They take {seen.breakdown.share(total):.0%} of the step, most of them in {', '.join(where)}: slices of what a loop "
        "reads and writes, and arrays whose dims XLA reorders between operations.",
        total,
    )


def _sharding(seen: Seen) -> Iterator[Advice]:
    sent = seen.spent(COLLECTIVE)
    if sent < 0.1 * seen.breakdown.step:
        return
    virtual = " These devices are virtual, parts of one CPU: on real ones the share is another." if seen.on_cpu else ""
    yield Advice(
        "another mesh.strategy, or a larger batch for each device",
        f"Communication that no computation hides takes {seen.breakdown.share(sent):.0%} of the step (mesh.strategy "
        f"{seen.config.mesh.strategy}). `manyheads-bench sharding CONFIG` compares what each strategy sends.{virtual}",
        sent,
    )


def _padding(seen: Seen) -> Iterator[Advice]:
    if seen.padding < 0.05:
        return
    packing, recurrent = seen.config.data.packing, seen.config.model.family == "recurrent"
    change = "a smaller length"
    if packing == "pad":
        change = "a larger objective.max_shapes" + ("" if recurrent else ", or data.packing documents")
    yield Advice(
        change,
        f"{seen.padding:.0%} of all positions are padding, which costs as much as text.",
        seen.padding * seen.breakdown.step,
    )
