"""What a step would take with a faster link, faster memory or a larger batch, from the prediction of the step as it is."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.predict.roofline import Costs, LinkOf, transfers_of
from train.program.hlo import Module


def what_if(
    module: Module, target: Target, link_of: LinkOf, costs: Costs, timeline: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Three changes, and what they come to:

    - `link`: twice the bandwidth of the link that leaves most communication exposed: its `name`, and `seconds` of the step;
      missing if no communication is exposed
    - `memory`: twice the bandwidth of the memory: `seconds`
    - `batch`: twice the batch: `seconds` of the step at most, when all but the optimiser takes twice as long; and the `bytes`
      of memory, with twice the activations and temporaries
    """
    exposed: dict[str, float] = collections.defaultdict(float)
    for one in costs.transfers:
        exposed[one.link] += one.exposed
    found: dict[str, dict[str, Any]] = {}
    if sum(exposed.values()) > 0:
        name = max(exposed, key=lambda link: exposed[link])
        sent = transfers_of(module, target, link_of, costs.operations, {name: 2.0})
        found["link"] = {"name": name, "seconds": dataclasses.replace(costs, transfers=sent).prediction().seconds}
    faster = {key: dataclasses.replace(one, traffic=one.traffic / 2) for key, one in costs.operations.items()}
    sent = transfers_of(module, target, link_of, faster)
    changed = dataclasses.replace(costs, operations=faster, transfers=sent, first_touch=costs.first_touch / 2)
    found["memory"] = {"seconds": changed.prediction().seconds}
    updating = sum(timeline["stages"].get("optimiser", {}).values())
    memory = timeline["memory"]
    found["batch"] = {
        "seconds": 2 * timeline["seconds"] - updating,
        "bytes": memory["compiler"] + memory["at_peak"]["activations"] + memory["at_peak"]["temporaries"],
    }
    return found
