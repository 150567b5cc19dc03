"""What a step minimises.

B batch, T position, V vocab. Losses are sums with the weight they were taken over, never means: the mean over the whole
global batch is taken once, however it was cut into microbatches and devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transformer.errors import require
from transformer.models.heads import contrastive_logits
from transformer.types import Array, Float, Int, PRNGKeyArray

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Additions to the cross-entropy."""

    z_loss: float = 0.0
    """Weight of log(Z)², which keeps the logits' normaliser near 1 (1e-4 is usual)."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread evenly over the vocabulary, or over the classes."""
    temperature: float = 0.05
    """By which the contrastive objective divides cosines."""

    def __post_init__(self) -> None:
        require(self, "temperature", self.temperature > 0, "allowed: above 0")
        require(self, "z_loss", self.z_loss >= 0, "allowed: 0 or more")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "allowed: 0 or more, below 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over what is predicted, tokens or rows, in float32."""

    loss: Float[Array, ""]
    """What is minimised, z-loss and smoothing included."""
    nll: Float[Array, ""]
    """Negative log-likelihood of the targets, in nats."""
    weight: Float[Array, ""]
    """Number of target tokens, or of rows."""
    correct: Float[Array, ""] | None = None
    """Of classes: number of rows whose likeliest class is theirs."""

    def __add__(self, other: LossSums) -> LossSums:
        return jax.tree.map(jnp.add, self, other)


def cross_entropy(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    config: LossConfig,
) -> LossSums:
    """Cross-entropy with label smoothing (Szegedy et al. 2016) and z-loss (Chowdhery et al. 2022, section 5)."""
    logits = logits_BTV.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum in place of a gather: its gradient is elementwise, where a gather's is a scatter, and it stays local
    # when the vocabulary is sharded.
    is_target = jnp.arange(logits.shape[-1]) == targets_BT[..., None]
    nll = log_z - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    loss = nll
    if config.label_smoothing:
        uniform = log_z - jnp.mean(logits, axis=-1)
        loss = (1 - config.label_smoothing) * nll + config.label_smoothing * uniform
    if config.z_loss:
        loss += config.z_loss * jnp.square(log_z)
    return LossSums(jnp.sum(loss * weights_BT), jnp.sum(nll * weights_BT), jnp.sum(weights_BT))


Loss = Callable[..., LossSums]
"""(model, batch, config, key=None) -> LossSums; a key turns dropout on."""


def causal(model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None) -> LossSums:
    """Predict each next token; of a prefix language model, behind the prefix alone.

    Args:
        batch: tokens, targets [B, T] int32 and weights [B, T] float32; positions and segments [B, T] where documents are
            packed; prefix [B], how many first tokens all others see.
        key: turns dropout on.
    """
    output = model(
        batch["tokens"], positions_BT=batch.get("positions"), segments_BT=batch.get("segments"),
        **({"prefix_B": batch["prefix"]} if "prefix" in batch else {}), key=key,
    )  # fmt: skip
    return _sums(output, batch, config)


def masked(model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None) -> LossSums:
    """Predict the tokens that were hidden (Devlin et al. 2018, section 3.1), and whether the second sentence belongs behind
    the first where the batch has labels.

    Args:
        batch: tokens, targets [B, T] int32, weights [B, T] float32 (1 at hidden tokens), positions and segments [B, T]; with
            two sentences a row also token_types [B, T] and labels [B]; predicted [B, K], places among which all hidden tokens
            are, so that no others need be scored.
    """
    predicted = batch.get("predicted")
    output = model(
        batch["tokens"], positions_BT=batch["positions"], segments_BT=batch["segments"],
        token_types_BT=batch.get("token_types"), predicted_BK=predicted, key=key,
    )  # fmt: skip
    sums = _sums(output, batch if predicted is None else batch | _at(batch, predicted), config)
    if "labels" not in batch:
        return sums
    with jax.named_scope("sentence_loss"):
        # A mean over rows beside a mean over tokens: brought to the tokens' weight. A row of padding has the label -1.
        rows = (batch["labels"] >= 0).astype(jnp.float32)
        sentence = cross_entropy(output.pooled_logits[:, None], batch["labels"][:, None], rows[:, None], LossConfig())
        added = sentence.loss / jnp.maximum(sentence.weight, 1) * sums.weight
        return dataclasses.replace(sums, loss=sums.loss + added)


def replaced_tokens(model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None) -> LossSums:
    """Predict the tokens that were hidden with the generator, put draws from it in their places, and tell with the encoder
    which tokens are not what stood there (Clark et al. 2020, section 3.1).

    The generator learns to predict, not to deceive: no gradient goes through a draw. The likelihood that is reported is
    the encoder's, over all tokens. Without a key the draws are the same every time.

    Args:
        batch: as for `masked`, with predicted [B, K].
    """
    network_key, encoder_key, draw_key = (None, None, jax.random.key(0)) if key is None else jax.random.split(key, 3)
    places = {"positions_BT": batch["positions"], "segments_BT": batch["segments"]}
    hidden = _at(batch, batch["predicted"])
    scores_BKV = model.generator_logits(
        batch["tokens"], predicted_BK=batch["predicted"], key=network_key, **places
    )  # fmt: skip
    with jax.named_scope("generator_loss"):
        sums = cross_entropy(scores_BKV, hidden["targets"], hidden["weights"], config)
        generator = sums.loss / jnp.maximum(sums.weight, 1)
    with jax.named_scope("replace"):
        drawn_BK = jax.random.categorical(draw_key, jax.lax.stop_gradient(scores_BKV)).astype(batch["tokens"].dtype)
        seen_BK = jnp.where(hidden["weights"] > 0, drawn_BK, hidden["targets"])
        # What stood there everywhere, and the draws where something was hidden.
        seen_BT = jnp.put_along_axis(batch["targets"], batch["predicted"], seen_BK, axis=1, inplace=False)
        is_replaced_BT = seen_BT != batch["targets"]
    output = model(seen_BT, key=encoder_key, **places)
    with jax.named_scope("loss"):
        valid_BT = (batch["segments"] != 0).astype(jnp.float32)
        # Rows that only fill a batch count as little as padding.
        valid_BT *= jnp.max(batch["weights"], axis=1, keepdims=True)
        signed = jnp.where(is_replaced_BT, output.logits, -output.logits)
        nll, weight = -jnp.sum(jax.nn.log_sigmoid(signed) * valid_BT), jnp.sum(valid_BT)
        loss = model.config.replaced_weight * nll + generator * weight
        return _with_router_loss(LossSums(loss, nll, weight), output)


def to_text(model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None) -> LossSums:
    """Predict each next token of the target from the source and the target's tokens before it (teacher forcing).

    Args:
        batch: source_tokens, source_segments, source_positions [B, S] int32; tokens, targets, segments, positions [B, T]
            int32 and weights [B, T] float32.
    """
    output = model(
        batch["source_tokens"], batch["tokens"], source_segments_BS=batch["source_segments"],
        source_positions_BS=batch["source_positions"], segments_BT=batch["segments"], positions_BT=batch["positions"],
        key=key,
    )  # fmt: skip
    return _sums(output, batch, config)


def classification(model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None) -> LossSums:
    """Tell the class of a row (Devlin et al. 2018, section 4.1).

    Args:
        batch: tokens, positions and segments [B, T] int32, labels [B] int32 (-1: a row of padding), weights [B, 1] float32.
    """
    output = model(batch["tokens"], positions_BT=batch["positions"], segments_BT=batch["segments"], key=key)
    with jax.named_scope("loss"):
        return _with_router_loss(_of_rows(output.logits, batch["labels"], batch["weights"], config), output)


def contrastive(model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None) -> LossSums:
    """Tell the other side of each pair among the batch's (van den Oord et al. 2018; Gao et al. 2021, section 2.1).

    Of several microbatches each row finds its own among its microbatch's.

    Args:
        batch: tokens, positions and segments [B, T] int32 of one side; the same of the other, named other_...; weights [B, 1]
            float32, 0 for a row of padding.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    sides = [
        model(batch[f"{side}tokens"], positions_BT=batch[f"{side}positions"], segments_BT=batch[f"{side}segments"], key=own)
        for side, own in zip(("", "other_"), keys, strict=True)
    ]  # fmt: skip
    with jax.named_scope("loss"):
        valid_B = batch["weights"][:, 0] > 0
        logits_BB = contrastive_logits(sides[0].logits, sides[1].logits, valid_B, temperature=config.temperature)
        sums = _of_rows(logits_BB, jnp.arange(logits_BB.shape[0]), batch["weights"], config)
        return _with_router_loss(_with_router_loss(sums, sides[0]), sides[1])


LOSSES: dict[str, Loss] = {
    "causal": causal,
    "prefix": causal,
    "masked": masked,
    "next_sentence": masked,
    "sentence_order": masked,
    "replaced_tokens": replaced_tokens,
    "span_corruption": to_text,
    "ul2": to_text,
    "seq2seq": to_text,
    "classification": classification,
    "contrastive": contrastive,
}
"""The loss of each objective of `train.data.objective_config`."""


def _sums(output: Any, batch: Batch, config: LossConfig) -> LossSums:
    with jax.named_scope("loss"):
        return _with_router_loss(cross_entropy(output.logits, batch["targets"], batch["weights"], config), output)


def _of_rows(
    logits_BC: Float[Array, "B C"], labels_B: Int[Array, B], weights_B1: Float[Array, "B 1"], config: LossConfig
) -> LossSums:
    """Cross-entropy over the classes of whole rows, and how many are right."""
    sums = cross_entropy(logits_BC[:, None], labels_B[:, None], weights_B1, config)
    is_right_B = logits_BC.argmax(-1) == labels_B
    return dataclasses.replace(sums, correct=jnp.sum(jnp.where(is_right_B[:, None], weights_B1, 0)))


def _at(batch: Batch, places_BK: Array) -> Batch:
    """Targets and weights [B, K] at some places of each row."""
    return {name: jnp.take_along_axis(batch[name], places_BK, axis=1) for name in ("targets", "weights")}


def _with_router_loss(sums: LossSums, output: Any) -> LossSums:
    if output.router_loss is None:
        return sums
    return dataclasses.replace(sums, loss=sums.loss + output.router_loss * sums.weight)
