"""lm-evaluation-harness: its own Hugging Face model and ours give the same numbers, and tasks in files run."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from tests.huggingface.vocabularies import llama, save_tokenizer, tokenizer
from train.commands.cli import main
from train.huggingface.import_checkpoint import import_checkpoint
from train.inference.log_probabilities import TokenScorer
from train.run.run_files import load_run

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.torch]

TASK = """
task: kings
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICE = """doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]"""
GENERATED = """doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "t"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""


class Request:
    """As the harness makes them."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The harness's model, and ours, of a checkpoint with a tokenizer of one kind; and its import."""
    from lm_eval.models.huggingface import HFLM

    from train.examine.harness import HarnessModel

    @functools.cache
    def of(kind):
        folder = tmp_path_factory.mktemp(kind)
        made = tokenizer(kind)
        save_tokenizer(made, folder / "hf")
        llama(folder / "hf", made.get_vocab_size(), ends=[2, 3])
        run = import_checkpoint(str(folder / "hf"), folder / "run", verify=False)
        theirs = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=1)
        return theirs, HarnessModel(load_run(run)), run

    return of


@pytest.fixture(params=["byte_level", "sentencepiece_bpe"])
def both(request, models):
    return models(request.param)


@pytest.fixture
def one(models):
    return models("byte_level")


def test_log_likelihoods_are_those_of_the_harness(both):
    theirs, ours, _ = both
    pairs = [
        ("the king of", " the hill"),
        ("", "hello world"),
        ("the king ", "of"),
        ("<s>the", " king"),
        ("hello " * 40, "king"),
    ]
    requests = [Request(*pair) for pair in pairs * 3]
    found, expected = ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True)
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.max_length == theirs.max_length
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=1e-4, atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods_are_those_of_the_harness(both):
    theirs, ours, _ = both
    texts = [Request("the king of the hill sat on the mat. " * count) for count in (1, 3, 9)]
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts, disable_tqdm=True), rtol=1e-4, atol=1e-4
    )


def test_greedy_texts_are_those_of_the_harness(both):
    theirs, ours, _ = both
    how = {"until": ["t", "\n"], "max_gen_toks": 20, "do_sample": False}
    requests = [Request(text, dict(how)) for text in ("the king of", "hello", "a mat", "once upon " * 12)]
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_packed_texts_score_as_each_alone(one):
    _, _, run = one
    loaded = load_run(run)
    scorer, rng = TokenScorer(loaded.config.model), np.random.default_rng(0)
    texts = [rng.integers(4, 200, size).tolist() for size in (2, 65, 1, 30, 30, 12, 64, 3)]
    together = scorer(loaded.params, texts)
    for text, packed in zip(texts, together, strict=True):
        (alone,) = scorer(loaded.params, [text])
        assert packed.log_probabilities.shape == (len(text) - 1,)
        np.testing.assert_allclose(packed.log_probabilities, alone.log_probabilities, rtol=1e-5, atol=1e-5)
        assert (packed.is_likeliest == alone.is_likeliest).all()


@pytest.fixture
def task(tmp_path):
    def write(kind, rest):
        rows = [
            {"question": "the king of", "choices": [" the hill", " a mat"], "answer": number % 2} for number in range(6)
        ]
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "kings.yaml").write_text(TASK.format(folder=tmp_path, kind=kind, rest=rest))
        return str(tmp_path / "kings.yaml")

    return write


@pytest.mark.parametrize(
    ("kind", "rest", "metric"),
    [("multiple_choice", CHOICE, "acc,none"), ("generate_until", GENERATED, "exact_match,none")],
)
def test_a_task_in_a_file_has_the_scores_of_the_harness(one, task, kind, rest, metric, tmp_path, capsys, monkeypatch):
    import lm_eval

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    theirs, _, run = one
    path = task(kind, rest)
    assert (
        main(["eval", str(run), "--tasks", path, "--limit", "5", "--examples", "0", "--out", str(tmp_path / "out")])
        == 0
    )
    assert "kings" in capsys.readouterr().out
    expected = lm_eval.simple_evaluate(theirs, tasks=[path], limit=5, num_fewshot=0, bootstrap_iters=0)
    stored = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert stored["results"]["kings"][metric] == expected["results"]["kings"][metric]
    assert stored["n-samples"]["kings"]["effective"] == 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "helaswag"], "--tasks: got 'helaswag'; allowed: tasks of lm-evaluation-harness, or YAML files."),
        (["--tasks", "none.yaml"], "--tasks: none.yaml: no such file"),
        (["--tasks", "{task}", "--data", "a.txt"], "--tasks: tasks have data of their own"),
        (["--limit", "3"], "--limit: got 3; allowed with --tasks: 1 or more"),
        (["--tasks", "{task}", "--limit", "0"], "--limit: got 0; allowed with --tasks: 1 or more"),
    ],
)
def test_a_mistake_is_one_line(one, task, words, expected, capsys):
    _, _, run = one
    words = [word.format(task=task("multiple_choice", CHOICE)) for word in words]
    assert main(["eval", str(run), *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said.strip().splitlines()) == 1


def test_tasks_are_for_language_models(encoder, task, capsys):
    assert main(["eval", str(encoder), "--tasks", task("multiple_choice", CHOICE)]) == 2
    assert "need a language model (gpt)" in capsys.readouterr().err
