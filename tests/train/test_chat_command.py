"""`manyheads chat`: a dialogue by lines of standard input."""

from __future__ import annotations

import io
import json

import pytest
import yaml

from train.commands.cli import main
from train.config import parse
from train.data.tokenization.chat import Chat
from train.run.loop import train

pytestmark = pytest.mark.usefixtures("one_device")

GREEDY = ("--temperature", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run on bytes, with the built-in template."""
    from tests.devices import on_one_device

    folder = tmp_path_factory.mktemp("chat")
    rows = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"{n} {n}"}] for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    given = {
        "name": "chat", "run_dir": str(folder / "run"), "steps": 20, "batch_size": 4, "objective": {"kind": "chat"},
        "model": {"vocab_size": 256, "max_length": 128, "num_layers": 1, "embed_dim": 32, "attention": {"num_heads": 2}},
        "data": {
            "sources": [{"kind": "files", "path": str(folder / "rows.jsonl"), "holds": "dialogues"}],
            "packing": "documents", "validation_fraction": 0.2,
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "evaluation": {"every": 10, "batches": 1}, "log": {"trackers": []}, "sample": {"every": 10, "max_tokens": 8},
    }  # fmt: skip
    with on_one_device():
        finished = train(parse(yaml.safe_load(json.dumps(given)), "test"))
    assert finished.scores.loss < 4
    return folder / "run"


@pytest.fixture
def talk(run, monkeypatch, capsys):
    """What is answered to lines of text, and every dialogue that the model was given."""

    def say(lines, *flags):
        given, render = [], Chat.prompt

        def prompt(chat, messages):
            given.append([(one["role"], one["content"]) for one in messages])
            return render(chat, messages)

        monkeypatch.setattr(Chat, "prompt", prompt)
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status = main(["chat", str(run), *flags])
        monkeypatch.setattr(Chat, "prompt", render)
        out, err = capsys.readouterr()
        return status, out, err, given

    return say


def test_it_answers_with_what_was_said_before_in_mind(talk):
    few = (*GREEDY, "--max-tokens", "4")
    status, out, err, given = talk("one\n\n two \n/reset\none\n/quit\nnever\n", *few, "--system", "Be brief.")
    assert status == 0 and err == ""
    system = ("system", "Be brief.")
    assert given[0] == [system, ("user", "one")]
    assert given[1][:2] == given[0] and given[1][2][0] == "assistant" and given[1][3:] == [("user", "two")]
    assert given[2] == given[0] and len(given) == 3
    first = given[1][2][1]
    assert out.startswith(first + "\n") and out.endswith(first + "\n")
    # Without a terminal the end of the input is the end, also in the middle of a line.
    assert talk("one", *few, "--system", "Be brief.")[1] == first + "\n"


def test_the_same_seed_draws_the_same_answers(talk):
    hot = ("--temperature", "2", "--max-tokens", "8")
    one, other, third = (talk("a\na\n", *hot, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert one == other != third


def test_a_long_history_loses_its_oldest_turns_and_keeps_the_system(talk):
    status, _, err, given = talk("first\n" + "more\n" * 3, *GREEDY, "--max-tokens", "4", "--system", "s")
    assert status == 0
    assert "(the context of 128 tokens is full: the oldest 2 messages are left out)" in err
    assert given[-1][0] == ("system", "s") and given[-1][1] == ("user", "more")
    status, _, err, given = talk("x" * 100 + "\n", "--max-tokens", "4")
    assert (
        status == 2
        and "the message takes 141 tokens with the chat template; together with 4 tokens kept for the" in err
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "0"], "max_tokens: got 0"),
        (["--top-p", "2"], "--top-p: got 2.0; allowed"),
        (["--step", "7"], "this run has latest, best, 20"),
        (["--system", "\udcff"], "--system: it is not valid UTF-8"),
    ],
)
def test_it_refuses_in_one_line(talk, flags, message):
    status, _, err, _ = talk("a\n", *flags)
    assert status == 2 and message in err and err.count("\n") == 1


def test_it_needs_a_language_model(encoder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    assert main(["chat", str(encoder)]) == 2
    assert "cannot chat: family 'bert' is not a language model" in capsys.readouterr().err
