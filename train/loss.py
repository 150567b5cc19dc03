"""The components of losses.

B batch, T position, V vocab, C classes. Losses are sums with their total weight, never means: the mean over the global batch
is taken once, regardless of microbatches and devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from transformer.errors import Config, UserError, require
from transformer.layers.mixture_of_experts import RouterCoefficients, RouterSums
from transformer.loss import token_cross_entropy
from transformer.resume import Free, OnResume
from transformer.types import Array, Float, Int

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """Additional terms of the cross-entropy, and how it is computed."""

    on_resume: ClassVar[OnResume] = OnResume.ASK

    z_loss: float = 0.0
    """Weight of the z-loss log(Z)², which keeps the softmax normaliser Z near 1 (1e-4 is usual)."""
    label_smoothing: float = 0.0
    """Label smoothing: probability spread uniformly over the vocabulary, or over the classes."""
    chunk: Free[Literal["auto"] | int | None] = "auto"
    """Most tokens of a device whose logits are held at once; auto: about 512 MiB of them; null: all tokens of a microbatch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "z_loss", self.z_loss >= 0, "allowed: 0 or more")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "allowed: 0 or more, below 1")
        holds = not isinstance(self.chunk, int) or self.chunk >= 1
        require(self, "chunk", holds, "allowed: auto, a number of tokens (1 or more), or null")

    def plain(self) -> LossConfig:
        """Without the additional terms: the loss of an evaluation, computed in the same way."""
        return LossConfig(chunk=self.chunk)


DEFAULT_LOSS = LossConfig()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over the predictions, tokens or rows, in float32."""

    loss: Float[Array, ""]
    """The training loss, z-loss and smoothing included, without the losses of routers."""
    nll: Float[Array, ""]
    """Negative log-likelihood of the targets, in nats."""
    weight: Float[Array, ""]
    """Number of target tokens, or of rows."""
    correct: Float[Array, ""] | None = None
    """For classes: number of rows, or tokens, that are classified correctly."""
    count: Float[Array, ""] | None = None
    """Number of rows, or tokens, if `weight` is not uniform."""
    routers: tuple[RouterSums, ...] = ()
    """Of each stack of layers with a mixture of experts."""
    also: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
    """Sums whose means by `weight` are metrics of a step and of an evaluation, by name."""

    def __add__(self, other: LossSums) -> LossSums:
        return jax.tree.map(jnp.add, self, other)

    def total(self, coefficients: tuple[RouterCoefficients, ...] | None = None) -> Float[Array, ""]:
        """The training loss with the losses of routers, as a sum.

        Args:
            coefficients: of `routers`, from the whole batch if these are the sums of a part of it (`router_coefficients`); None:
                these are the sums of the whole batch.
        """
        if coefficients is None:
            coefficients = router_coefficients(self.weight, self.routers)
        return sum((sums.loss(own) for sums, own in zip(self.routers, coefficients, strict=True)), self.loss)


def router_coefficients(weight: Float[Array, ""], routers: tuple[RouterSums, ...]) -> tuple[RouterCoefficients, ...]:
    """The coefficients of the routers' sums in the loss, from a whole batch's `weight` and sums."""
    return tuple(sums.coefficients(weight) for sums in routers)


def cross_entropy(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    config: LossConfig,
) -> LossSums:
    """Cross-entropy with label smoothing (Szegedy et al. 2016) and z-loss (Chowdhery et al. 2022, section 5)."""
    logits = logits_BTV.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum instead of a gather: its gradient is elementwise, while that of a gather is a scatter, and it needs no
    # communication when the vocabulary is sharded.
    is_target = jnp.arange(logits.shape[-1]) == targets_BT[..., None]
    nll = log_z - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    loss = nll
    if config.label_smoothing:
        uniform = log_z - jnp.mean(logits, axis=-1)
        loss = (1 - config.label_smoothing) * nll + config.label_smoothing * uniform
    if config.z_loss:
        loss += config.z_loss * jnp.square(log_z)
    return LossSums(jnp.sum(loss * weights_BT), jnp.sum(nll * weights_BT), jnp.sum(weights_BT))


def of_tokens(model: Any, output: Any, batch: Batch, config: LossConfig) -> LossSums:
    """The cross-entropy of `targets` by `weights` [B, T], and the model's own losses, without the logits of all tokens.

    Args:
        model: has predicted the tokens; its `projection` has not been applied to the output's `hidden`.
    """
    with jax.named_scope("loss"):
        loss, nll = token_cross_entropy(
            output.hidden, model.projection(), batch["targets"], batch["weights"], z_loss=config.z_loss,
            label_smoothing=config.label_smoothing, chunk=config.chunk,
        )  # fmt: skip
        return with_added_loss(LossSums(loss, nll, jnp.sum(batch["weights"])), output)


def of_classes(
    logits_BTC: Float[Array, "B T C"],
    labels_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    config: LossConfig,
    class_weights: Sequence[float] | None = None,
) -> LossSums:
    """Cross-entropy over classes, and the number of correct predictions.

    Args:
        class_weights: one for each class, as in torch's `CrossEntropyLoss(weight=...)`; None: uniform.

    Raises:
        UserError: the number of weights differs from that of the classes.
    """
    is_right_BT = logits_BTC.argmax(-1) == labels_BT
    correct = jnp.sum(jnp.where(is_right_BT, weights_BT, 0))
    if class_weights is None:
        return dataclasses.replace(cross_entropy(logits_BTC, labels_BT, weights_BT, config), correct=correct)
    if len(class_weights) != logits_BTC.shape[-1]:
        raise UserError(
            f"objective.class_weights: got {len(class_weights)} numbers; there are {logits_BTC.shape[-1]} classes"
        )
    # Scaling all weights does not change the mean; a sum of weights of at least 1 is divided by unchanged.
    least = min(weight for weight in class_weights if weight > 0)
    of_class_C = jnp.array([weight / least for weight in class_weights], jnp.float32)
    sums = cross_entropy(logits_BTC, labels_BT, weights_BT * of_class_C[jnp.maximum(labels_BT, 0)], config)
    return dataclasses.replace(sums, correct=correct, count=jnp.sum(weights_BT))


def of_rows(
    logits_BC: Float[Array, "B C"],
    labels_B: Int[Array, " B"],
    weights_B1: Float[Array, "B 1"],
    config: LossConfig,
    class_weights: Sequence[float] | None = None,
) -> LossSums:
    """`of_classes` for whole rows."""
    return of_classes(logits_BC[:, None], labels_B[:, None], weights_B1, config, class_weights)


def of_labels(
    logits_BC: Float[Array, "B C"], labels_BC: Int[Array, "B C"], weights_B: Float[Array, " B"], *, least: float = 0.0
) -> LossSums:
    """The binary cross-entropy of each class, as a mean over the classes of a row, as torch's `BCEWithLogitsLoss` has it, and the
    number of rows of which all classes are right.

    Args:
        labels_BC: 1 for the classes of a row, else 0.
        least: the logit from which on a class is predicted.
    """
    wide_BC = logits_BC.astype(jnp.float32)
    targets_BC = labels_BC.astype(jnp.float32)
    # log(1 + exp(x)) - x y, without overflow.
    of_class_BC = jnp.maximum(wide_BC, 0) - wide_BC * targets_BC + jnp.log1p(jnp.exp(-jnp.abs(wide_BC)))
    loss = jnp.sum(of_class_BC.mean(-1) * weights_B)
    is_right_B = ((wide_BC >= least) == (labels_BC > 0)).all(-1)
    return LossSums(loss, loss, jnp.sum(weights_B), jnp.sum(jnp.where(is_right_B, weights_B, 0)))


def with_added_loss(sums: LossSums, output: Any) -> LossSums:
    """The sums with the model's auxiliary losses, if its output has some."""
    sums = dataclasses.replace(sums, routers=sums.routers + output.routers)
    if output.added_loss is None:
        return sums
    return dataclasses.replace(sums, loss=sums.loss + output.added_loss * sums.weight)
