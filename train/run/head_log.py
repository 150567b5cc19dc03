"""What the heads of a model look at while it trains, on one small batch of held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
from transformer.interpret.interventions.statistics import kept_for, means_of, sums_of
from transformer.interpret.interventions.subject import parts_of
from transformer.models.layer_stack import hooked

ROWS = 4
"""The rows of the batch, or as many more as the devices divide."""


class HeadLog:
    """Statistics of each layer's attention, by the objective's own evaluation of a batch.

    The training step is not changed: this is a program of its own, in which weights are computed in addition to the pass of the
    fast kernels, and only their sums are kept.

    Raises:
        UserError: no held-out text, or a model without attention whose weights are distributions.
    """

    def __init__(self, config: RunConfig, prepared: Prepared, program: Program) -> None:
        objective, self._program = config.objective, program
        parts = parts_of(nnx.merge(program.graphdef, program.abstract.params))
        self._wanted = [(part, layer) for part in parts for layer, shown in enumerate(part.has_distributions) if shown]
        if not self._wanted:
            raise UserError(
                f"log.attention: a model of family {config.model.family!r} with this attention has no weights that are "
                "distributions; set it to null"
            )
        if not prepared.validation:
            raise UserError(
                "log.attention: it needs held-out text; set data.validation_fraction above 0, or it to null"
            )
        parts_of_batch = math.lcm(batch_parts(program.mesh, config.mesh.rules), jax.process_count())
        host = evaluation_batches(
            prepared, config.data, batch_size=-(-ROWS // parts_of_batch) * parts_of_batch, length=config.sequence_length,
            objective=objective, process_index=jax.process_index(), process_count=jax.process_count(), max_batches=1,
        )  # fmt: skip
        self._batch = program.to_devices(host.batch(0))

        def measure(params: nnx.State, batch: Batch) -> dict[str, dict[str, Any]]:
            hooks = Hooks(keep=kept_for(self._wanted))
            objective.evaluate(hooked(nnx.merge(program.graphdef, params), hooks), batch, config.loss)
            hooks.check()
            sums = sums_of(self._wanted, hooks.kept)
            if not jax.sharding.get_abstract_mesh().empty:
                # Every process reads them.
                sums = jax.lax.with_sharding_constraint(sums, PartitionSpec())
            return sums

        self._measure = jax.jit(measure)

    def __call__(self, params: nnx.State) -> Mapping[str, float]:
        """For each layer: the means over its heads of the entropy in bits, and of the weights of the token before (`previous`)
        and of the first one (`first`); and of these two also the head that has most."""
        sums = jax.device_get(self._measure(params, self._batch))
        values: dict[str, float] = {}
        for part, layer in self._wanted:
            found = means_of(part, sums[part.place(layer, "weights")])
            name = f"{'' if part.name == 'attention' else f'{part.name}_'}layer_{layer}"
            for measure in ("entropy", "previous", "first"):
                if measure in found:
                    values[f"{name}_{measure}"] = float(np.mean(found[measure]))
            for measure in ("previous", "first"):
                if measure in found:
                    values[f"{name}_most_{measure}"] = float(np.max(found[measure]))
        return values
