"""What a step minimises in the tasks of labelled documents, and what the model tells of each row.

B batch, T position, C classes, Q choices. A task's loss gives its sums and, of each row, what its metrics are made from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from train.loss import Batch, LossConfig, LossSums, cross_entropy, of_classes, of_rows, with_router_loss
from transformer.models.heads import best_span, choices
from transformer.sharding import constrain
from transformer.types import PRNGKeyArray

Outputs = dict[str, jax.Array]
"""[B, ...], by name."""

TaskLoss = Callable[..., tuple[LossSums, Outputs]]
"""(model, batch, config, key=None) -> the sums, and what the model tells; a key turns dropout on."""

_NEVER = -1e9  # a finite number: what is nowhere likely has a gradient of 0


def classification(
    model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None
) -> tuple[LossSums, Outputs]:
    """Tell the class of a row (Devlin et al. 2018, section 4.1).

    Args:
        batch: tokens, positions and segments [B, T] int32, of pairs token_types; labels [B] int32 (-1: a row of padding),
            weights [B, 1] float32.

    Returns:
        The sums, and logits [B, C].
    """
    output = _told(model, batch, key)
    with jax.named_scope("loss"):
        sums = of_rows(output.logits, batch["labels"], batch["weights"], config)
    return with_router_loss(sums, output), {"logits": output.logits}


def regression(
    model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None
) -> tuple[LossSums, Outputs]:
    """Tell the number of a row; the loss is the squared error.

    Args:
        batch: as for `classification`, with labels [B] float32.

    Returns:
        The sums, and values [B].
    """
    output = _told(model, batch, key)
    with jax.named_scope("loss"):
        values_B, weights_B = output.logits[:, 0], batch["weights"][:, 0]
        error = jnp.sum(jnp.square(values_B - batch["labels"]) * weights_B)
        sums = LossSums(error, error, jnp.sum(weights_B))
    return with_router_loss(sums, output), {"values": values_B}


def token_classification(
    model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None
) -> tuple[LossSums, Outputs]:
    """Tell the tag of each word, at its first token (Devlin et al. 2018, section 5.3).

    Args:
        batch: tokens, positions, segments and targets [B, T] int32, weights [B, T] float32.

    Returns:
        The sums, and of each token the likeliest class [B, T] and its probability [B, T].
    """
    output = _told(model, batch, key)
    with jax.named_scope("loss"):
        sums = of_classes(output.logits, batch["targets"], batch["weights"], config)
    likely_BTC = jax.nn.softmax(output.logits)
    return with_router_loss(sums, output), {"classes": likely_BTC.argmax(-1), "probabilities": likely_BTC.max(-1)}


def answer(
    model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None, answer_length: int = 30
) -> tuple[LossSums, Outputs]:
    """Tell where in the second text the answer to the first one starts and ends (Devlin et al. 2018, sections 4.2 and 4.3).

    Args:
        batch: as for `classification`, with token_types, and labels [B, 2] int32: the first and the last token's places.
        answer_length: the most tokens of a span.

    Returns:
        The sums, and the first and the last token of the best span, its score, and that of `[CLS]`, each [B].
    """
    output = _told(model, batch, key)
    with jax.named_scope("loss"):
        logits_BT2 = jnp.where(batch["segments"][..., None] > 0, output.logits, _NEVER)
        # The mean of start and end.
        weights_B2 = jnp.broadcast_to(batch["weights"] / 2, batch["labels"].shape)
        sums = cross_entropy(logits_BT2.swapaxes(1, 2), batch["labels"], weights_B2, config)
    with jax.named_scope("best_span"):
        # Of the second text all but its [SEP].
        types_BT = batch["token_types"]
        allowed_BT = (types_BT == 1) & (jnp.roll(types_BT, -1, axis=1) == 1)
        first_B, last_B, score_B = best_span(output.logits, allowed_BT, max_tokens=answer_length)
    spans = {"first": first_B, "last": last_B, "score": score_B, "null_score": output.logits[:, 0].sum(-1)}
    return with_router_loss(sums, output), spans


def choice(
    model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None
) -> tuple[LossSums, Outputs]:
    """Tell which of several texts goes on behind another (Devlin et al. 2018, section 4.4).

    Args:
        batch: tokens, positions, segments and token_types [B, Q, T] int32, labels [B] int32, weights [B, 1] float32.

    Returns:
        The sums, and logits [B, Q].
    """
    Q, T = batch["tokens"].shape[1:]
    names = ("tokens", "positions", "segments", "token_types")
    rows = {name: constrain(batch[name].reshape(-1, T), "batch", "seq") for name in names}
    output = _told(model, rows, key)
    with jax.named_scope("loss"):
        logits_BQ = choices(output.logits, Q)
        sums = of_rows(logits_BQ, batch["labels"], batch["weights"], config)
    return with_router_loss(sums, output), {"logits": logits_BQ}


TASK_LOSSES: dict[str, TaskLoss] = {
    "classification": classification,
    "regression": regression,
    "token_classification": token_classification,
    "answer": answer,
    "choice": choice,
}
"""The loss of each objective for labelled documents."""


def sums_of(task: TaskLoss) -> Callable[..., LossSums]:
    """The sums alone, as training takes them."""

    def loss(model: Any, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None) -> LossSums:
        return task(model, batch, config, key=key)[0]

    return loss


def _told(model: Any, batch: Batch, key: PRNGKeyArray | None) -> Any:
    return model(
        batch["tokens"], positions_BT=batch["positions"], segments_BT=batch["segments"],
        token_types_BT=batch.get("token_types"), key=key,
    )  # fmt: skip
