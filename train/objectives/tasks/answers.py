"""Extractive question answering: predicting the answer's span in a context; SQuAD's metrics (Rajpurkar et al. 2016, 2018).

Axes: B rows, T positions.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from train.data.examples.rows import TaskRows
from train.data.examples.windows import AnswerWindows
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import TokenArray
from train.data.sources.records import Answers, Document
from train.data.tokenization.align import encode_with_places
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import Batch, LossConfig, LossSums, cross_entropy, with_added_loss
from train.objectives.objective import BatchShapes, Outputs, label_shape
from train.objectives.tasks.task import Labelling, Prediction, Rows, Task, forward, with_gold
from transformer.errors import require
from transformer.models.heads import best_span
from transformer.types import Keys

_ARTICLES = re.compile(r"\b(a|an|the)\b")


_NEVER = -1e9  # finite, so that an impossible position has a gradient of 0


@dataclass(frozen=True, kw_only=True)
class Answer(Task):
    """Predicts the span of a question's answer in a context."""

    kind: Literal["answer"] = "answer"
    stride: int = 128
    """Tokens from the beginning of one window over a long context to the next."""
    question_length: int = 64
    """The longest question, in tokens, and at most half of a row; a longer one is cut."""
    answer_length: int = 30
    """The longest predicted answer, in tokens."""
    no_answer: bool = False
    """Some questions have no answer (SQuAD 2.0): none is predicted if `[CLS]` scores more than the best answer, by
    no_answer_margin."""
    no_answer_margin: float = 0.0
    """That margin; the best margin on the held-out questions is reported at the end of a run."""

    heads = ("answer",)
    label_kind = "answers"
    least_length = 5
    loss_settings = ("z_loss",)
    metrics = ("exact_match", "f1")
    document_fields = (
        ("text_field", "question"),
        ("target_field", "context"),
        ("label_field", "answers"),
        ("label_kind", "answers"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("stride", "question_length", "answer_length"):
            require(self, field, getattr(self, field) >= 1, "allowed: 1 or more")

    def rows(self, array: TokenArray, tokenizer: Tokenizer, length: int, *, shown: bool = False) -> TaskRows:
        return AnswerWindows(
            array, tokenizer, length, stride=self.stride, question_length=self.question_length, shown=shown
        )

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        return super().batch(rows, length, data) | label_shape(rows, 2)

    def outputs(
        self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None
    ) -> tuple[LossSums, Outputs]:
        """The mean cross-entropy of the answer's start and end, whose positions are `labels` [B, 2] (Devlin et al. 2018, sections
        4.2 and 4.3); and the `first` and the `last` token of the best span, its `score`, and that of `[CLS]`, the
        `null_score`, each [B]."""
        output = forward(model, batch, key)
        with jax.named_scope("loss"):
            logits_BT2 = jnp.where(batch["segments"][..., None] > 0, output.logits, _NEVER)
            # The mean of start and end.
            weights_B2 = jnp.broadcast_to(batch["weights"] / 2, batch["labels"].shape)
            sums = cross_entropy(logits_BT2.swapaxes(1, 2), batch["labels"], weights_B2, config)
        with jax.named_scope("best_span"):
            # The second text without its [SEP].
            types_BT = batch["token_types"]
            allowed_BT = (types_BT == 1) & (jnp.roll(types_BT, -1, axis=1) == 1)
            first_B, last_B, score_B = best_span(output.logits, allowed_BT, max_tokens=self.answer_length)
        spans = {"first": first_B, "last": last_B, "score": score_B, "null_score": output.logits[:, 0].sum(-1)}
        return with_added_loss(sums, output), spans

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows, names: Labelling
    ) -> list[Prediction]:
        """The best span of all windows over a context. A question with a missing window has no answer yet."""
        assert isinstance(examples, AnswerWindows)
        numbers = examples.documents[indices]
        windows = np.bincount(examples.documents, minlength=len(documents))
        # By document, the best window first.
        order = np.lexsort((-rows["score"], numbers))
        at = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(order) else []
        whole = [found for found in at if len(found) == windows[numbers[found[0]]]]
        contexts = list(dict.fromkeys(documents[numbers[found[0]]].target or "" for found in whole))
        placed = [places for _, places in encode_with_places(names.tokenizer, contexts)]
        places_of = dict(zip(contexts, placed, strict=True))
        return [
            self._prediction(examples, documents[numbers[found[0]]], indices, rows, found, places_of) for found in whole
        ]

    def _prediction(
        self,
        examples: AnswerWindows,
        document: Document,
        indices: np.ndarray,
        rows: Rows,
        found: np.ndarray,
        places_of: dict[str, np.ndarray],
    ) -> Prediction:
        """The prediction for a document whose windows are the rows `found`, the best first."""
        best, context = found[0], document.target or ""
        score, null_score = float(rows["score"][best]), float(rows["null_score"][found].min())
        text, start = "", 0
        if np.isfinite(score):
            window = indices[best]
            shift = int(examples.first[window] - examples.before[window])
            first, last = (int(rows[name][best]) + shift for name in ("first", "last"))
            start, stop = int(places_of[context][first, 0]), int(places_of[context][last, 1])
            text = context[start:stop]
            start += len(text) - len(text.lstrip())
            text = text.strip()
        prediction: Prediction = {"id": document.id, "label": text, "start": start, "scores": {"answer": score}}
        if not np.isfinite(score):
            prediction["scores"]["answer"] = None
        if self.no_answer:
            prediction["scores"]["no_answer"] = null_score
            prediction["span"] = text
            if not text or null_score - score > self.no_answer_margin:
                prediction |= {"label": "", "start": None}
        gold = list(document.label.texts) if isinstance(document.label, Answers) else None
        return with_gold(prediction, gold)

    def scores(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, float]:
        """Exact match and F1 with the closest of the answers, both from 0 to 1."""
        pairs = [(one["label"], one["gold"]) for one in predictions]
        return {
            "exact_match": float(np.mean([exact_match(label, gold) for label, gold in pairs])),
            "f1": float(np.mean([f1(label, gold) for label, gold in pairs])),
        }

    def describe(self, predictions: Sequence[Prediction], labels: Sequence[str], directory: Path) -> list[str]:
        if not self.no_answer:
            return []
        margin, best = best_margin(predictions)
        return [f"with objective.no_answer_margin {margin:.4f} F1 would be {best:.2%} on these questions"]


def normal(text: str) -> str:
    """The text in lower case, without punctuation, articles and superfluous white space."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(predicted: str, gold: Sequence[str]) -> float:
    """Whether the answer is one of `gold`, both normalised; without `gold`, whether it is empty."""
    return float(any(normal(predicted) == normal(answer) for answer in gold or [""]))


def f1(predicted: str, gold: Sequence[str]) -> float:
    """The F1 of the answer's words and those of the closest of `gold`."""
    return max(_f1_of_words(normal(predicted).split(), normal(answer).split()) for answer in gold or [""])


def _f1_of_words(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((collections.Counter(predicted) & collections.Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


def best_margin(predictions: Sequence[Prediction]) -> tuple[float, float]:
    """The best margin of `[CLS]` over the best span above which no answer is predicted, and the F1 with it."""
    margins, gains = [], []
    for one in predictions:
        score = one["scores"]["answer"]
        margins.append(float("inf") if score is None else one["scores"]["no_answer"] - score)
        gains.append(f1(one["span"], one["gold"]) - f1("", one["gold"]))
    order = np.argsort(margins, kind="stable")
    # First with none answered, then one more at a time, the most confident first.
    total = np.cumsum([sum(f1("", one["gold"]) for one in predictions), *np.array(gains)[order]])
    best = int(total.argmax())
    finite = [margin for margin in np.array(margins)[order] if np.isfinite(margin)]
    margin = min(finite, default=0.0) - 1 if best == 0 else float(np.array(margins)[order][best - 1])
    return float(margin), float(total[best] / len(predictions))
