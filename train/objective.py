"""What a step minimises, by objective.

B batch, T position, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from train.loss import Batch, LossConfig, LossSums, cross_entropy, of_rows, with_router_loss
from train.tasks.losses import TASK_LOSSES, sums_of
from transformer.models.heads import contrastive_logits
from transformer.types import Array, PRNGKeyArray

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
        return with_router_loss(LossSums(loss, nll, weight), output)


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
        sums = of_rows(logits_BB, jnp.arange(logits_BB.shape[0]), batch["weights"], config)
        return with_router_loss(with_router_loss(sums, sides[0]), sides[1])


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
    "contrastive": contrastive,
    **{kind: sums_of(task) for kind, task in TASK_LOSSES.items()},
}
"""The loss of each objective of `train.data.objective_config`."""


def _sums(output: Any, batch: Batch, config: LossConfig) -> LossSums:
    with jax.named_scope("loss"):
        return with_router_loss(cross_entropy(output.logits, batch["targets"], batch["weights"], config), output)


def _at(batch: Batch, places_BK: Array) -> Batch:
    """Targets and weights [B, K] at some places of each row."""
    return {name: jnp.take_along_axis(batch[name], places_BK, axis=1) for name in ("targets", "weights")}
