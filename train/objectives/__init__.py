"""Training objectives: one file for each objective, and one line here.

A new objective is a class derived from `Objective`, or from a common base of several (`HiddenTokens`,
`EncoderDecoderObjective`, `Task`), in a file of its own; it is imported here and added to `AnyObjective`. Configs, the loop,
evaluation, plans and messages then support it.
"""

from __future__ import annotations

import typing

from train.objectives.causal import Causal
from train.objectives.chat import Chat
from train.objectives.contrastive import Contrastive
from train.objectives.masked import Masked
from train.objectives.none import NoObjective
from train.objectives.objective import Objective, objectives
from train.objectives.preference import Preference
from train.objectives.prefix import Prefix
from train.objectives.replaced_tokens import ReplacedTokens
from train.objectives.sentences import NextSentence, SentenceOrder
from train.objectives.seq2seq import Seq2Seq
from train.objectives.span_corruption import SpanCorruption
from train.objectives.tasks.answers import Answer
from train.objectives.tasks.choice import Choice
from train.objectives.tasks.classification import Classification
from train.objectives.tasks.multi_label import MultiLabelClassification
from train.objectives.tasks.regression import Regression
from train.objectives.tasks.tags import TokenClassification
from train.objectives.tasks.task import Task
from train.objectives.ul2 import Ul2

AnyObjective = (
    Causal
    | Prefix
    | Masked
    | NextSentence
    | SentenceOrder
    | ReplacedTokens
    | SpanCorruption
    | Ul2
    | Seq2Seq
    | Classification
    | MultiLabelClassification
    | Regression
    | TokenClassification
    | Answer
    | Choice
    | Contrastive
    | Chat
    | Preference
    | NoObjective
)

OBJECTIVES: dict[str, type[Objective]] = {one.kind_name(): one for one in typing.get_args(AnyObjective)}
"""Every objective by its `kind`."""

__all__ = ["OBJECTIVES", "AnyObjective", "Objective", "Task", "objectives"]
__all__ += [one.__name__ for one in OBJECTIVES.values()]
