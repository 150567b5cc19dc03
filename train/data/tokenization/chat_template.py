"""Chat templates: from messages to text, as transformers' `apply_chat_template` renders them, and the spans of the assistant.

A template comes with a vocabulary that somebody published: it runs in jinja2's sandbox, without any object of this program in
reach, and with limits of time and size.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor

from train.data.sources.records import Message, Tool
from train.data.tokenization.template_limits import (
    GUARDED,
    MOST_CHARACTERS,
    TooSlow,
    Unusable,
    check_method,
    check_size,
    check_widths,
    guarded,
    of_usual_size,
)
from transformer.errors import first_line

Span = tuple[int, int]
"""A stretch of a text: its first character, and the one after the last."""

FIXED_DATE = datetime.datetime(2024, 7, 26)
"""Today, for templates that write the date into each dialogue, unless another time is given: the same data then have the same
tokens on every day. It is the date that Llama's templates fall back to."""
MOST_SECONDS = 10.0
"""How long the rendering of one dialogue may take."""
_MOST_EXPONENT = 64
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which a message's reasoning is published; templates read the first, and some the second."""


class _Budget:
    """What is left of the time for one rendering."""

    def __init__(self) -> None:
        self._end = time.monotonic() + MOST_SECONDS

    def step(self) -> None:
        """Raise `Unusable` if the time is over."""
        if time.monotonic() > self._end:
            raise TooSlow(f"it takes longer than {MOST_SECONDS:g} seconds")


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}` ... `{% endgeneration %}` around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = jinja2.nodes.CallBlock(self.call_method("mark", [jinja2.nodes.ContextReference()]), [], [], body)
        return block.set_lineno(line)

    def mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        """The block's text, whose place is noted."""
        text = caller()
        tracked: _Tracked | None = context.parent.get(_TRACKED)
        if tracked is not None:
            tracked.add_span(text)
        return text


class _Tracked:
    """The text so far, and the spans of the assistant in it. A template sees nothing of it: it is no public name."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.length = 0
        self.spans: list[Span] = []
        self._said: list[str] = []
        self.budget = _Budget()

    def add_span(self, said: str) -> None:
        """Note that the assistant says this next."""
        self.spans.append((self.length, self.length + len(said)))
        self._said.append(said)

    def text(self) -> str:
        """All of it. Raises `Unusable` if what the assistant says is not where it was noted, or no file could hold it."""
        text = "".join(self.parts)
        for (start, stop), said in zip(self.spans, self._said, strict=True):
            if text[start:stop] != said:
                raise Unusable(
                    "a {% generation %} block is inside of a macro, a filter or a set block, where its place is not known; put "
                    "it at the top level, or in a loop"
                )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unusable("it writes half of a surrogate pair, which is not text") from None
        return text

    def add(self, part: str) -> None:
        """Append a part of the text. Raises `Unusable` if it is too long."""
        self.parts.append(part)
        self.length += len(part)
        if self.length > MOST_CHARACTERS:
            raise Unusable(f"it writes more than {MOST_CHARACTERS:,} characters")


_TRACKED = " tracked"
"""No name in a template has a space."""


class _Joining(jinja2.visitor.NodeTransformer):
    """Makes a call of each operator `~`, which jinja2's sandbox does not intercept."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        joined = jinja2.nodes.EnvironmentAttribute("joined")
        return jinja2.nodes.Call(joined, node.nodes, [], None, None).set_lineno(node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' environment, in which loops look at the clock, and operators and calls make no huge values."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        parsed = super()._parse(source, name, filename)
        looping: list[jinja2.nodes.For | jinja2.nodes.Macro] = [
            *parsed.find_all(jinja2.nodes.For), *parsed.find_all(jinja2.nodes.Macro),
        ]  # fmt: skip
        for node in looping:
            call = jinja2.nodes.Call(
                jinja2.nodes.EnvironmentAttribute("step"), [jinja2.nodes.ContextReference()], [], None, None
            )
            node.body.insert(0, jinja2.nodes.ExprStmt(call).set_lineno(node.lineno))
        _Joining().visit(parsed)
        parsed.set_environment(self)
        return parsed

    def joined(self, *parts: Any) -> str:
        """The operator `~`."""
        found = list(map(str, parts))
        check_size(sum(map(len, found)))
        return "".join(found)

    def step(self, context: jinja2.runtime.Context) -> None:
        """One pass of a loop, or one call of a macro."""
        _look(context)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if (
                    isinstance(one, str | list | tuple)
                    and isinstance(other, int)
                    and len(one) * other > MOST_CHARACTERS
                ):
                    raise Unusable(f"it makes a value of more than {MOST_CHARACTERS:,} parts")
        if operator == "**" and isinstance(right, int | float) and abs(right) > _MOST_EXPONENT:
            raise Unusable(f"it raises a number to a power above {_MOST_EXPONENT}")
        if operator in ("*", "**") and any(isinstance(one, int) and one.bit_length() > 1024 for one in (left, right)):
            raise Unusable("it computes with huge numbers")
        if operator == "%" and isinstance(left, str):
            check_widths(left, right if isinstance(right, tuple) else (right,))
        _look(context)
        made = super().call_binop(context, operator, left, right)
        return of_usual_size(made)

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _look(context)
        # The sandbox wraps a text's own `format`.
        if isinstance(owner := getattr(getattr(function, "__wrapped__", function), "__self__", None), str):
            check_method(owner, function.__name__, args, kwargs)
        return of_usual_size(super().call(context, function, *args, **kwargs))


def _look(context: jinja2.runtime.Context) -> None:
    """Raise `Unusable` if the time is over."""
    tracked = context.parent.get(_TRACKED)
    if tracked is not None:
        tracked.budget.step()


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, in which no name begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class _Dict:
    """`dict` in a template: it is called, and has nothing else."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict.fromkeys(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _clock(now: datetime.datetime) -> Callable[[str], str]:
    """`strftime_now` of a template that is rendered at a time."""

    def strftime_now(form: str) -> str:
        return now.strftime(form)

    return strftime_now


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, which escapes nothing for HTML."""
    check_size((indent or 0) * 1000)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> _Environment:
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    made.filters |= {name: guarded(name, size, most) for name, (size, most) in GUARDED.items()}
    made.filters["tojson"] = _as_json
    made.globals |= {
        "raise_exception": _raise_exception, "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    # Filler text of any length has no use here.
    del made.globals["lipsum"]
    return made


class Template:
    """A compiled template.

    Args:
        text: in Jinja's language.
        names: the special tokens by which a template knows them, such as `eos_token`.
        now: what the template takes for the present.

    Raises:
        Unusable: errors in the template's language.
    """

    def __init__(self, text: str, names: Mapping[str, str], now: datetime.datetime = FIXED_DATE) -> None:
        self.text, self._names = text, {**names, "strftime_now": _clock(now)}
        try:
            self._compiled = _environment().from_string(text)
            parsed = _environment().parse(text)
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise Unusable(f"line {error.lineno}: {first_line(error.message or error)}") from None
        except Exception as error:  # whatever an unknown program may raise
            raise Unusable(f"it cannot be compiled: {first_line(error)}") from None
        self.marks_assistant = any(
            isinstance(one.call.node, jinja2.nodes.ExtensionAttribute)
            for one in parsed.find_all(jinja2.nodes.CallBlock)
        )
        """Whether it has a block `{% generation %}`."""

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, prompts: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of a dialogue, and the spans of its `{% generation %}` blocks.

        Args:
            tools: the functions that the assistant may call, each as a JSON schema.
            prompts: add what comes before an answer of the assistant.

        Raises:
            Unusable: whatever the template raises, or that it takes too long, or writes too much.
        """
        tracked = _Tracked()
        given = {**self._names, "messages": plain(messages), "tools": list(tools) or None, "documents": None}
        try:
            context = self._compiled.new_context(given | {"add_generation_prompt": prompts, _TRACKED: tracked})
            for part in self._compiled.root_render_func(context):
                tracked.budget.step()
                tracked.add(part)
            return tracked.text(), tracked.spans
        except Unusable:
            raise
        except Exception as error:  # whatever an unknown program may raise
            raise Unusable(_reason(error, self._compiled)) from None

    def assistant_spans(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[str, list[Span]]:
        """The text of a dialogue, and the spans in it that the assistant wrote.

        They are those of the template's `{% generation %}` blocks. A template without such a block is rendered for the messages
        before each answer, and for those up to it: what the second text has more is the answer.

        Raises:
            Unusable: as `render`, or a template that writes a dialogue's beginning otherwise than the whole dialogue.
        """
        text, spans = self.render(messages, tools)
        if self.marks_assistant:
            return text, spans
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self.render(messages[:number], tools, prompts=True)
            until, _ = self.render(messages[: number + 1], tools)
            if not (until.startswith(before) and text.startswith(until)):
                raise Unusable(
                    "it has no {% generation %} block, and writes earlier messages differently once later ones follow, so that "
                    f"the answer in message {number + 1} cannot be located; put "
                    + "{% generation %} and {% endgeneration %} around "
                    "what the assistant writes"
                )
            spans.append((len(before), len(until)))
        return text, spans


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as transformers gives them to templates: without null fields, and with reasoning under all of its names."""
    found = []
    for message in messages:
        given = {name: value for name, value in message.items() if value is not None}
        reasoning = next((given[name] for name in _REASONING if name in given), None)
        if reasoning is not None:
            given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
        found.append(given)
    return found


def _reason(error: Exception, template: jinja2.Template) -> str:
    """Why a rendering stopped, and where in the template, if it is not its own message."""
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if type(error) is jinja2.exceptions.TemplateError:
        return first_line(" ".join(str(error).split()) or "it raises an exception without a message")
    lines = list(_lines_of(error, template))
    return first_line(error) + (f" (line {lines[-1]} of the template)" if lines else "")


def _lines_of(error: BaseException, template: jinja2.Template) -> Iterator[int]:
    """The template's lines in a traceback, the innermost last."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            yield template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
