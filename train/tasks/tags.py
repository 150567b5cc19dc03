"""Tags of words: predictions, and the metrics of whole entities, by seqeval. W words of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.align import encode_words
from train.data.records import Document
from train.data.rows import TaskRows
from train.data.tagged import TaggedWords
from train.tasks.report import ClassScores, class_table, draw_classes
from train.tasks.task import Prediction, Rows, Task, with_gold

OUTSIDE = "O"
"""The tag of a word that belongs to no entity."""
_OF_ENTITY = re.compile(r"[BIES]-.+")


class TokenClassification(Task):
    """The tag of each word. Words whose tokens lie beyond the row, or that have none, get no tag: null."""

    @property
    def marks_entities(self) -> bool:
        """Whether the tags are of entities (`B-PER`, `I-PER`, `O`), not of single words (`NOUN`)."""
        return all(name == OUTSIDE or _OF_ENTITY.fullmatch(name) for name in self.labels)

    def predictions(
        self, examples: TaskRows, documents: Sequence[Document], indices: np.ndarray, rows: Rows
    ) -> list[Prediction]:
        assert isinstance(examples, TaggedWords)
        about = [documents[examples.documents[index]] for index in indices]
        placed = encode_words(self.tokenizer, [document.words or () for document in about])
        found = []
        for row, (index, document, (_, firsts_W)) in enumerate(zip(indices, about, placed, strict=True)):
            is_seen_W = (firsts_W >= 0) & (firsts_W < examples.size(index))
            places_W = np.where(is_seen_W, 1 + firsts_W, 0)  # behind [CLS]
            tags = [self.labels[number] for number in rows["classes"][row, places_W]]
            scores = [round(float(part), 6) for part in rows["probabilities"][row, places_W]]
            told: Prediction = {"id": document.id, "words": list(document.words or ())}
            for name, values in (("label", tags), ("scores", scores)):
                told[name] = [value if seen else None for value, seen in zip(values, is_seen_W, strict=True)]
            found.append(with_gold(told, document.label and list(document.label)))
        return found

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Of entities (Tjong Kim Sang & De Meulder 2003), where the tags are of any; else the means over the tags. The accuracy
        is that of single words."""
        gold, told = _both(predictions)
        words = [(one, other) for row in zip(gold, told, strict=True) for one, other in zip(*row, strict=True)]
        accuracy = sum(one == other for one, other in words) / max(1, len(words))
        if self.marks_entities:
            from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

            scored = precision_recall_fscore_support(gold, _without_none(told), average="micro", zero_division=0)
        else:
            from sklearn.metrics import precision_recall_fscore_support

            flat = [[one for one, _ in words], [other or "" for _, other in words]]
            used = sorted(set(flat[0]))
            scored = precision_recall_fscore_support(*flat, labels=used, average="macro", zero_division=0)
        precision, recall, f1 = (float(value) for value in scored[:3])
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}

    def report(self, predictions: Sequence[Prediction], directory: Path) -> list[str]:
        gold, told = _both(predictions)
        lines = []
        if unseen := sum(tag is None for row in told for tag in row):
            lines.append(f"{unseen} held-out words lie beyond their row or have no token: they count as told wrong")
        if self.marks_entities:
            from seqeval.metrics import classification_report

            scored = classification_report(gold, _without_none(told), output_dict=True, zero_division=0)
            names = [name for name in scored if not name.endswith(" avg")]
        else:
            from sklearn.metrics import classification_report

            flat = [[tag for row in gold for tag in row], [tag or "" for row in told for tag in row]]
            names = list(self.labels)
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


def _both(predictions: Sequence[Prediction]) -> tuple[list[list[str]], list[list[str | None]]]:
    return [one["gold"] for one in predictions], [one["label"] for one in predictions]


def _without_none(tags: list[list[str | None]]) -> list[list[str]]:
    return [[tag or OUTSIDE for tag in row] for row in tags]
