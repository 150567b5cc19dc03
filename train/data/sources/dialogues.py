"""From a record to a dialogue, or to a prompt with a preferred and a rejected answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from train.data.sources.records import (
    Document,
    Faulty,
    LabelKind,
    Message,
    Records,
    Tool,
    kind_of,
    missing_field,
    named,
    valid_text,
    value_at,
)
from transformer.errors import UserError, first_line, nearest, shown

Holds = Literal["texts", "dialogues", "preferences"]
MARKS: dict[Holds, LabelKind] = {"dialogues": "turns", "preferences": "preferences"}
"""What is stored of dialogues and of preferences in addition to their tokens."""

ASSISTANT, USER = "assistant", "user"
ROLES = (ASSISTANT, "developer", "function", "ipython", "observation", "system", "tool", USER)
"""The roles of messages; a template may take fewer."""
_OTHER_TOOLS = "if it is something else, set tools_field to another field, or to ''"
_CALLS = "tool_calls"
"""What the assistant calls, in a message that may have no content."""


class DialogueFields(NamedTuple):
    """The fields of a record that make up a dialogue; a dotted path reaches inside."""

    messages: str
    prompt: str
    completion: str
    chosen: str
    rejected: str
    tools: str
    """A record may lack it."""


@dataclass(frozen=True, kw_only=True)
class DialogueRecords(Records):
    """How to turn records into dialogues: messages, or a prompt and its completion, each a text or messages."""

    holds: Holds
    dialogue: DialogueFields

    def of_arrow(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: _without_nulls(value) for name, value in row.items()}

    def columns(self, known: list[str], place: str) -> list[str]:
        roots = {field: field if field in known else field.partition(".")[0] for field in self.dialogue}
        found = [roots[field] for field in self._wanted(dict.fromkeys(known), roots)]
        if not found:
            raise UserError(f"{place}: {self._neither(known)}")
        if (tools := roots[self.dialogue.tools]) and tools in known:
            found.append(tools)
        if group := self.fields.group:
            found.append(group if group in known else group.partition(".")[0])
        return list(dict.fromkeys(found))

    def _document(self, row: Mapping[str, Any], id: str) -> Document | None:
        group: Any = ""
        if self.fields.group:
            try:
                group = value_at(row, self.fields.group)
            except KeyError:
                raise Faulty(missing_field("group_field", self.fields.group, list(row))) from None
        if group is None:
            raise Faulty(f"field {self.fields.group!r} is empty")
        group = str(group).encode("utf-8", "replace").decode()
        fields = self.dialogue
        tools = _tools(value_at(row, fields.tools), fields.tools) if fields.tools and _has(row, fields.tools) else ()
        if self.holds == "preferences":
            prompt, chosen, rejected = self._values(row, (fields.prompt, fields.chosen, fields.rejected))
            asked = _messages(prompt, fields.prompt, USER)
            answers = tuple(
                _answer(value, field, asked) for value, field in ((chosen, fields.chosen), (rejected, fields.rejected))
            )
            if answers[0] == answers[1]:
                raise Faulty(f"fields {fields.chosen!r} and {fields.rejected!r} hold the same answer")
            text = _contents([*asked, *answers[0], *answers[1]])
            return Document(id, text, group=group, messages=asked, answers=answers, tools=tools)
        if _has(row, fields.messages):
            messages = _messages(value_at(row, fields.messages), fields.messages, "")
        else:
            prompt, completion = self._values(row, (fields.prompt, fields.completion))
            asked = _messages(prompt, fields.prompt, USER)
            messages = (*asked, *_answer(completion, fields.completion, asked))
        if not any(message["role"] == ASSISTANT and _says_something(message) for message in messages):
            raise Faulty(
                f"a dialogue of {len(messages)} messages, none of which the {ASSISTANT} wrote: nothing to learn from"
            )
        return Document(id, _contents(messages), group=group, messages=messages, tools=tools)

    def _wanted(self, row: Mapping[str, Any], roots: Mapping[str, str]) -> list[str]:
        fields = self.dialogue
        shapes = [(fields.messages,), (fields.prompt, fields.completion)]
        if self.holds == "preferences":
            shapes = [(fields.prompt, fields.chosen, fields.rejected)]
        return [field for shape in shapes if all(roots[field] in row for field in shape) for field in shape]

    def _values(self, row: Mapping[str, Any], fields: Sequence[str]) -> list[Any]:
        if not all(_has(row, field) for field in fields):
            raise Faulty(self._neither(list(row)))
        return [value_at(row, field) for field in fields]

    def _neither(self, known: list[str]) -> str:
        """What is said of a record that has neither shape."""
        fields = self.dialogue
        there = ", ".join(map(named, map(str, known[:20]))) or "none"
        if self.holds == "preferences":
            return (
                f"a preference has the fields {fields.prompt!r}, {fields.chosen!r} and {fields.rejected!r} (there is {there}); "
                "set prompt_field, chosen_field and rejected_field"
            )
        return (
            f"a dialogue has the field {fields.messages!r}, or {fields.prompt!r} and {fields.completion!r} (there is {there}); "
            "set messages_field, or prompt_field and completion_field"
        )


def last_answer(document: Document) -> tuple[list[Message], str] | None:
    """The messages before the last answer in words of a dialogue, or of its preferred end, and the answer; None without one."""
    messages = [*document.messages, *(document.answers[0] if document.answers else ())]
    answers = (number for number, one in enumerate(messages) if one["role"] == ASSISTANT and one["content"].strip())
    place = max(answers, default=0)
    return (messages[:place], messages[place]["content"]) if place else None


def _has(row: Mapping[str, Any], field: str) -> bool:
    """Whether a record has a field with a value: tables have a field for every shape of their rows."""
    try:
        return value_at(row, field) is not None
    except KeyError:
        return False


def _answer(value: Any, field: str, asked: Sequence[Message]) -> tuple[Message, ...]:
    """The messages after those of a prompt: a whole dialogue that begins with the prompt counts too."""
    messages = _messages(value, field, ASSISTANT)
    if len(messages) > len(asked) and tuple(messages[: len(asked)]) == tuple(asked):
        messages = messages[len(asked) :]
    if messages[0]["role"] != ASSISTANT or not _says_something(messages[-1]):
        raise Faulty(f"field {field!r} holds no answer of the {ASSISTANT}: {shown(value)}")
    return messages


def _messages(value: Any, field: str, role: str) -> tuple[Message, ...]:
    """A list of messages, or a text, which is one message of `role` where that is given."""
    if isinstance(value, str) and role:
        return ({"role": role, "content": valid_text(value, field)},)
    if not isinstance(value, list | tuple) or not value:
        what = "an empty list" if isinstance(value, list | tuple) else kind_of(value)
        raise Faulty(f"field {field!r} holds {what}, not {'a text or ' if role else ''}a list of messages")
    return tuple(_message(one, f"{field}[{number}]") for number, one in enumerate(value))


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise Faulty(f"{place} is {kind_of(value)}, not a message with role and content")
    message = {str(name): one for name, one in value.items() if one is not None}
    role, content = message.get("role"), message.get("content")
    if _CALLS in message:
        message[_CALLS] = _calls(message[_CALLS], f"{place}.{_CALLS}")
        content = "" if content is None else content
    if isinstance(content, list | tuple):
        content = _joined(content, place)
    message["content"] = content
    if role not in ROLES:
        given = "has no role" if role is None else f"has role {shown(role)}"
        near = nearest(role, ROLES) if isinstance(role, str) else ""
        raise Faulty(f"{place} {given}; allowed: {', '.join(ROLES)}{near and f'.{near}'}")
    if not isinstance(content, str):
        given = "has no content" if content is None else f"has content of type {kind_of(content)}"
        raise Faulty(f"{place} {given}; allowed: a text")
    valid_text(content, f"{place}.content")
    _check_json(message, place, "texts, numbers, lists and mappings")
    return message


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get(_CALLS))


def _without_nulls(value: Any) -> Any:
    """A value without the fields that are null: Arrow gives each mapping of a column the fields of all others."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list | tuple) else value


def _joined(parts: Sequence[Any], place: str) -> str:
    """The text of a content in parts."""
    for number, part in enumerate(parts):
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise Faulty(f"{place}.content[{number}] is {shown(part)}; allowed: parts with type 'text' and a text")
    return "".join(part["text"] for part in parts)


def _calls(value: Any, place: str) -> list[Any]:
    """The calls of functions in a message. Arguments that are JSON in a text, as services return them, become their value, which
    is what templates write as JSON."""
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        raise Faulty(
            f"{place} holds {shown(value)}; allowed: a list of calls, each with a function, its name and arguments"
        )
    found = []
    for one in value:
        function = one.get("function")
        if isinstance(function, Mapping):
            found.append({**one, "function": _with_arguments(function)})
        else:
            found.append(_with_arguments(one))
    return found


def _with_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            value = None
        arguments = value if isinstance(value, dict) else arguments
    return dict(function) if arguments is None else {**function, "arguments": arguments}


def _tools(value: Any, field: str) -> tuple[Tool, ...]:
    """A list of JSON schemas, or JSON of one in a text."""
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise Faulty(
                f"field {field!r} holds no JSON ({first_line(error)}): {shown(given)}; {_OTHER_TOOLS}"
            ) from None
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        allowed = "allowed: a list of functions, each as a JSON schema"
        raise Faulty(f"field {field!r} holds {shown(given)}; {allowed}; {_OTHER_TOOLS}")
    _check_json(list(value), f"field {field!r}", "a list of JSON schemas")
    return tuple(map(dict, value))


def _check_json(value: Any, place: str, allowed: str) -> None:
    """Raise `Faulty` for a value that cannot be written as JSON."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise Faulty(f"{place} holds a value that JSON has not; allowed: {allowed}") from None


def _contents(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)
