"""Dialogues: what a record may be, how a chat template writes it, and which of its tokens are learned."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re

import numpy as np
import pytest
import yaml

from tests.huggingface.vocabularies import tokenizer
from train.commands.cli import main
from train.data.examples.dialogues import Dialogues
from train.data.prepared.config import DataConfig
from train.data.prepared.prepare import prepare
from train.data.sources.records import Document
from train.data.sources.source import documents
from train.data.sources.source_config import FilesSource
from train.data.tokenization import chat_template
from train.data.tokenization.chat import BUILT_IN, Chat
from train.data.tokenization.chat_template import Template, Unusable
from train.data.tokenization.conventions import Conventions
from train.data.tokenization.tokenizer import ByteTokenizer, SubwordTokenizer, TokenizerConfig
from train.objectives import Causal
from train.objectives import Chat as ChatObjective
from transformer.errors import ConfigError, UserError

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
LONG = [
    {"role": "system", "content": "Be brief."},
    *HI,
    {"role": "user", "content": "más?"},
    {"role": "assistant", "content": "nö ü"},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
MARKED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As the templates of published models are written: line ends that blocks swallow, loops, namespaces, filters, errors.
PUBLISHED = {
    "llama": (
        "{{- bos_token }}\n{%- if strftime_now is defined %}\n    {%- set year = strftime_now('%Y') %}\n{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
        "{{- '<|start|>system\n\n' + year + system + '<|eot|>' }}\n{%- for message in messages %}\n"
        "    {{- '<|start|>' + message['role'] + '\n\n' }}\n    {%- generation %}\n"
        "    {{- message['content'] | trim + '<|eot|>' }}\n    {%- endgeneration %}\n{%- endfor %}\n"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% else %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}\n"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}\n"
        "    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\n"
        "{{ '<start>' + role + '\n' }}{% if role == 'model' %}{% generation %}{{ message['content'] | trim }}{% endgeneration %}"
        "{% else %}{{ message['content'] | trim }}{% endif %}\n{{ '<end>\n' }}{% endfor %}"
    ),
    "qwen": (
        "{%- set ns = namespace(last=messages|length - 1, found=false) %}\n{%- for message in messages[::-1] %}\n"
        "    {%- if ns.found %}{% continue %}{% endif %}\n    {%- if message.role == 'user' %}\n"
        "        {%- set ns.found = true %}\n"
        "        {%- set ns.last = messages|length - 1 - loop.index0 %}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- macro turn(message, place) %}{{ '<|im_start|>' ~ message.role ~ place }}\n{% endmacro %}\n"
        "{%- for message in messages %}\n    {{- turn(message, ns.last if loop.last else '') }}\n"
        "    {%- if message.role == 'assistant' %}{% generation %}{{ message | tojson }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}\n    {{- '<|im_end|>\n' }}\n{%- endfor %}"
    ),
}  # fmt: skip


def vocabulary(template="", kind="byte_level"):
    kept = Conventions(fields=NAMES, chat_templates={"default": template} if template else {})
    return SubwordTokenizer(tokenizer(kind), "</s>", kept)


def said(chat, messages):
    ids, marks = chat.tokens(messages)
    return chat.tokenizer.decode(ids[marks])


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe", "sentencepiece_unigram"])
@pytest.mark.parametrize("template", [*PUBLISHED.values(), MARKED, BUILT_IN], ids=[*PUBLISHED, "short", "built-in"])
def test_ids_and_marks_are_those_of_transformers(kind, template):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer(kind), **NAMES, chat_template=template)
    chat = Chat(vocabulary(template, kind), datetime.datetime.now())
    for messages in (HI, LONG, [HI[0], {"role": "assistant", "content": "it ends: </s> <|eot|>", "extra": None}]):
        wanted = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        ids, marks = chat.tokens(messages)
        assert ids.tolist() == wanted["input_ids"]
        assert marks.astype(int).tolist() == wanted["assistant_masks"]
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
        assert chat.prompt(messages[:-1]) == prompt["input_ids"]


def test_a_template_without_generation_blocks_is_marked_by_its_beginnings():
    marked, unmarked = Chat(vocabulary(MARKED)), Chat(vocabulary(UNMARKED))
    for messages in (HI, LONG):
        for one, other in zip(marked.tokens(messages), unmarked.tokens(messages), strict=True):
            np.testing.assert_array_equal(one, other)
    # As templates that leave out the reasoning of earlier turns.
    forgets = Chat(
        vocabulary(UNMARKED.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '' }}"))
    )
    assert said(forgets, HI) == "yo"
    with pytest.raises(Unusable, match=r"the answer in message 3 cannot be located; put {% generation %}"):
        forgets.tokens(LONG)


def test_the_built_in_template_and_the_ends_of_an_answer():
    for one in (vocabulary(), ByteTokenizer()):
        chat = Chat(one)
        assert chat.is_built_in and said(chat, LONG) == "yonö ü" and chat.ends == one.ends
        assert one.decode(chat.prompt(HI[:1])).endswith("<|im_start|>user\nhi\n<|im_start|>assistant\n")
        ids, marks = chat.tokens(HI)
        assert ids[marks][-1] == one.end_of_text
        with pytest.raises(Unusable, match="role judge is none of system, user, assistant, tool"):
            chat.prompt([{"role": "judge", "content": "no"}])
    # What ends an answer ends it when it is generated too, also where the model's config does not say it.
    assert Template("{% macro f(function) %}{{ function }}{% endmacro %}{{ f(function='x') }}", {}).render(HI)[0] == "x"
    other = MARKED.replace("{{ m.content }}</s>{% endgen", "<s>{{ m.content }}<|eot|>{% endgen")
    assert Chat(vocabulary(other)).ends == (2, 3)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages }", r"line 1: unexpected '}'"),
        ("a\n{% oops %}", r"line 2: .*unknown tag 'oops'"),
        ("{{ raise_exception('no\nsystem') }}", "^no system$"),
        ("\n{{ messages[0].name.first }}", r"has no attribute 'name' \(line 2 of the template\)"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.2 seconds"),
        ("{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}", "more than 16,777,216 characters"),
        ("{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "16,777,216"),
        ("{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "16,777,216"),
        ("{{ 'x' * 10 ** 10 }}", "16,777,216"),
        ("{{ 10 ** 1000 }}", "power"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|no attribute"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(30) %}{% set y = ([0]*300000)|map('string')|join %}{% endfor %}", "longer than 0.2 seconds"),
        ("{{ [1]|slice(3000000)|list|length }}", "the filter 'slice' would make more than"),
        ("{{ [1]|batch(1000000000, 0)|list|length }}", "the filter 'batch' would make more than"),
        ("{{ 'a'|center(300000000)|length }}", "the filter 'center' would make more than"),
        ("{{ 'a'|indent(300000000)|length }}", "the filter 'indent' would make more than"),
        ("{{ ('a'*20000)|replace('a','b'*20000)|length }}", "the filter 'replace' would make more than"),
        ("{{ ('a'*20000).replace('a','b'*20000)|length }}", "more than 16,777,216 characters"),
        ("{{ 'a'.ljust(300000000)|length }}", "more than 16,777,216 characters"),
        ("{{ '%300000000d' % 1 }}", "more than 16,777,216 characters"),
        ("{{ '{:300000000}'.format(1) }}", "more than 16,777,216 characters"),
        ("{{ '%300000000d'|format(1) }}", "more than 16,777,216 characters"),
        ("{{ messages|tojson(indent=1000000000) }}", "more than 16,777,216 characters"),
        ("{{ " + "9" * 5000 + " }}", "cannot be compiled"),
        ("{{ '\\ud800' }}", "half of a surrogate pair"),
        ("{% macro t() %}a{% generation %}b{% endgeneration %}{% endmacro %}c{{ t() }}", "inside of a macro"),
        ("{% set x %}a{% generation %}b{% endgeneration %}{% endset %}cd{{ x }}", "inside of a macro"),
    ],
)  # fmt: skip
def test_a_bad_template_is_refused_in_one_line(monkeypatch, template, reason):
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.2)
    with pytest.raises(Unusable, match=reason) as refused:
        Template(template, {}).render(HI)
    assert "\n" not in str(refused.value)


def config_of(path, **source):
    return DataConfig(
        sources=(FilesSource(path=str(path), holds="dialogues", **source),), tokenizer=TokenizerConfig(), packing="documents",
        validation_fraction=0,
    )  # fmt: skip


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, r"a dialogue has the field 'messages', or 'prompt' and 'completion' \(there is text\); set"),
        ({"prompt": "x"}, "a dialogue has the field 'messages', or 'prompt' and 'completion'"),
        ({"messages": []}, "field 'messages' holds an empty list, not a list of messages"),
        ({"messages": "hi"}, "field 'messages' holds str, not a list of messages"),
        ({"messages": [1]}, r"messages\[0\] is int, not a message with role and content"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role; allowed: assistant,"),
        ({"messages": [*HI, {"role": "asistant", "content": "x"}]}, r"messages\[2\] has role 'asistant'; .*mean 'assistant'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content; allowed: a text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"messages\[0\].content\[0\] is 'x'; allowed: parts with type"),
        ({"messages": [*HI, {"role": "assistant", "tool_calls": "x"}]},
         r"messages\[2\].tool_calls holds 'x'; allowed: a list"),
        ({"messages": HI, "tools": [1]}, r"field 'tools' holds \[1\]; allowed: a list of functions"),
        ({"messages": HI, "tools": "{"}, "field 'tools' holds no JSON"),
        ({"messages": HI[:1]}, "a dialogue of 1 messages, none of which the assistant wrote"),
        ({"prompt": "x", "completion": 3}, "field 'completion' holds int, not a text or a list of messages"),
        ({"prompt": "x", "completion": HI[:1]}, "field 'completion' holds no answer of the assistant"),
        ({"messages": [{"role": "tool", "content": "x"}, {"role": "developer", "content": "x"}, *HI]},
         "the chat template refuses the dialogue: role developer is none of .*, assistant, tool; fix it, or set on_error: skip"),
        ("[1]", "expected a JSON object"),
    ],
)  # fmt: skip
def test_a_bad_dialogue_is_named_with_file_and_line(tmp_path, capsys, row, reason):
    path = write(tmp_path / "rows.jsonl", {"messages": HI}, row)
    run = {
        "name": "bad", "objective": {"kind": "chat"},
        "data": {"sources": [{"kind": "files", "path": str(path), "holds": "dialogues"}], "packing": "documents"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["prepare", str(tmp_path / "run.yaml")]) == 2
    said, *error = capsys.readouterr().err.splitlines()
    assert "no chat template: dialogues are written in the built-in one" in said
    assert len(error) == 1 and re.search(rf"rows\.jsonl:2: {reason}", error[0]), error


def test_records_of_several_shapes_are_dialogues(tmp_path):
    asked = [{"role": "system", "content": "s"}, HI[0]]
    path = write(
        tmp_path / "rows.jsonl", {"messages": HI}, {"prompt": "hi", "completion": "yo"},
        {"prompt": HI[:1], "completion": HI[1:]}, {"prompt": HI[:1], "completion": HI, "messages": None},
        {"prompt": asked, "completion": "yo"},
    )  # fmt: skip
    (array,) = prepare(config_of(path), progress=False).train
    texts = [
        bytes(array.tokens[start:stop].astype(np.uint8))
        for start, stop in zip(array.offsets, array.offsets[1:], strict=False)
    ]
    assert len(set(texts)) == 2 and texts[0] == texts[1] == texts[2] == texts[3]
    assert bytes(array.tokens[array.labels > 0].astype(np.uint8)) == b"yo\0" * 5
    other = write(tmp_path / "other.jsonl", {"q": {"text": "hi"}, "a": "yo"})
    (same,) = prepare(config_of(other, prompt_field="q.text", completion_field="a"), progress=False).train
    assert bytes(same.tokens.astype(np.uint8)) == b"\0" + texts[0]


CALL = {"function": {"name": "sum", "arguments": {"of": [1, 2]}}, "type": "function"}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
CALLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for one in m.tool_calls or [] %}{{ one.function.name }}({{ one.function.arguments | tojson }}){% endfor %}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
WITH_TOOLS = [
    HI[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    HI[1],
]


@pytest.mark.torch
def test_functions_and_their_calls_are_written_as_transformers_writes_them(tmp_path):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer("byte_level"), **NAMES, chat_template=CALLING)
    wanted = theirs.apply_chat_template(WITH_TOOLS, tools=[TOOL], return_assistant_tokens_mask=True, return_dict=True)
    in_text = {**CALL, "function": {"name": "sum", "arguments": json.dumps(CALL["function"]["arguments"])}}
    as_services_write = [WITH_TOOLS[0], {**WITH_TOOLS[1], "tool_calls": [in_text]}, *WITH_TOOLS[2:]]
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    path = write(
        tmp_path / "rows.jsonl", {"messages": WITH_TOOLS, "tools": [TOOL]},
        {"messages": as_services_write, "tools": json.dumps([TOOL])}, {"messages": parts + WITH_TOOLS[1:], "tools": [TOOL]},
    )  # fmt: skip
    chat = Chat(vocabulary(CALLING))
    found = list(documents(config_of(path).sources[0]))
    assert len(found) == 3
    for document in found:
        ids, marks = chat.tokens(document.messages, document.tools)
        assert ids.tolist() == wanted["input_ids"]
        assert marks.astype(int).tolist() == wanted["assistant_masks"]
        assert Document.from_json(document.to_json()) == document


def test_fields_that_arrow_adds_are_not_learned(tmp_path):
    """In a table all mappings of a column have the same fields, and what a row lacks is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for name, value in (("city", "Paris"), ("expr", "1+1")):
        call = {"type": "function", "function": {"name": "f", "arguments": {name: value}}}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {name: {"type": "string"}}}}}
        rows.append({"messages": [HI[0], {"role": "assistant", "tool_calls": [call]}], "tools": [tool]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = list(documents(config_of(tmp_path / "rows.parquet").sources[0]))
    for document, row in zip(found, rows, strict=True):
        assert list(document.tools) == row["tools"]
        assert document.messages[1]["tool_calls"] == row["messages"][1]["tool_calls"]


def test_a_column_of_that_name_that_holds_something_else(tmp_path):
    deep = "[" * 100_000
    for tools in ("search, calculator", deep):
        path = write(tmp_path / "rows.jsonl", {"messages": HI, "tools": tools})
        with pytest.raises(
            UserError, match="field 'tools' holds no JSON .* set tools_field to another field, or to ''"
        ):
            list(documents(config_of(path).sources[0]))
        (document,) = documents(config_of(path, tools_field="").sources[0])
        assert document.tools == ()


def test_a_template_that_takes_too_long_is_not_skipped(tmp_path, monkeypatch):
    """Which dialogues are left out may not depend on how busy the machine is."""
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.0)
    path = write(tmp_path / "rows.jsonl", {"messages": HI})
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the chat template: it takes longer than 0 seconds; simplify"):
        prepare(config_of(path, on_error="skip"), progress=False)


def test_a_dialogue_that_the_template_refuses_is_skipped_and_counted(tmp_path, capsys):
    refused = {"messages": [{"role": "developer", "content": "x"}, *HI]}
    path = write(tmp_path / "rows.jsonl", {"messages": HI}, refused, {"messages": HI}, refused, {"messages": 1})
    prepared = prepare(config_of(path, on_error="skip"), progress=True)
    (array,) = prepared.train
    assert len(array.offsets) - 1 == 2 and prepared.meta.train[0].skipped == 3
    assert "3 documents skipped, the first: " in capsys.readouterr().err


def test_the_tokens_of_a_dialogue_do_not_depend_on_the_day():
    dated = "{{ strftime_now('%d %b %Y') }}" + MARKED
    chat = Chat(vocabulary(dated))
    assert chat.tokenizer.decode(chat.tokens(HI)[0]).startswith("26 Jul 2024<user>hi")
    now = Chat(vocabulary(dated), datetime.datetime(2031, 5, 4))
    assert now.tokenizer.decode(now.prompt(HI[:1])).startswith("04 May 2031<user>hi")


def test_long_dialogues_are_left_out_or_cut(tmp_path, capsys):
    path = write(
        tmp_path / "rows.jsonl",
        {"messages": HI},
        {"messages": [*HI, *HI]},
        {"messages": [{"role": "user", "content": "x" * 80}, HI[1]]},
    )
    (array,) = prepare(config_of(path), progress=False).train
    size = int(array.offsets[1] - array.offsets[0]) - 2  # what is predicted from the tokens before
    dropped, cut = (Dialogues(array, size, how, shown=True) for how in ("drop", "truncate"))
    out = capsys.readouterr().err
    assert f"2 of 3 dialogues are longer than {size + 1} tokens: left out" in out and "tokens: cut" in out
    # Of the third nothing that the assistant says is left.
    assert (len(dropped), len(cut)) == (1, 2)
    for examples in (dropped, cut):
        batch = examples.gather(np.arange(len(examples)))
        assert bytes(batch["targets"][batch["weights"] > 0].astype(np.uint8)) == b"yo\0" * len(examples)
        assert (batch["tokens"][:, 0] == ord("<")).all() and (batch["segments"] == 1).all()


def test_what_does_not_fit_together_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"messages": HI})
    with pytest.raises(ConfigError, match="holds: got 'dialogues'; files of csv hold no messages"):
        FilesSource(path="rows.csv", holds="dialogues")
    with pytest.raises(ConfigError, match=r"label_field: got 'x'; the source holds dialogues; allowed: empty"):
        FilesSource(path="rows.jsonl", holds="dialogues", label_field="x")
    prepared = prepare(config_of(path), progress=False)
    with pytest.raises(UserError, match="'causal' is for texts, but the sources hold dialogues; set it to 'chat'"):
        Causal().check_data(prepared, 16)
    with pytest.raises(UserError, match="got 'chunk'; chat keeps dialogues apart: set it to 'documents'"):
        ChatObjective().examples(prepared.train[0], prepared.tokenizer, "chunk", 16, training=True, shown=False)
    texts = write(tmp_path / "texts.jsonl", {"text": "x"})
    plain = DataConfig(sources=(FilesSource(path=str(texts)),), validation_fraction=0)
    with pytest.raises(UserError, match="'chat' needs dialogues; set holds: dialogues in the sources"):
        ChatObjective().check_data(prepare(plain, progress=False), 16)


def test_a_template_of_ones_own_is_kept_with_the_vocabulary(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", *({"messages": HI} for _ in range(3)))
    template = tmp_path / "mine.jinja"
    template.write_text(MARKED.replace("</s>", "<|eot|>"))
    words = {"kind": "bpe", "vocab_size": 300, "special_tokens": ("<|eot|>",)}
    config = dataclasses.replace(config_of(path), tokenizer=TokenizerConfig(**words, chat_template=str(template)))
    prepared = prepare(config, progress=False)
    made, (array,) = prepared.tokenizer, prepared.train
    eot = made.special_ids["<|eot|>"]
    assert made.ends == (made.end_of_text, eot)
    assert set(array.tokens[array.labels > 0].tolist()) >= {eot} and "ChatML" not in capsys.readouterr().err
    # What is prepared depends on the file's content.
    template.write_text(MARKED.replace("</s>", "!"))
    assert prepare(config, progress=False).directory != prepared.directory
    with pytest.raises(ConfigError, match="chat_template: got 'x'; kind 'bytes' has the built-in one"):
        TokenizerConfig(chat_template="x")
    missing = dataclasses.replace(config, tokenizer=TokenizerConfig(**words, chat_template=str(tmp_path / "no.jinja")))
    with pytest.raises(UserError, match=r"no\.jinja: cannot be read .*correct data\.tokenizer\.chat_template"):
        prepare(missing, progress=False)
    # A vocabulary of our own gets the built-in template, and keeps it.
    plain = prepare(dataclasses.replace(config, tokenizer=TokenizerConfig(**words)), progress=False).tokenizer
    assert plain.conventions.chat_templates == {"default": BUILT_IN} and plain.ends == (plain.end_of_text,)
