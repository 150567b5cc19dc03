"""Memory and time of a training step by formulas alone: an estimate without a compiler, which also prunes a search.

The state's memory is exact: the shapes of the real model and optimiser under the strategy's own table. Activations are those
that the forward pass saves, traced once for one sequence. Time is arithmetic over the peak, the optimiser's and activations'
memory traffic over the bandwidth, and the minimum communication of the axes over their links.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from benchmarks.sharding.devices.targets import Target
from benchmarks.sharding.predict.least import least
from benchmarks.sharding.predict.shape import experts, repeated
from train.config import RunConfig
from train.examine.explain import saved_bytes
from train.parallel.mesh import MESH_AXES, STRATEGIES, MeshConfig, Rules, shardings_of
from train.program.program import batch_shapes, described_state, trained_of
from transformer.functional import graphdef_of
from transformer.loss import tokens_of_chunk
from transformer.models.adapted import make_adapted
from transformer.models.families import flops_per_token

OVERLAP = 0.7
"""Fraction of the arithmetic that can overlap with communication."""
HIDEABLE = {"gpu": ("data", "fsdp"), "cpu": ("data", "fsdp"), "tpu": ("data", "fsdp", "tensor")}
"""Axes whose communication can overlap with arithmetic, by platform: gathers and reductions of parameters. XLA for TPUs also
splits the products that a tensor axis divides, and sends one part while it computes the next (Wang et al. 2023)."""
EFFICIENCIES = {"gpu": (0.67, 0.43), "cpu": (0.67, 0.43), "tpu": (0.94, 0.30)}
"""Fractions of the peak FLOP/s and of the memory's bandwidth that a step reaches by these formulas, by platform: fitted to
training runs that others published (`validation/published_fit.py`), for targets without a profile. A compiled program has
others, since its products and its bytes are counted one by one."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory and time of a step, for one device."""

    parameters: float
    """Bytes, as are the fields below it."""
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    """Gathered parameters of the layers in use at a time, if they are sharded."""
    seconds: float
    """Seconds of a step."""
    arithmetic: float
    """Seconds of it by part, as are the fields below it."""
    traffic: float
    sending: float
    """The exposed part of communication."""
    sent: float = 0.0
    """Seconds of all communication, whether or not it overlaps with computation."""
    axes: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of it by axis of the mesh."""
    hideable: float = 0.0
    """Seconds of it that overlap with computation as far as that lasts."""

    @property
    def memory(self) -> float:
        """Peak bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.gathered


class Analysis:
    """A model and an optimiser, traced once for estimates of configs that differ in mesh, microbatches and remat."""

    def __init__(self, config: RunConfig) -> None:
        self._sequence = dataclasses.replace(config, mesh=MeshConfig(), batch_size=1, microbatches=1)
        self.state = described_state(config)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        self.trained = trained_of(config, functools.partial(make_adapted, config.model, config.adapter))

    @functools.cache  # noqa: B019
    def saved(self, remat: Any) -> int:
        """Bytes that the forward pass of one sequence saves under a remat policy."""
        model: Any = dataclasses.replace(self._sequence.model, remat=remat)
        config = dataclasses.replace(self._sequence, model=model)
        make = functools.partial(make_adapted, config.model, config.adapter)
        return saved_bytes(graphdef_of(make), self.state.params, batch_shapes(config, 1), config, self.trained)

    @functools.cache  # noqa: B019
    def held(self, mesh: MeshConfig, num_devices: int) -> tuple[float, float, float]:
        """Bytes of parameters, of gradients and of the optimiser's state on a device."""
        sizes, state = dict(zip(MESH_AXES, mesh.sizes(num_devices), strict=True)), self.state
        return (
            sharded_bytes(state.params, mesh.rules, sizes),
            sharded_bytes(self.trained.select(state.params), mesh.gradient_rules, sizes),
            sharded_bytes((state.opt_state, state.ema), mesh.optimizer_rules, sizes),
        )

    def estimate(self, config: RunConfig, target: Target) -> Estimate:
        """The estimate for the config's step on its own mesh over the target's devices."""
        sizes = dict(zip(MESH_AXES, config.mesh.sizes(target.num_devices), strict=True))
        model = config.model
        parameters, gradients, optimizer = self.held(config.mesh, target.num_devices)
        layers = getattr(model, "num_layers", 1)
        wide = 2 if model.dtype == "bfloat16" else 4

        rows = (
            config.batch_size
            / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
            / config.microbatches
            / sizes["context"]
        )
        full, none, own = self.saved("full"), self.saved("none"), self.saved(model.remat)
        # The residual stream is replicated over tensor, unless the strategy shards it; all else is sharded. What one layer
        # recomputes is not all alive at once.
        slices = sizes["tensor"]
        stream = full / (slices if STRATEGIES[config.mesh.strategy].slices_stream else 1)

        vocab_size, tokens_of_step = model.vocab_size // slices, math.ceil(rows * config.sequence_length)

        def logits(rows: float) -> float:
            """Bytes of a chunk's logits, with a part of their gradient."""
            tokens = math.ceil(rows * config.sequence_length)
            return 1.25 * 4 * vocab_size * tokens_of_chunk(config.loss.chunk, tokens, vocab_size)

        kept = stream + max(own - full, 0) / slices
        again = 0.0 if model.remat == "none" else 0.6 * (none - full) / layers / slices
        activations = rows * (kept + again) + logits(rows)
        bubble, passes = 0.0, {"none": 3.0, "light": 3.0, "dots": 3.1}.get(model.remat, 0.0)
        if model.remat == "full":
            passes = 3 + repeated(model, config.sequence_length)
        if (stages := sizes["pipeline"]) > 1:
            parts = config.mesh.pipeline_microbatches or stages * config.mesh.stages_per_device
            bubble = (stages - 1) / (parts * config.mesh.stages_per_device)
            if config.mesh.schedule == "1f1b":
                # Inputs of the microbatches in flight, and one recomputed stage.
                own_input = config.sequence_length * model.embed_dim * wide
                at_work = kept / stages + again
                activations = rows / parts * (own_input * (2 * stages - 1) + at_work) + logits(rows / parts)
                passes += 1
            else:
                # Every tick stores its own, and the devices share the head.
                activations = rows / stages * kept * (1 + bubble) + rows / parts * again + logits(rows / stages)
        # A forward pass before those of the parts of a batch, over all of which experts are balanced.
        mlp, mesh = experts(model), config.mesh
        in_parts = config.microbatches > 1 or mesh.strategy == "pmap" or (stages > 1 and mesh.schedule == "1f1b")
        if in_parts and mlp is not None and mlp.balance_loss:
            passes += 1
        gathered = 0.0
        if sizes["fsdp"] > 1 and config.mesh.slices_parameters:
            gathered = 2 * wide * self.parameters / slices / layers

        devices = target.num_devices
        tokens = config.batch_size * config.sequence_length
        forward = flops_per_token(model, config.sequence_length) * tokens / devices
        products, memory = efficiencies(target)
        arithmetic = passes * forward / (target.peak_flops * products)
        # Written once and read in both passes, partly overlapped with products; once more for recomputation.
        moved = config.microbatches * rows * none / slices / stages * (2.5 if model.remat == "none" else 3)
        # The sum of the microbatches' gradients is read and written with each, and read by the optimiser.
        moved += 3 * (parameters + config.microbatches * gradients + optimizer)
        if (chunks := tokens_of_step / tokens_of_chunk(config.loss.chunk, tokens_of_step, vocab_size)) > 1:
            # Each chunk reads the output projection twice, and reads and writes the sum of its gradients.
            moved += 4 * wide * model.embed_dim * vocab_size * (chunks - 1) * config.microbatches
        traffic = moved / (target.memory_bandwidth * memory)
        if config.mesh.offload_optimizer and target.chip.host:
            traffic += 2 * optimizer / target.chip.host
            optimizer = 0.0
        hideable = shown = 0.0
        axes: dict[str, float] = {}
        for one in least(config, sizes, self.parameters):
            seconds = one.bytes / target.link_of_axis(one.axis, sizes)
            seconds += one.count * target.latency * math.log2(max(sizes[one.axis], 2))
            axes[one.axis] = axes.get(one.axis, 0.0) + seconds
            if one.axis in HIDEABLE[target.chip.platform]:
                hideable += seconds
            else:
                shown += seconds
        sending = shown + max(hideable - OVERLAP * arithmetic, 0)
        seconds = (arithmetic + traffic) * (1 + bubble) + sending
        return Estimate(
            parameters,
            gradients,
            optimizer,
            activations,
            gathered,
            seconds,
            arithmetic,
            traffic,
            sending,
            hideable + shown,
            axes,
            hideable,
        )


def efficiencies(target: Target) -> tuple[float, float]:
    """Fractions of the peak FLOP/s and of the memory's bandwidth: by the target's profile, else `EFFICIENCIES`."""
    if target.profile is not None:
        return target.matmul_efficiency, target.memory_efficiency
    return EFFICIENCIES[target.chip.platform]


def basis(target: Target) -> str:
    """What an estimate of time rests on."""
    if target.profile is not None:
        return target.basis
    products, memory = efficiencies(target)
    return (
        f"published figures, of which products reach {products:.0%} and all other work {memory:.0%} of the bandwidth, by the "
        "formula's fit to training runs that others published"
    )


def sharded_bytes(tree: Any, rules: Rules, sizes: dict[str, int]) -> float:
    """Bytes of an abstract tree on one device of a mesh that need not exist."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    with nnx.logical_axis_rules(rules):
        shardings = shardings_of(tree, mesh)  # type: ignore[arg-type]
    total = 0.0
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        if hasattr(leaf, "dtype") and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            apart = math.prod(mesh.shape[axis] for part in sharding.spec for axis in _names(part))
            total += math.prod(leaf.shape) * leaf.dtype.itemsize / apart
    return total


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)
