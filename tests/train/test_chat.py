"""Chat tuning: which tokens are learned, what is learned of dialogues, and how it is used."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import yaml

from tests.huggingface.vocabularies import save_tokenizer, tokenizer
from train.commands.cli import main
from train.config import load
from train.data.loader import train_batches
from train.data.prepared.prepare import prepare
from train.data.tokenization.chat import Chat, for_dialogues
from train.data.tokenization.tokenizer import ByteTokenizer
from train.huggingface.export import export
from train.huggingface.import_checkpoint import import_checkpoint
from train.huggingface.vocabulary import as_subwords, written
from train.run.loop import train
from transformer.models.gpt import GPTConfig

pytestmark = pytest.mark.usefixtures("one_device")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('Unknown role: ' + m['role']) }}{% endif %}"
    "{{ m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|eot|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|eot|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
WORDS = ["the", "king", "of", "hill", "sat", "on", "mat", "hello", "world", "once", "upon", "a", "time", "there", "was"]


def dialogues(count=32):
    """Short dialogues of two turns, or of four, whose answers no rule gives."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        turns = []
        for _ in range(1 + number % 2):
            question, answer = (" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(2))
            turns += [{"role": "user", "content": f"{number} {question}"}, {"role": "assistant", "content": answer}]
        found.append({"messages": turns})
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a random Llama of two layers, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, bos_token_id=1, eos_token_id=[2, 3], tie_word_embeddings=False,
        initializer_range=0.4,
    ))  # fmt: skip
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(folder)
    save_tokenizer(tokenizer("byte_level"), folder, chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def imported(llama, tmp_path_factory):
    return import_checkpoint(str(llama), tmp_path_factory.mktemp("imported") / "run", verify=False)


def config_of(imported, rows, folder, **changes):
    """Tuning of an import by adapters, as a file."""
    model = yaml.safe_load((imported / "config.yaml").read_text())["model"]
    given = {
        "name": "tuned", "run_dir": str(folder), "init_from": str(imported), "steps": 300, "batch_size": 4, "length": 90,
        "model": model, "adapter": {"rank": 8, "alpha": 16}, "objective": {"kind": "chat"},
        "data": {
            "sources": [{"kind": "files", "path": str(rows), "holds": "dialogues"}],
            "validation": [{"kind": "files", "path": str(rows), "holds": "dialogues"}],
            "tokenizer": {"kind": "file", "path": str(imported / "tokenizer" / "tokenizer.json")},
            "packing": "documents",
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 10, "weight_decay": 0.0},
        "evaluation": {"every": 0}, "checkpoint": {"every": 0}, "log": {"every": 50, "trackers": []},
        "sample": {"every": 0, "max_tokens": 24, "temperature": 0},
    }  # fmt: skip
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(given | changes))
    return path


@pytest.mark.torch
def test_adapters_learn_what_the_assistant_says(llama, imported, tmp_path, capsys, monkeypatch):
    import transformers

    rows = write(tmp_path / "rows.jsonl", dialogues())
    path = config_of(imported, rows, tmp_path / "tuned")
    config = load(path)
    theirs = transformers.AutoTokenizer.from_pretrained(llama)

    # Exactly transformers' tokens are learned, whatever rows they are packed into.
    prepared = prepare(config.data, progress=False)
    wanted = [
        theirs.apply_chat_template(row["messages"], return_assistant_tokens_mask=True, return_dict=True)
        for row in dialogues()
    ]
    (array,) = prepared.train
    for number, one in enumerate(wanted):
        own = slice(array.offsets[number], array.offsets[number + 1] - 1)
        assert array.tokens[own].tolist() == one["input_ids"]
        assert array.labels[own].tolist() == one["assistant_masks"]
    batches = train_batches(prepared, config.data, batch_size=4, length=90, seed=0, objective=config.objective)
    found = set()
    for step in range(-(-batches.examples_per_epoch // 4)):
        batch = batches.batch(step)
        for row in range(4):
            for segment in range(1, batch["segments"][row].max() + 1):
                inside = batch["segments"][row] == segment
                ids = [*batch["tokens"][row][inside], batch["targets"][row][inside][-1]]
                assert batch["tokens"][row][inside][1:].tolist() == batch["targets"][row][inside][:-1].tolist()
                found.add((tuple(map(int, ids)), (0, *map(int, batch["weights"][row][inside]))))
    assert found == {(tuple(one["input_ids"]), tuple(one["assistant_masks"])) for one in wanted}

    finished = train(config)
    assert finished.scores.loss < 0.05
    said = capsys.readouterr().out
    assert "manyheads chat" in said
    first = dialogues()[0]["messages"]
    assert (
        f"user       {first[0]['content']}\nreference  {first[1]['content']}\nmodel      {first[1]['content']}" in said
    )

    # What transformers answers with the export is what was learned.
    out = export(config.directory, verify=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.chat_template == TEMPLATE
    greedy = ["--temperature", "0", "--max-tokens", "24"]
    for row in dialogues()[:6]:
        *before, last = row["messages"]
        prompt = theirs.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0][prompt["input_ids"].shape[1] :]
        assert theirs.decode(answer, skip_special_tokens=True) == last["content"]
    monkeypatch.setattr("sys.stdin", io.StringIO(dialogues()[0]["messages"][0]["content"] + "\n"))
    capsys.readouterr()
    assert main(["chat", str(config.directory), *greedy]) == 0
    assert capsys.readouterr().out == dialogues()[0]["messages"][1]["content"] + "\n"


@pytest.mark.torch
def test_a_vocabulary_of_bytes_is_exported_with_the_built_in_template(tmp_path):
    import transformers

    tokens = ByteTokenizer()
    for name, text in written(for_dialogues(as_subwords(tokens)), GPTConfig(vocab_size=256)).items():
        (tmp_path / name).write_text(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for row in dialogues(4):
        ids, marks = Chat(tokens).tokens(row["messages"])
        wanted = theirs.apply_chat_template(row["messages"], return_assistant_tokens_mask=True, return_dict=True)
        assert ids.tolist() == wanted["input_ids"] and marks.astype(int).tolist() == wanted["assistant_masks"]
