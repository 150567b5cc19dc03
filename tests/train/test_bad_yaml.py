"""YAML that is invalid, endless, or far larger in memory than in its file: one message, and at once."""

from __future__ import annotations

import os

import pytest

from train.config import load, parse
from train.config.yaml_files import as_json, parse_yaml
from transformer.errors import UserError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 2001-99-99", "a number, a date or a value with a tag"),
        ("x: !!timestamp y", "a number, a date or a value with a tag"),
        ("x: !!int y", "a number, a date or a value with a tag"),
        (f"x: {'9' * 5_000}", "a number, a date or a value with a tag"),
        ("[" * 20_000, "too many collections inside each other"),
        ("{[a]: 1}: 2", "a key that is a list or a mapping"),
        ("a: 1\na: 2", "the key 'a' appears twice"),
        ("a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}", "line 2: the key 'x' appears twice"),
    ],
)
def test_values_that_cannot_be_read(text, message):
    with pytest.raises(UserError, match=f"^the file: .*{message}"):
        parse_yaml(text, "the file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a [*a]", "an alias (*) inside of what it names"),
        ("a: &a {b: [*a]}", "an alias (*) inside of what it names"),
        (BOMB, "its aliases (&, *) repeat data until there are over 1,000,000 values"),
        ("x: 2001-01-01", "a value that is not text, a number, a list or a mapping"),
    ],
)
def test_data_that_is_no_json(text, message):
    with pytest.raises(UserError) as caught:
        as_json(parse_yaml(text, "the file"), "the file")
    assert str(caught.value).startswith("the file: ") and message in str(caught.value)


def test_an_alias_may_be_used_twice():
    assert as_json(parse_yaml("a: &a [1]\nb: [*a, *a]", "x"), "x") == {"a": [1], "b": [[1], [1]]}


def test_a_mapping_may_replace_what_it_merges():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}"
    assert parse_yaml(text, "x") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}


def test_a_flag_may_hold_a_cycle_too():
    with pytest.raises(UserError, match=r"^command line: data.sources: a value that JSON cannot hold: an alias"):
        parse({"name": "x"}, "the file", ["--data.sources", "&a [*a]"])


@pytest.mark.parametrize("value", [[0] * 1_000, {"kind": [0] * 1_000}, "a" * 5_000])
def test_a_message_does_not_repeat_a_huge_value(value):
    for data in (
        {"name": "x", "objective": value},
        {"name": "x", "steps": value},
        {"name": "x", "data": {"packing": value}},
    ):
        with pytest.raises(UserError) as caught:
            parse(data, "the file")
        assert len(str(caught.value)) < 1_000


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="config.yaml: this is a named pipe; name a file"):
        load(tmp_path / "config.yaml")


def test_a_name_that_no_file_can_have():
    with pytest.raises(UserError, match="cannot be read: a name with a zero byte"):
        load("a\0b.yaml")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.num_layers", 10**30, "allowed: a number that 64 bits hold"),
        ("model.num_layers", 2**31, "allowed: at most 10,000"),
        ("model.vocab_size", 2**31, "allowed: at most 2,147,483,647"),
        ("batch_size", 2**63, "allowed: a number that 64 bits hold"),
    ],
)
def test_sizes_that_no_array_has(field, value, message):
    with pytest.raises(UserError, match=f"{field}: got {value}; {message}"):
        parse({"name": "x"}, "the file", [f"--{field}={value}"])
