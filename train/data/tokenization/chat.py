"""Dialogues as tokens: rendered by the vocabulary's chat template, with a mark at each token that the assistant writes.

Axes: N tokens of a dialogue.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from train.data.sources.records import Message, Tool
from train.data.tokenization.align import encode_with_places
from train.data.tokenization.conventions import ROLES
from train.data.tokenization.template_limits import Unusable
from train.data.tokenization.tokenizer import END_OF_TEXT, SubwordTokenizer, Tokenizer
from transformer.errors import UserError

if TYPE_CHECKING:
    from train.data.tokenization.chat_template import Span

BUILT_IN = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('role ' ~ message.role ~ ' is none of system, user, assistant, tool') }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a vocabulary that was published without a template: ChatML, in which each turn ends with the vocabulary's end of text."""
_DEFAULT = "default"
_PROBE = "qzkvjw"


class Chat:
    """A vocabulary with its chat template.

    Args:
        now: what a template that writes the date takes for the present; None: a fixed date, so that the same dialogues have the
            same tokens on every day.

    Raises:
        UserError: templates of which none is the usual one, or errors in the template's language.
    """

    def __init__(self, tokenizer: Tokenizer, now: datetime.datetime | None = None) -> None:
        # Only dialogues need a template's language.
        from train.data.tokenization.chat_template import FIXED_DATE, Template

        self.tokenizer = tokenizer
        text = template_of(tokenizer)
        self.is_built_in = text == BUILT_IN
        """Whether the template is none that was published with the vocabulary."""
        try:
            self._template = Template(text, _names(tokenizer), now or FIXED_DATE)
        except Unusable as error:
            raise UserError(f"the vocabulary's chat template: {error}") from None

    def tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The ids [N] of a dialogue, and which of them [N] bool the assistant writes.

        No special tokens are added to those that the template writes. A token is the assistant's if any of its characters is.

        Raises:
            Unusable: the template cannot render it.
        """
        return self._marked(*self._template.assistant_spans(messages, tools))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The ids of a dialogue that the assistant is about to answer. Raises `Unusable`."""
        text, _ = self._template.render(messages, tools, prompts=True)
        return self._marked(text, [])[0].tolist()

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer: those that end a text, and the special token that the template puts after an answer."""
        question = {"role": "user", "content": _PROBE}
        try:
            text, spans = self._template.assistant_spans([question, {"role": "assistant", "content": _PROBE}])
        except Unusable:
            return self.tokenizer.ends
        # Special tokens before the content, such as those around a reasoning, do not end it.
        content = text.rfind(_PROBE, *spans[-1]) if spans else -1
        if content < 0:
            return self.tokenizer.ends
        ids, marks = self._marked(text, [(content + len(_PROBE), spans[-1][1])])
        special = set(self.tokenizer.special_ids.values())
        after = [id for id in ids[marks].tolist() if id in special][:1]
        return tuple(dict.fromkeys([*self.tokenizer.ends, *after]))

    def _marked(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        ((ids, places),) = encode_with_places(self.tokenizer, [text], special=True)
        marks = np.zeros(len(ids), bool)
        for start, stop in spans:
            marks |= (places[:, 0] < stop) & (places[:, 1] > start)
        return ids, marks


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template of a vocabulary: its own, or the built-in one.

    Raises:
        UserError: it has several, of which none is the usual one.
    """
    own = tokenizer.conventions.chat_templates
    if own and _DEFAULT not in own:
        raise UserError(
            f"the vocabulary has the chat templates {', '.join(sorted(own))}, and none of them is named {_DEFAULT}; rename one "
            "of them in the checkpoint's files, and import it again"
        )
    return own.get(_DEFAULT, BUILT_IN)


def for_dialogues(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of a model that learns dialogues, as it is stored and exported: with its template, which may be the built-in
    one, and with every token that ends an answer. Raises `UserError` as `Chat`."""
    if not isinstance(tokenizer, SubwordTokenizer):
        return tokenizer
    chat = Chat(tokenizer)
    templates = tokenizer.conventions.chat_templates or {_DEFAULT: BUILT_IN}
    kept = dataclasses.replace(tokenizer.conventions, chat_templates=templates, ends=chat.ends)
    return SubwordTokenizer(tokenizer.model, tokenizer.end_token, kept)


def with_template(tokenizer: SubwordTokenizer, template: str) -> SubwordTokenizer:
    """The tokenizer with another template for every dialogue."""
    templates = {**tokenizer.conventions.chat_templates, _DEFAULT: template}
    kept = dataclasses.replace(tokenizer.conventions, chat_templates=templates)
    return SubwordTokenizer(tokenizer.model, tokenizer.end_token, kept)


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens by the names that templates use."""
    if not isinstance(tokenizer, SubwordTokenizer):
        return {"eos_token": END_OF_TEXT}
    names = {role: name for role, name in tokenizer.conventions.fields.items() if role in ROLES}
    if not names and tokenizer.begin:
        names = {"bos_token": str(tokenizer.model.id_to_token(tokenizer.begin[0]))}
    return {"eos_token": tokenizer.end_token} | names
