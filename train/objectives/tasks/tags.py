"""Token classification: predicting the tag of each word (Devlin et al. 2018, section 5.3); entity metrics by seqeval.

Axes: B rows, T positions, C tags, W words of a text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np

from train.data.examples.rows import TaskRows, TooLong
from train.data.examples.tagged import TaggedWords, tokens_per_word
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.sources.records import Document
from train.data.tokenization.align import encode_words
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import DEFAULT_LOSS, Batch, LossConfig, LossSums, of_classes, with_added_loss
from train.objectives.objective import BatchShapes, Outputs, row_shapes, weight_shape
from train.objectives.tasks.classes import WeightedClasses
from train.objectives.tasks.report import ClassScores, class_table, draw_classes
from train.objectives.tasks.task import Labelling, Prediction, Rows, forward, with_gold
from transformer.types import Keys

OUTSIDE = "O"
"""The tag of a word outside any entity."""
_OF_ENTITY = re.compile(r"[BIES]-.+")


@dataclass(frozen=True, kw_only=True)
class TokenClassification(WeightedClasses):
    """Predicts the tag of each word, at its first token."""

    kind: Literal["token_classification"] = "token_classification"
    too_long: TooLong = "drop"
    """What happens to a text longer than a row: it is left out, or its last words are. The number of such texts is reported."""

    heads = ("tokens",)
    takes_pairs = False
    label_kind = "tags"
    metrics = ("accuracy", "precision", "recall", "f1")
    unit = "word"
    document_fields = (("label_field", "tags"), ("label_kind", "tags"))

    def for_any_document(self) -> Self:
        return dataclasses.replace(self, too_long="truncate")

    def rows(self, array: TokenArray, tokenizer: Tokenizer, length: int, *, shown: bool = False) -> TaskRows:
        return TaggedWords(array, tokenizer, length, self.too_long, shown=shown)

    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        return super().batch(rows, length, data) | row_shapes(rows, length, ("targets",)) | weight_shape(rows, length)

    def outputs(
        self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None
    ) -> tuple[LossSums, Outputs]:
        """The cross-entropy at each word, weighted by tag; and the likeliest of the `classes` [B, T] and its
        `probabilities` [B, T]."""
        return self._outputs(model, batch, config, self.weights, key)

    def evaluate(self, model: Any, batch: Batch, config: LossConfig = DEFAULT_LOSS) -> tuple[LossSums, Outputs]:
        return self._outputs(model, batch, config.plain(), None, None)

    def _outputs(
        self, model: Any, batch: Batch, config: LossConfig, weights: Sequence[float] | None, key: Keys | None
    ) -> tuple[LossSums, Outputs]:
        output = forward(model, batch, key)
        with jax.named_scope("loss"):
            sums = of_classes(output.logits, batch["targets"], batch["weights"], config, weights)
        likely_BTC = jax.nn.softmax(output.logits)
        return with_added_loss(sums, output), {"classes": likely_BTC.argmax(-1), "probabilities": likely_BTC.max(-1)}

    def tokens_per_prediction(self, prepared: Prepared, tokens_per_example: int) -> float:
        return float(np.mean([tokens_per_word(array) for array in prepared.train]))

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows, names: Labelling
    ) -> list[Prediction]:
        """Words whose tokens are beyond the end of the row, or that have none, get no tag: null."""
        assert isinstance(examples, TaggedWords)
        about = [documents[examples.documents[index]] for index in indices]
        placed = encode_words(names.tokenizer, [document.words or () for document in about])
        found = []
        for row, (index, document, (_, firsts_W)) in enumerate(zip(indices, about, placed, strict=True)):
            is_seen_W = (firsts_W >= 0) & (firsts_W < examples.size(index))
            places_W = np.where(is_seen_W, 1 + firsts_W, 0)  # after [CLS]
            tags = [names.labels[number] for number in rows["classes"][row, places_W]]
            scores = [round(float(part), 6) for part in rows["probabilities"][row, places_W]]
            prediction: Prediction = {"id": document.id, "words": list(document.words or ())}
            for name, values in (("label", tags), ("scores", scores)):
                prediction[name] = [value if seen else None for value, seen in zip(values, is_seen_W, strict=True)]
            found.append(with_gold(prediction, document.label and list(document.label)))
        return found

    def scores(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, float]:
        """Scores of entities (Tjong Kim Sang & De Meulder 2003) if the tags mark entities; else means over the tags. The accuracy
        is that of single words."""
        gold, predicted = _both(predictions)
        words = [(one, other) for row in zip(gold, predicted, strict=True) for one, other in zip(*row, strict=True)]
        accuracy = sum(one == other for one, other in words) / max(1, len(words))
        if marks_entities(labels):
            from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

            scored = precision_recall_fscore_support(gold, _without_none(predicted), average="micro", zero_division=0)
        else:
            from sklearn.metrics import precision_recall_fscore_support

            flat = [[one for one, _ in words], [other or "" for _, other in words]]
            used = sorted(set(flat[0]))
            scored = precision_recall_fscore_support(*flat, labels=used, average="macro", zero_division=0)
        precision, recall, f1 = (float(value) for value in scored[:3])
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}

    def describe(self, predictions: Sequence[Prediction], labels: Sequence[str], directory: Path) -> list[str]:
        gold, predicted = _both(predictions)
        lines = []
        if unseen := sum(tag is None for row in predicted for tag in row):
            lines.append(
                f"{unseen} held-out words are beyond the end of their row or have no token: they count as errors"
            )
        if marks_entities(labels):
            from seqeval.metrics import classification_report

            scored = classification_report(gold, _without_none(predicted), output_dict=True, zero_division=0)
            names = [name for name in scored if not name.endswith(" avg")]
        else:
            from sklearn.metrics import classification_report

            flat = [[tag for row in gold for tag in row], [tag or "" for row in predicted for tag in row]]
            names = list(labels)
            scored = classification_report(*flat, labels=names, output_dict=True, zero_division=0)
        classes = [
            ClassScores(
                name, float(one["precision"]), float(one["recall"]), float(one["f1-score"]), int(one["support"])
            )
            for name, one in ((name, scored[name]) for name in names)
        ]
        if classes:
            draw_classes(classes, directory / "classes.png")
            lines += [class_table(classes), f"picture: {directory / 'classes.png'}"]
        return lines


def marks_entities(labels: Sequence[str]) -> bool:
    """Whether the tags mark entities (`B-PER`, `I-PER`, `O`), not single words (`NOUN`)."""
    return all(name == OUTSIDE or _OF_ENTITY.fullmatch(name) for name in labels)


def _both(predictions: Sequence[Prediction]) -> tuple[list[list[str]], list[list[str | None]]]:
    return [one["gold"] for one in predictions], [one["label"] for one in predictions]


def _without_none(tags: list[list[str | None]]) -> list[list[str]]:
    return [[tag or OUTSIDE for tag in row] for row in tags]
