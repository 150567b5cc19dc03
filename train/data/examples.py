"""Which examples an objective makes of an array."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from train.data.choices import Choices
from train.data.contrast import TextPairs
from train.data.labelled import LabelledDocuments
from train.data.masked import MaskedChunks, MaskedDocuments, SentencePairs
from train.data.objective_config import LABELLED, ROWS, ObjectiveConfig
from train.data.pack import Examples, Packing, examples
from train.data.pairs import PackedPairs
from train.data.rows import TaskRows
from train.data.spans import Prefix, SpanCorruption, Ul2
from train.data.store import TokenArray
from train.data.tagged import TaggedWords
from train.data.tokenizer import Tokenizer
from train.data.windows import AnswerWindows
from transformer.errors import UserError

_RUNNING_TEXT = ("prefix", "span_corruption", "ul2")


@dataclass(frozen=True)
class ExamplesMaker:
    """Makes the examples of one array after another."""

    tokenizer: Tokenizer
    packing: Packing
    length: int
    objective: ObjectiveConfig

    def __call__(self, array: TokenArray, *, training: bool, shown: bool) -> Examples:
        """Raises `UserError` if the packing does not suit the objective, or if there is less text than one example."""
        kind = self.objective.kind
        if kind == "causal":
            return examples(array, self.packing, self.length, training=training)
        if kind in _RUNNING_TEXT and self.packing != "chunk":
            raise UserError(f"data.packing: got {self.packing!r}; {kind} is for running text: set it to 'chunk'")
        if kind in (*ROWS, *LABELLED) and self.packing != "documents":
            raise UserError(
                f"data.packing: got {self.packing!r}; {kind} takes one document a row: set it to 'documents'"
            )
        made = self._made(array, training=training, shown=shown)
        if training and not len(made):
            raise UserError(
                f"{array.name}: {len(array.tokens) - 1} tokens are fewer than {kind} takes for one sequence; give it more "
                "text or make the sequences shorter"
            )
        return made

    def _made(self, array: TokenArray, *, training: bool, shown: bool) -> Examples:
        kind, common = self.objective.kind, (array, self.tokenizer, self.length, self.objective)
        if kind == "seq2seq":
            return PackedPairs(array, self.length, self.objective, shown=shown)
        if kind == "contrastive":
            return TextPairs(*common, shown=shown)
        if kind in LABELLED:
            return task_rows(*common, shown=shown)
        if kind == "prefix":
            return Prefix(array, self.length, keep_rest=not training)
        if kind == "span_corruption":
            return SpanCorruption(*common)
        if kind == "ul2":
            return Ul2(*common)
        if kind in ("next_sentence", "sentence_order"):
            return SentencePairs(*common)
        if self.packing == "documents":
            return MaskedDocuments(*common)
        return MaskedChunks(*common, keep_rest=not training)


_TASK_ROWS: dict[str, Callable[..., TaskRows]] = {
    "classification": LabelledDocuments,
    "regression": LabelledDocuments,
    "token_classification": TaggedWords,
    "answer": AnswerWindows,
    "choice": Choices,
}


def task_rows(
    array: TokenArray, tokenizer: Tokenizer, length: int, objective: ObjectiveConfig, *, shown: bool = False
) -> TaskRows:
    """The examples of a task of labelled documents; `array` may lack the labels."""
    return _TASK_ROWS[objective.kind](array, tokenizer, length, objective, shown=shown)
