"""Examples of questions and the contexts that answer them: a row is a question and a window over its context.

Axes: B examples asked for at once. Every example holds the arrays of `rows`, of the question and the window, and

    labels            [B, 2] int32    the first and the last token of the answer, as positions in the row; 0, `[CLS]`, if the
                                      window does not hold all of it, or there is none (Devlin et al. 2018, section 4.3)
    weights           [B, 1] float32  1: a row is one prediction
"""

from __future__ import annotations

import numpy as np

from train.data.examples.draws import Draws
from train.data.examples.pack import place_in_group
from train.data.examples.rows import LongTexts, Stretches, TaskRows, one_each, text_sizes
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenizer import Tokenizer


class AnswerWindows(TaskRows):
    """The windows over the contexts of an array, in its order; each begins `stride` tokens after the previous one."""

    def __init__(
        self,
        array: TokenArray,
        tokenizer: Tokenizer,
        length: int,
        *,
        stride: int,
        question_length: int,
        shown: bool = False,
    ) -> None:
        """A question has `question_length` tokens at most, and at most half of a row; `shown` says how many questions are cut."""
        super().__init__(array, tokenizer, length)
        assert array.target is not None
        questions = text_sizes(array)
        room = length - self.frame(2)
        most = min(question_length, room // 2)
        limit = f"questions are longer than {most} tokens: cut"
        self.too_long = LongTexts(int(np.sum(questions > most)), len(questions), limit)
        if shown:
            self.too_long.say(array.name)
        questions = np.minimum(questions, most)
        room, contexts = room - questions, text_sizes(array.target)
        # No token is left out, however long the stride is.
        steps = np.minimum(stride, room)
        count = 1 + np.maximum(0, -(-(contexts - room) // steps))
        self.documents = np.repeat(np.arange(array.documents), count)
        self.first = steps[self.documents] * place_in_group(count)
        """[N] the index in the context of each window's first token."""
        sizes = np.minimum(room[self.documents], contexts[self.documents] - self.first)
        starts = np.asarray(array.target.offsets)[self.documents] + self.first
        self.sides = [
            Stretches.of(array, self.documents, questions[self.documents]),
            Stretches(np.asarray(array.target.tokens), starts, sizes),
        ]
        labels = np.full((array.documents, 2), -1, np.int32) if array.labels is None else np.asarray(array.labels)
        within = labels[self.documents] - self.first[:, None]
        holds = (within[:, :1] >= 0) & (within[:, 1:] < sizes[:, None]) & (labels[self.documents, :1] >= 0)
        self._answers = np.where(holds, within + self.before[:, None], 0).astype(np.int32)

    @property
    def before(self) -> np.ndarray:
        """[N]: how many tokens of the row precede the window."""
        return self.sides[0].sizes + 1 + self.between

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        labels = {"labels": self._answers[indices], "weights": one_each(len(indices))}
        return self.rows(self.sides, indices) | labels
