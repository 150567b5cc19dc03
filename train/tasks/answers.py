"""Answers to questions: from spans in windows to texts, and SQuAD's own metrics of them (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.align import encode_with_places
from train.data.records import Answers, Document
from train.data.rows import TaskRows
from train.data.windows import AnswerWindows
from train.tasks.task import Prediction, Rows, Task, with_gold

_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Answering(Task):
    """The answer to a question, as it stands in the context: the best span of all windows. One of which a window is missing
    has none yet."""

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows
    ) -> list[Prediction]:
        assert isinstance(examples, AnswerWindows)
        numbers = examples.documents[indices]
        windows = np.bincount(examples.documents, minlength=len(documents))
        # By document, the best window first.
        order = np.lexsort((-rows["score"], numbers))
        at = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(order) else []
        whole = [found for found in at if len(found) == windows[numbers[found[0]]]]
        contexts = list(dict.fromkeys(documents[numbers[found[0]]].target or "" for found in whole))
        placed = [places for _, places in encode_with_places(self.tokenizer, contexts)]
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
        """Of a document whose windows are the rows `found`, the best first."""
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
        told: Prediction = {"id": document.id, "label": text, "start": start, "scores": {"answer": score}}
        if not np.isfinite(score):
            told["scores"]["answer"] = None
        if self.objective.no_answer:
            told["scores"]["no_answer"] = null_score
            told["span"] = text
            if not text or null_score - score > self.objective.no_answer_margin:
                told |= {"label": "", "start": None}
        gold = list(document.label.texts) if isinstance(document.label, Answers) else None
        return with_gold(told, gold)

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Exact match and F1 against the nearest of the answers, both from 0 to 1."""
        told = [(one["label"], one["gold"]) for one in predictions]
        return {
            "exact_match": float(np.mean([exact_match(label, gold) for label, gold in told])),
            "f1": float(np.mean([f1(label, gold) for label, gold in told])),
        }

    def report(self, predictions: Sequence[Prediction], directory: Path) -> list[str]:
        if not self.objective.no_answer:
            return []
        margin, best = best_margin(predictions)
        return [f"with objective.no_answer_margin {margin:.4f} F1 would be {best:.2%} on these questions"]


def normal(text: str) -> str:
    """The text in lower case, without punctuation, articles and superfluous white space."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(told: str, gold: Sequence[str]) -> float:
    """Whether the answer is one of `gold`, both normal; without any, whether it is empty."""
    return float(any(normal(told) == normal(answer) for answer in gold or [""]))


def f1(told: str, gold: Sequence[str]) -> float:
    """The F1 of the answer's words and those of the nearest of `gold`."""
    return max(_f1_of_words(normal(told).split(), normal(answer).split()) for answer in gold or [""])


def _f1_of_words(told: list[str], gold: list[str]) -> float:
    if not told or not gold:
        return float(told == gold)
    common = sum((collections.Counter(told) & collections.Counter(gold)).values())
    return 2 * common / (len(told) + len(gold))


def best_margin(predictions: Sequence[Prediction]) -> tuple[float, float]:
    """The margin of `[CLS]` over the best span above which no answer is best given, and the F1 with it."""
    margins, gains = [], []
    for one in predictions:
        score = one["scores"]["answer"]
        margins.append(float("inf") if score is None else one["scores"]["no_answer"] - score)
        gains.append(f1(one["span"], one["gold"]) - f1("", one["gold"]))
    order = np.argsort(margins, kind="stable")
    # With none answered; then one more after the other, from the surest on.
    total = np.cumsum([sum(f1("", one["gold"]) for one in predictions), *np.array(gains)[order]])
    best = int(total.argmax())
    finite = [margin for margin in np.array(margins)[order] if np.isfinite(margin)]
    margin = min(finite, default=0.0) - 1 if best == 0 else float(np.array(margins)[order][best - 1])
    return float(margin), float(total[best] / len(predictions))
