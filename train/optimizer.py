"""optax optimisers and schedules from config."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

from train.trained import BELOW
from transformer.errors import Config, require
from transformer.pipeline import is_in_stages, is_stacked, is_variable
from transformer.resume import Never, OnResume


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """An optimiser and its schedule, with clipping, decay, freezing and averaging of parameters."""

    on_resume: ClassVar[OnResume] = OnResume.ASK

    name: Never[Literal["adamw", "lion", "adafactor", "muon", "sgd"]] = "adamw"
    """Optimiser. muon updates the matrices of the blocks; adamw then updates embeddings, the output layer, gains and biases."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """Schedule of the learning rate after warm-up; wsd stays at the peak and falls linearly over the last decay_fraction."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """Final learning rate as a fraction of the peak (cosine, linear, wsd)."""
    decay_fraction: float = 0.2
    """Fraction of all steps over which wsd falls."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings, multiplied by the learning rate; gains and biases never decay."""
    b1: float = 0.9
    """Decay of the first moment (adamw, lion); momentum of sgd and muon."""
    b2: float = 0.95
    """Decay of the second moment (adamw, lion, and adamw's part in muon)."""
    moment_dtype: Never[Literal["float32", "bfloat16"]] = "float32"
    """Data type of the first moment (adamw, lion), or of the momentum (sgd, muon); bfloat16 takes half the memory."""
    epsilon: float = 1e-8
    """Epsilon that is added to the root of the second moment."""
    adam_learning_rate: float | None = None
    """Peak learning rate of adamw's part in muon; null: learning_rate."""
    clip_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it; null: never."""
    layer_decay: Never[float | None] = None
    """Each block's learning rate is this times that of the block above it, the embeddings' this times that of the first block;
    heads and the final norm have the full rate (Howard & Ruder 2018; Clark et al. 2020). null: the same rate for all."""
    freeze: Never[tuple[str, ...]] = ()
    """Parameters that are not trained: patterns of their paths, such as embed.* or layers.blocks.attention.*"""
    ema_decay: Never[float | None] = None
    """Keep a moving average of the parameters with this decay, and evaluate and generate with it; null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_used()
        for field in ("learning_rate", "epsilon"):
            require(self, field, 0 < getattr(self, field) < float("inf"), "allowed: above 0")
        for field in ("adam_learning_rate", "clip_norm"):
            require(self, field, getattr(self, field) is None or getattr(self, field) > 0, "allowed: above 0, or null")
        decay = self.layer_decay
        require(self, "layer_decay", decay is None or 0 < decay <= 1, "allowed: above 0, at most 1, or null")
        for field in ("warmup_steps", "weight_decay"):
            require(self, field, getattr(self, field) >= 0, "allowed: 0 or more")
        for field in ("final_fraction", "decay_fraction"):
            require(self, field, 0 <= getattr(self, field) <= 1, "allowed: 0 to 1")
        for field in ("b1", "b2"):
            require(self, field, 0 <= getattr(self, field) < 1, "allowed: 0 or more, below 1")
        require(
            self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "allowed: between 0 and 1, or null"
        )

    def _check_used(self) -> None:
        """Raise a `ConfigError` for a setting other than its default that the optimiser, or the schedule, does not use."""
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        for choice, users in (("name", _USED_BY), ("schedule", _USED_BY_SCHEDULE)):
            chosen = getattr(self, choice)
            for field, names in users.items():
                wanted = f"{choice} {chosen} does not use it, only {', '.join(names)}; allowed: {usual[field]!r}, or leave it out"
                require(self, field, chosen in names or getattr(self, field) == usual[field], wanted)


_USED_BY = {
    "b1": ("adamw", "lion", "muon", "sgd"),
    "b2": ("adamw", "lion", "muon"),
    "epsilon": ("adamw",),
    "moment_dtype": ("adamw", "lion", "muon", "sgd"),
    "adam_learning_rate": ("muon",),
}
"""Settings of the update, and the optimisers that use them."""
_USED_BY_SCHEDULE = {"final_fraction": ("cosine", "linear", "wsd"), "decay_fraction": ("wsd",)}


def make_schedule(config: OptimizerConfig, num_steps: int, peak: float | None = None) -> optax.Schedule:
    """Step → learning rate, over `num_steps` steps in all."""
    peak = config.learning_rate if peak is None else peak
    warmup = min(config.warmup_steps, num_steps)
    rest = max(num_steps - warmup, 1)
    last = peak * config.final_fraction
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
        case "linear":
            after = optax.linear_schedule(peak, last, rest)
        case "wsd":
            decay = max(round(num_steps * config.decay_fraction), 1)
            after = optax.join_schedules(
                [optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)], [max(rest - decay, 0)]
            )
        case "inverse_sqrt":
            # Vaswani et al. 2017, equation 3, scaled to reach `peak` at the end of the warm-up.
            start = max(warmup, 1)
            after = lambda step: peak * (start / (jnp.maximum(step, 0) + start)) ** 0.5  # noqa: E731
        case "constant":
            after = optax.constant_schedule(peak)
    if not warmup:
        return after
    # The first step already learns: 1/warmup of the peak, not 0.
    return optax.join_schedules([lambda step: peak * (step + 1) / warmup, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, num_steps: int, num_layers: int | None = None
) -> optax.GradientTransformation:
    """The optimiser with its schedule over `num_steps` steps, global-norm clipping in front.

    Args:
        num_layers: of the model, for `layer_decay`.
    """
    schedule = make_schedule(config, num_steps)
    decays: Any = decay_mask
    match config.name:
        case "adamw":
            update = optax.adamw(
                schedule, b1=config.b1, b2=config.b2, eps=config.epsilon, mu_dtype=config.moment_dtype,
                weight_decay=config.weight_decay, mask=decays,
            )  # fmt: skip
        case "lion":
            update = optax.lion(
                schedule, b1=config.b1, b2=config.b2, mu_dtype=config.moment_dtype, weight_decay=config.weight_decay,
                mask=decays,
            )  # fmt: skip
        case "adafactor":
            update = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
                optax.add_decayed_weights(config.weight_decay, mask=decays),
                optax.scale_by_learning_rate(schedule),
            )
        case "muon":
            # Liu et al. 2025: the update's RMS matches AdamW's, so that one learning rate serves both.
            update = contrib.muon(
                schedule,
                beta=config.b1,
                weight_decay=config.weight_decay,
                weight_decay_mask=decays,
                adam_b1=config.b1,
                adam_b2=config.b2,
                adam_weight_decay=config.weight_decay,
                adam_learning_rate=make_schedule(config, num_steps, config.adam_learning_rate),
                muon_weight_dimension_numbers=_muon_dimensions,
                consistent_rms=0.2,
                mu_dtype=config.moment_dtype,
            )
        case "sgd":
            update = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decays),
                optax.sgd(
                    schedule, momentum=config.b1 or None, nesterov=config.b1 > 0, accumulator_dtype=config.moment_dtype
                ),
            )
    # The state has the same parts with clipping and without, so that a run may resume with another clip_norm.
    parts = [optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm), update]
    if config.layer_decay is not None:
        assert num_layers is not None
        # Every rule here ends with the rate, applied to weight decay too, and keeps no state that depends on it, so
        # multiplying an update multiplies the rate.
        parts.append(_scaled_by_layer(config.layer_decay, num_layers))
    return optax.chain(*parts)


def layer_factors(params: nnx.State, decay: float, num_layers: int) -> nnx.State:
    """The multiplier of each parameter's learning rate: decay^(L - l) for block l, from 0, as an array over the layers'
    dims; decay^(L + 1) below the blocks; 1 above them."""

    def factor(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        if is_stacked(variable):
            # In pipeline stages the layers are two dims, in order.
            lead = 2 if is_in_stages(variable) else 1
            shape = variable.get_value().shape
            ones = (1,) * (len(shape) - lead)
            factors = decay ** np.arange(num_layers, 0, -1, dtype=np.float32)
            return variable.replace(factors.reshape(*shape[:lead], *ones))
        below = path and path[0].key in BELOW
        return variable.replace(np.float32(decay ** (num_layers + 1) if below else 1))

    return jax.tree_util.tree_map_with_path(factor, params, is_leaf=is_variable)


def _scaled_by_layer(decay: float, num_layers: int) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda update, by: update * by, updates, layer_factors(updates, decay, num_layers))

    return optax.stateless(scale)


def decay_mask(params: nnx.State) -> nnx.State:
    """True for matrices and embeddings, False for gains and biases, whose names are `scale`, `magnitude` and `bias`."""

    def decays(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        names = {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
        return variable.replace(not names & {"scale", "bias", "magnitude"})

    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _muon_dimensions(params: nnx.State) -> nnx.State:
    """Which dims of each parameter are the rows and the columns of its matrix, by their logical names.

    `embed` is one side, all other named dims the other; `layers` is a batch of matrices. A parameter without a second
    side, or with a vocabulary as one, is not a matrix for Muon.
    """

    def dimensions(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata().get("out_sharding") or ()
        inner = [dim for dim, name in enumerate(axes) if name not in ("layers", "embed")]
        if "embed" not in axes or not inner or "vocab" in axes or None in axes:
            return variable.replace(None)
        embed = [axes.index("embed")]
        rows, columns = (embed, inner) if embed < inner else (inner, embed)
        return variable.replace(contrib.MuonDimensionNumbers(tuple(rows), tuple(columns)))

    return jax.tree.map(dimensions, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
