"""What the heads of a model look at while it trains, on one small batch of held-out text."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from train.config import RunConfig
from train.data.evaluation import evaluation_batches
from train.data.prepared.store import Prepared
from train.loss import Batch
from train.parallel.mesh import batch_parts
from train.program.program import Program
from transformer.errors import UserError
from transformer.hooks import Hooks
from transformer.interpret.capture import MAX_BYTES, readable
from transformer.interpret.interventions.statistics import chunks, kept_for, means_of, sums_of
from transformer.interpret.interventions.subject import Part, parts_of
from transformer.models.layer_stack import hooked
from transformer.types import Array

Wanted = Sequence[tuple[Part, int]]
"""Parts and layers whose weights are measured."""
ROWS = 4
"""The most rows of the batch, or as many more as the devices divide."""
_ARRAYS = 4
"""About how many arrays of the size of a layer's weights are in memory while they are computed and summed."""


class HeadLog:
    """Statistics of each layer's attention, by the objective's own evaluation of a batch.

    The training step is not changed: these are programs of their own, in which weights are computed in addition to the pass of
    the fast kernels, and only their sums are kept. Each program takes as many layers as have weights in `max_bytes` of a device.

    Raises:
        UserError: no held-out text, a model without attention whose weights are distributions, or weights of one layer and of
            one row on each device that need more than `max_bytes`.
    """

    def __init__(self, config: RunConfig, prepared: Prepared, program: Program, *, max_bytes: int = MAX_BYTES) -> None:
        self._config, self._program = config, program
        parts = parts_of(nnx.merge(program.graphdef, program.abstract.params))
        wanted = [(part, layer) for part in parts for layer, shown in enumerate(part.has_distributions) if shown]
        if not wanted:
            raise UserError(
                f"log.attention: a model of family {config.model.family!r} with this attention has no weights that are "
                "distributions; set it to null"
            )
        if not prepared.validation:
            raise UserError(
                "log.attention: it needs held-out text; set data.validation_fraction above 0, or it to null"
            )
        parts_of_batch = math.lcm(batch_parts(program.mesh, config.mesh.rules), jax.process_count())

        def batch_of(rows: int) -> Batch:
            host = evaluation_batches(
                prepared, config.data, batch_size=rows * parts_of_batch, length=config.sequence_length,
                objective=config.objective, process_index=jax.process_index(), process_count=jax.process_count(), max_batches=1,
            )  # fmt: skip
            return program.to_devices(host.batch(0))

        rows = -(-ROWS // parts_of_batch)
        self._batch = batch_of(rows)
        while (largest := self._largest(wanted)) > max_bytes and rows > 1:
            rows = max(1, min(rows - 1, rows * max_bytes // largest))
            self._batch = batch_of(rows)
        if largest > max_bytes:
            raise UserError(
                f"log.attention: the weights of one layer on {config.sequence_length:,} tokens need {readable(largest)} of "
                f"each device, above the limit of {readable(max_bytes)}; set it to null, or sequence_length lower"
            )
        self._programs = [
            (some, jax.jit(functools.partial(self._measure, some))) for some in chunks(wanted, max_bytes // largest)
        ]

    def _kept(self, wanted: Wanted, params: nnx.State, batch: Batch) -> dict[str, Array]:
        hooks = Hooks(keep=kept_for(wanted))
        model = hooked(nnx.merge(self._program.graphdef, params), hooks)
        self._config.objective.evaluate(model, batch, self._config.loss)
        hooks.check()
        return hooks.kept

    def _measure(self, wanted: Wanted, params: nnx.State, batch: Batch) -> dict[str, dict[str, Array]]:
        sums = sums_of(wanted, self._kept(wanted, params, batch))
        if not jax.sharding.get_abstract_mesh().empty:
            # Every process reads them.
            sums = jax.lax.with_sharding_constraint(sums, PartitionSpec())
        return sums

    def _largest(self, wanted: Wanted) -> int:
        """Bytes of a device for the weights of the layer that needs most, as if devices divided only the rows."""
        kept = jax.eval_shape(functools.partial(self._kept, wanted), self._program.abstract.params, self._batch)
        most = max(math.prod(kept[part.place(layer, "weights")].shape) for part, layer in wanted)
        return _ARRAYS * 4 * most // batch_parts(self._program.mesh, self._config.mesh.rules)

    def __call__(self, params: nnx.State) -> Mapping[str, float]:
        """For each layer: the means over its heads of the entropy in bits, and of the weights of the token before (`previous`)
        and of the first one (`first`); and of these two also the head that has most."""
        values: dict[str, float] = {}
        for wanted, measure_of in self._programs:
            sums = jax.device_get(measure_of(params, self._batch))
            for part, layer in wanted:
                values |= _values(part, layer, sums[part.place(layer, "weights")])
        return values


def _values(part: Part, layer: int, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    found = means_of(part, sums)
    name = f"{'' if part.name == 'attention' else f'{part.name}_'}layer_{layer}"
    means = {f"{name}_{one}": float(np.mean(found[one])) for one in ("entropy", "previous", "first") if one in found}
    return means | {f"{name}_most_{one}": float(np.max(found[one])) for one in ("previous", "first") if one in found}
