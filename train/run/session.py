"""What the parts of a running training have in common, and how it ended."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from train.checkpoints.checkpoint import Checkpoints
from train.parallel.runtime import GracefulStop, Watchdog
from train.report.display import Display
from train.report.meter import Meter
from train.report.metrics import MetricLog
from train.run.evaluate import Scores


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a run ended."""

    directory: Path
    step: int
    scores: Scores | None
    """Scores on all held-out text; None without such text, and for a run that was interrupted or already finished."""
    interrupted: bool
    signal: int | None = None
    """The one that interrupted this process, if one did."""


class Spike(NamedTuple):
    """A step with a loss spike, and that of the checkpoint to go back to."""

    step: int
    back_to: int


@dataclasses.dataclass(frozen=True)
class Session:
    """What a run uses from its start to its end or interruption."""

    checkpoints: Checkpoints
    display: Display
    log: MetricLog
    meter: Meter
    stop: GracefulStop
    watch: Watchdog
