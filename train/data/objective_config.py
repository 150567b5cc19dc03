"""What a model is asked to predict, as far as the data decides it: the config, and the special tokens that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from train.data.records import LabelKind
from train.data.tokenizer import CLS, MASK, SEP, Tokenizer, sentinel
from transformer.errors import require

Kind = Literal[
    "causal", "masked", "span_corruption", "prefix", "ul2", "next_sentence", "sentence_order",
    "replaced_tokens", "seq2seq", "classification", "regression", "token_classification", "answer", "choice", "contrastive",
    "none",
]  # fmt: skip

ENCODER_DECODER: tuple[Kind, ...] = ("span_corruption", "ul2", "seq2seq")
"""The kinds whose batches have a source beside the tokens that are predicted."""
MASKED: tuple[Kind, ...] = ("masked", "next_sentence", "sentence_order", "replaced_tokens")
"""The kinds that hide tokens."""
PAIRED: tuple[Kind, ...] = ("seq2seq", "contrastive")
"""The kinds that are for pairs of texts."""
LABELLED: dict[Kind, LabelKind] = {
    "classification": "class", "regression": "number", "token_classification": "tags", "answer": "answers",
    "choice": "class",
}  # fmt: skip
"""The kinds that are for documents with labels, and what these are: the tasks that an encoder is fine-tuned on."""
ROWS: tuple[Kind, ...] = ("classification", "regression", "answer", "choice", "contrastive")
"""The kinds that predict one thing of each row."""
MODES = ("[R]", "[S]", "[X]")
"""UL2's names of its three kinds of denoising."""
_LONG_WORD = 8  # tokens: a run of words may pass the mask rate by so many for each


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is predicted from what. A setting that names kinds is for those alone."""

    kind: Kind = "causal"
    """`causal`: each next token (GPT); `masked`: tokens that were masked (BERT, RoBERTa); `next_sentence`: masked, and
    whether one stretch of text follows the other (BERT); `sentence_order`: masked, and whether two stretches are in order
    (ALBERT); `replaced_tokens`: masked, and which tokens a small model put in their places (ELECTRA); `prefix`: the rest
    after a part that is seen at once (prefix LM); `span_corruption`: spans that were cut out (T5); `ul2`: a mixture of
    denoisers (UL2); `seq2seq`: the other side of pairs; `classification`: the class of a document, or of a pair;
    `regression`: its number; `token_classification`: the tag of each word; `answer`: where in a context a question's answer
    stands; `choice`: which of several texts goes on behind another; `contrastive`: which text of the batch is the other side of
    a pair, by the likeness of their embeddings (SimCSE); `none`: nothing, of weights that were imported, to use or to begin
    from."""
    mask_rate: float = 0.15
    """Kinds that mask: the part of the tokens that is predicted."""
    mask_share: float = 0.8
    """Kinds that mask: the part of those that `[MASK]` stands for."""
    random_share: float = 0.1
    """Kinds that mask: the part of those that a random token stands for; the rest is left."""
    whole_word: bool = False
    """Kinds that mask: predict all tokens of a word, or none."""
    ngram: int = 1
    """Kinds that mask: the most tokens (or words) in a row that are predicted together; the lengths are geometric with
    p = 0.2, as in SpanBERT, where this is 10."""
    noise_density: float = 0.15
    """span_corruption: the part of the tokens that is cut out."""
    mean_span: float = 3.0
    """span_corruption: the mean length of a span, in tokens."""
    denoiser_weights: tuple[float, float, float] = (2.0, 1.0, 4.0)
    """ul2: how often short spans (R), a continuation (S), and long or many spans (X) are drawn, relative to each other."""
    mode_tokens: bool = False
    """ul2: begin the source with `[R]`, `[S]` or `[X]`, which must be among the special tokens."""
    source_length: int | None = None
    """span_corruption, ul2, seq2seq: tokens in a row of the source; null: as many as in a row that is predicted."""
    target_length: int | None = None
    """seq2seq: the longest target, in tokens with its end of text; null: as long as a row."""
    too_long: Literal["drop", "truncate"] = "drop"
    """seq2seq, contrastive, and the tasks of labelled documents but answer: what happens to a pair with a side, or a document,
    that is longer than a row: it is left out, or its end is. Both are counted and said."""
    stride: int = 128
    """answer: from one window over a long context to the next, in tokens."""
    question_length: int = 64
    """answer: the longest question, in tokens, and at most half of a row; a longer one is cut."""
    answer_length: int = 30
    """answer: the longest answer that is given, in tokens."""
    no_answer: bool = False
    """answer: some questions have none (SQuAD 2.0): it is given where `[CLS]` scores more than the best answer, by
    no_answer_margin."""
    no_answer_margin: float = 0.0
    """answer: by how much; what is best on the held-out questions is told at the end of a run."""
    num_choices: int = 4
    """choice: how many there are."""
    max_shapes: int = 6
    """seq2seq with packing `pad`: the most shapes that batches come in. More waste less; each is a program to compile."""

    def __post_init__(self) -> None:
        require(self, "mask_rate", 0 < self.mask_rate < 1, "above 0 and below 1")
        require(self, "mask_share", 0 <= self.mask_share <= 1, "0 to 1")
        holds = self.random_share >= 0 and self.mask_share + self.random_share <= 1 + 1e-9
        require(self, "random_share", holds, "0 or more, and with mask_share at most 1")
        require(self, "ngram", self.ngram >= 1, "1 or more")
        require(self, "noise_density", 0 < self.noise_density <= 0.5, "above 0, at most 0.5")
        require(self, "mean_span", self.mean_span >= 1, "1 or more")
        for field in ("max_shapes", "stride", "question_length", "answer_length"):
            require(self, field, getattr(self, field) >= 1, "1 or more")
        require(self, "num_choices", self.num_choices >= 2, "2 or more")
        weights = self.denoiser_weights
        require(self, "denoiser_weights", min(weights) >= 0 and sum(weights) > 0, "three numbers, 0 or more, not all 0")
        for field in ("source_length", "target_length"):
            length = getattr(self, field)
            require(self, field, length is None or length >= 2, "2 or more, or null")

    @property
    def has_source(self) -> bool:
        """Whether batches have a source for an encoder."""
        return self.kind in ENCODER_DECODER

    @property
    def hides(self) -> bool:
        """Whether tokens are hidden, and those alone predicted."""
        return self.kind in MASKED and self.kind != "replaced_tokens"

    @property
    def rows_per_example(self) -> int:
        """How many rows the model reads for each example of a batch."""
        return {"contrastive": 2, "choice": self.num_choices}.get(self.kind, 1)

    def most_predicted(self, length: int) -> int:
        """Of kinds that mask: the most tokens of a row of `length` that are predicted."""
        single = self.ngram == 1 and not self.whole_word
        return min(length, math.ceil(self.mask_rate * length) + (0 if single else _LONG_WORD * self.ngram))

    def most_question(self, room: int) -> int:
        """`question_length` as far as a row with `room` for so many tokens of texts has it for as much of a context."""
        return min(self.question_length, room // 2)

    def source_width(self, length: int) -> int:
        """`source_length` with its default filled in."""
        return length if self.source_length is None else self.source_length

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens that this objective takes, sentinels aside."""
        if self.kind in MASKED:
            return (MASK, CLS, SEP)
        if self.kind in (*ROWS, *LABELLED):
            return (CLS, SEP)
        return MODES if self.kind == "ul2" and self.mode_tokens else ()


def sentinels(tokenizer: Tokenizer) -> list[int]:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, ... up to the first that the vocabulary lacks."""
    found: list[int] = []
    while (id := tokenizer.special(sentinel(len(found)))) is not None:
        found.append(id)
    return found


def largest_inserted(tokenizer: Tokenizer, objective: ObjectiveConfig) -> int:
    """The largest token id that an objective may put into sequences; 0 for one that puts in none."""
    ids = [tokenizer.special(name) or 0 for name in objective.special_tokens]
    if objective.kind in ("span_corruption", "ul2"):
        ids += sentinels(tokenizer)
    return max(ids, default=0)
