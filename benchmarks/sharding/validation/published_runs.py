"""Training runs that others published (`published.yaml`), rebuilt as configs of this program.

A run is published as the seconds of a step, as tokens a second, or as FLOPs a second; all of them become seconds of a step here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.sharding.devices.targets import Target, parse_target
from train.config import RunConfig
from train.config.load import build
from train.config.yaml_files import read_yaml
from transformer.errors import UserError, nearest
from transformer.models.families import count_parameters, flops_per_token

FILE = Path(__file__).with_name("published.yaml")
Unit = Literal["seconds per step", "tokens/s per device", "TFLOP/s per device"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One row of the file, and its model."""

    name: str
    source: str
    """Repository, commit and files that state the configuration and the figure."""
    target: Target
    config: RunConfig
    figure: float
    unit: Unit
    parameters: int | None = None
    """Of the model, where the source states the number."""
    assumed: str = ""
    """What the source does not state, or what is built differently here."""
    fitted: bool = True
    """Whether its devices, network and kernels are those that a plan assumes."""

    @property
    def seconds(self) -> float:
        """Published seconds of a step.

        FLOPs a second count 6 for each parameter and token, and the causal half of attention, as the sources in the file do.
        """
        if self.unit == "seconds per step":
            return self.figure
        tokens = self.config.batch_size * self.config.sequence_length / self.target.num_devices
        if self.unit == "tokens/s per device":
            return tokens / self.figure
        return tokens * self._flops_per_token / (self.figure * 1e12)

    @property
    def _flops_per_token(self) -> float:
        model, length = self.config.model, self.config.sequence_length
        # What grows with the length is attention's own products, of which one token more sees one token more.
        by_length = flops_per_token(model, length + 1) - flops_per_token(model, length)
        return 6 * count_parameters(model) + 3 * by_length * length


def published_runs(only: Sequence[str] | None = None) -> list[PublishedRun]:
    """The runs of the file, in its order.

    Args:
        only: names of some of them.

    Raises:
        UserError: no run has one of these names.
    """
    data = read_yaml(FILE)
    rows = [{**group, **run} for group in data["groups"] for run in group["runs"]]
    names = [row["name"] for row in rows]
    for name in only or ():
        if name not in names:
            raise UserError(f"--only: got {name!r}; allowed: {', '.join(names)}.{nearest(name, names)}")
    return [_run(row, data["models"]) for row in rows if not only or row["name"] in only]


def _run(row: dict[str, Any], models: dict[str, Any]) -> PublishedRun:
    model = models[row["model"]] | {"dtype": "bfloat16", "remat": row["remat"], "max_length": row["length"]}
    config = {
        "name": row["name"], "model": model, "batch_size": row["batch_size"], "microbatches": row.get("microbatches", 1),
        "mesh": row.get("mesh", {}), "optimizer": row.get("optimizer", {}),
    }  # fmt: skip
    return PublishedRun(
        name=row["name"], source=row["source"], target=parse_target(row["target"]), config=build(RunConfig, config, str(FILE)),
        figure=row["figure"], unit=row["unit"], parameters=row.get("parameters"), assumed=row.get("assumed", ""),
        fitted=row.get("fitted", True),
    )  # fmt: skip
