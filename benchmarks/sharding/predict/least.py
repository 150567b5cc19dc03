"""The theoretical minimum that each sharding must send, with which compiled programs are compared.

Bytes that one device sends in a step. Ψ parameters, s bytes per number sent: 4 for gradients and state, which are
float32, c for parameters and activations in the step's compute type; n devices along the axis; B T tokens of a
device, D embed, L layers; m microbatches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.sharding.predict.shape import expert_parameters, experts, widths
from train.config import RunConfig
from train.parallel.mesh import STRATEGIES
from transformer.models.families import count_parameters

SYMBOLS = (
    "Bytes that one device sends in a step. Ψ: parameters; c: bytes of the compute type (4 for gradients and state, which are "
    "sent in float32); n: devices along the axis; B T: tokens of a device; D: width; L: layers; N, K, H: query heads, "
    "key heads and their width; m: microbatches; k C: experts per token and their capacity factor. A compiler that keeps "
    "gathered parameters for the backward pass sends less than ZeRO's papers count."
)
"""The legend of the formulas."""


@dataclasses.dataclass(frozen=True)
class Least:
    """The minimum that an axis of the mesh must send."""

    axis: str
    formula: str
    bytes: float
    count: float = 1
    """Number of collectives, each of which waits for its devices; one per tensor, however a compiler splits them."""


def least(config: RunConfig, sizes: Mapping[str, int], parameters: float | None = None) -> list[Least]:
    """The minimum of each axis with more than one device, for the model's layers at these sizes.

    Args:
        sizes: devices along each axis of the mesh.
        parameters: of the model, if known.
    """
    model: Any = config.model
    strategy = STRATEGIES[config.mesh.strategy]
    compute = 2 if model.dtype == "bfloat16" else 4
    whole = count_parameters(model) if parameters is None else parameters
    apart = {axis: sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context", "expert", "pipeline")}
    rows = config.batch_size / (apart["data"] * apart["fsdp"] * apart["expert"])
    tokens = rows * config.sequence_length / apart["context"]
    width, layers = model.embed_dim, getattr(model, "num_layers", 0)
    # The parameters that tensor and pipeline leave to a device, and those of them that an fsdp axis shards further.
    own = whole / (apart["tensor"] * apart["pipeline"])
    found = []

    def share(n: int) -> float:
        return (n - 1) / n

    copies = apart["data"] * apart["context"]
    if (n := apart["fsdp"]) > 1:
        if strategy.slices_parameters:
            # Rajbhandari et al. 2020, section 7.2.2; a gather for each pass of each microbatch.
            per_step = share(n) * own * (2 * compute * config.microbatches + 4)
            passes_over = 2 * config.microbatches + 1
            found.append(Least("fsdp", "(n-1)/n Ψ (2 c m + 4)", per_step, passes_over * max(layers, 1)))
        else:
            found.append(Least("fsdp", "(n-1)/n Ψ (4 + 4)", share(n) * own * 8, 2))
        own /= n
    if copies > 1:
        found.append(Least("data", "2 (n-1)/n 4 Ψ", 2 * share(copies) * 4 * own))
    if (n := apart["tensor"]) > 1:
        # Shoeybi et al. 2019, section 3: two all-reduces a layer in each pass, and one at each end. If the backward pass
        # recomputes a layer, it sends again, except for the layer's last sum, which nothing needs; with sequences sharded
        # too, a sum consists of two halves (Korthikanti et al. 2022, section 4.2), of which three are sent again.
        again = 0.0 if getattr(model, "remat", "none") != "full" else 1.5 if strategy.slices_stream else 1.0
        sums = (4 + again) * layers / apart["pipeline"] + 2
        formula = f"2 (n-1)/n ({4 + again:g} L + 2) B T D c"
        each = 2 * share(n) * tokens * width * compute
        found.append(Least("tensor", formula, sums * each, sums * config.microbatches))
    # Passes that send what a layer's forward pass sends: the forward pass, the backward pass, and any recomputation.
    passes = 3 if getattr(model, "remat", "none") == "full" else 2
    if (n := apart["context"]) > 1:
        queries, kv = (size / apart["tensor"] for size in widths(model))
        if config.mesh.strategy == "ulysses":
            # Jacobs et al. 2023, section 3.2: q, k, v and the result.
            bytes_ = 2 * passes * share(n) * layers * tokens * (queries + kv) * compute
            formula = f"{2 * passes} (n-1)/n L B T (N + K) H c"
            found.append(Least("context", formula, bytes_, 4 * passes * layers * config.microbatches))
        else:
            # Liu et al. 2023, section 3: keys and values rotate around the ring in each pass; their gradients move with them in
            # the backward pass, for one more step to return to their own device.
            bytes_ = layers * tokens * 2 * kv * ((n - 1) * passes * compute + n * 4)
            formula = f"L B T 2 K H ({passes} (n-1) c + 4 n)"
            found.append(Least("context", formula, bytes_, passes * layers * n * config.microbatches))
    if (n := apart["expert"]) > 1:
        # Lepikhin et al. 2020, section 3.2: to the experts and back, up to their capacity; or all tokens to all devices, which is
        # less from k C devices down, and all that is possible without a limit.
        mlp = experts(model)
        assert mlp is not None
        slots = min((mlp.capacity_factor or mlp.num_experts) * mlp.experts_per_token, n)
        bytes_ = 2 * passes * share(n) * layers * tokens * slots * width * compute
        formula = f"{2 * passes} (n-1)/n L B T min(k C, n) D c"
        found.append(Least("expert", formula, bytes_, 2 * passes * layers * config.microbatches))
        if n * copies > 1:
            # Everything except the experts is replicated over the axis.
            others = whole - expert_parameters(model)
            found.append(
                Least("expert", "2 (n-1)/n 4 Ψ'", 2 * share(n) * 4 * max(others, 0) / apart["tensor"] / apart["fsdp"])
            )
    if (n := apart["pipeline"]) > 1:
        # Huang et al. 2019: activations to the next stage, and their gradients back; with two stages each does one of them.
        ways = 2 if n > 2 else 1
        ticks = (config.mesh.pipeline_microbatches or n) + n - 1
        found.append(Least("pipeline", f"{ways} B T D c", ways * tokens * width * compute, 2 * ticks))
    return found
