"""Train on pairs, translate, and look at who made which word."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest

from tests.devices import on_one_device
from tests.made import made
from tests.train.run_records import records
from train.commands.cli import main
from train.config import RunConfig, load
from train.data.prepared.prepare import DataConfig
from train.data.sources.source_config import SyntheticSource
from train.data.sources.synthetic import sentence
from train.data.tokenization.tokenizer import TokenizerConfig
from train.inference.translate import alignment
from train.objectives import Seq2Seq
from train.run.loop import train
from train.run.run_files import load_run
from train.translation import score, spread
from transformer.alignment.scored import NoAlignmentConfig
from transformer.errors import UserError
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.encoder_decoder import VaswaniConfig
from transformer.models.families import make_model
from transformer.models.recurrent_config import RecurrentConfig

pytestmark = pytest.mark.usefixtures("one_device")

DATA = DataConfig(
    sources=(SyntheticSource(limit=300),),
    tokenizer=TokenizerConfig(kind="words", vocab_size=600),
    target_tokenizer=TokenizerConfig(kind="words", vocab_size=700),
    packing="pad",
    validation_fraction=0.03,
)
SIZES = {"source_vocab_size": 600, "vocab_size": 700, "max_length": 40, "embed_dim": 32}
MODELS = {
    "transformer": VaswaniConfig(
        **SIZES, num_layers=1, attention=SoftmaxConfig(num_heads=2), dropout=0.0, attention_dropout=0.0
    ),
    "recurrent": RecurrentConfig(**SIZES, hidden_dim=16),
}
# Those of a recurrent model have other shapes each.
STEPS = {"transformer": 3, "recurrent": 1}


def config_of(directory: Path, name: str) -> RunConfig:
    # Packed where the model can: one shape to compile.
    data = dataclasses.replace(DATA, packing="documents") if name == "transformer" else DATA
    config = RunConfig(
        name="pairs", run_dir=str(directory), steps=STEPS[name], batch_size=8, length=40, model=MODELS[name], data=data,
        objective=Seq2Seq(),
    )  # fmt: skip
    # As many sentences as a sample has, rounded up: one program translates both.
    evaluation = dataclasses.replace(config.evaluation, translations=4, every=2 if name == "transformer" else 0)
    checkpoint = dataclasses.replace(config.checkpoint, best="chrf" if name == "transformer" else "loss")
    return dataclasses.replace(config, evaluation=evaluation, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a finished run of each model, when it is first asked for."""

    @functools.cache
    def run(name):
        directory = tmp_path_factory.mktemp("pairs") / "run"
        with on_one_device():
            train(config_of(directory, name))
        return directory

    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_run_ends_with_the_quality_of_its_translations(runs, name):
    assert records(runs(name), "eval/pairs") == {STEPS[name]: 4}
    (quality,) = records(runs(name), "eval/chrf").values()
    assert 0 <= quality <= 100


def test_checkpoints_may_be_compared_by_the_quality_of_translations(runs):
    compared = records(runs("transformer"), "eval/selection_chrf")
    assert list(compared) == [2, 3]
    assert compared[3] == records(runs("transformer"), "eval/chrf")[3]
    assert not records(runs("recurrent"), "eval/selection_chrf")


@pytest.mark.parametrize("name", MODELS)
def test_translations_and_the_page(runs, name, tmp_path, capsys):
    page = tmp_path / "look" / "page.html"
    command = ["translate", str(runs(name)), "--text", sentence(0), "--num-best", "2", "--attention", str(page)]
    capsys.readouterr()
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "page", "picture"]
    for word in sentence(0).split():
        assert f'"{word}"' in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", MODELS)
def test_lines_in_lines_out(runs, name, tmp_path, capsys):
    """Line n of the answer is the translation of line n: a blank one is empty, and U+2028 ends none."""
    words = sentence(0).split()
    texts = [sentence(0), "", "\u2028".join(words), "  ", sentence(1), sentence(0)]
    (tmp_path / "texts.txt").write_bytes("".join(f"{text}\n" for text in texts).encode("utf-8-sig"))
    arguments = ["translate", str(runs(name)), "--file", str(tmp_path / "texts.txt")]
    capsys.readouterr()
    assert main([*arguments, "--beams", "2"]) == 0
    found = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert len(found) == len(texts) and found[0] == found[2] == found[5] and found[1] == found[3] == ""
    (tmp_path / "texts.txt").write_text(f"{sentence(0)}\n\n{'x ' * 100}\n")
    assert main(arguments) == 2
    assert "text 3 has 101 tokens" in capsys.readouterr().err
    (tmp_path / "texts.txt").write_text("\n\n")
    assert main(arguments) == 2
    assert "there is nothing to translate" in capsys.readouterr().err


def test_without_attention_there_is_nothing_to_look_at(runs):
    loaded = load_run(runs("recurrent"))
    blind = RecurrentConfig(**SIZES, hidden_dim=16, attention=NoAlignmentConfig())
    _, params = made(functools.partial(make_model, blind))
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=blind), params=params)
    with pytest.raises(UserError, match="no attention"):
        alignment(loaded, [3, 4, 0], [5, 6])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--text"),
        (["--text", ""], "no tokens"),
        (["--text", "x " * 100], "context"),
        (["--text", "x", "--beams", "0"], "--beams"),
        (["--text", "x", "--num-best", "9"], "num-best"),
    ],
)
def test_a_mistake_is_one_line(runs, capsys, arguments, words):
    folder = runs("transformer")
    capsys.readouterr()
    assert main(["translate", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_model_of_pairs_neither_writes_nor_shows_itself(runs, capsys):
    folder = str(runs("transformer"))
    for command in (["generate", folder, "--prompt", "x"], ["attend", folder, "--text", "x"]):
        assert main(command) == 2
        assert "family" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {family: brt}", "Did you mean 'bert'?"),
        (
            "model: {family: bert}\nobjective: {kind: causal}",
            "objective.kind: got 'causal'; allowed with a model of family 'bert': answer, choice",
        ),
        ("model: {family: bert, num_layer: 2}", "Did you mean 'num_layers'?"),
        ("model: {family: bert, num_layers: two}", "model.num_layers: got 'two'"),
        (
            "model: {family: t5, embedding_size: 3}",
            "embedding_size: embedding_size is a field of families bert, electra",
        ),
        ("model: {family: bert, head: masked}\nobjective: {kind: next_sentence}", "model.head.kind: got 'masked'"),
        ("objective: {kind: seq2seq}", "allowed with a model of family 'gpt': causal, chat, preference, prefix"),
    ],
)
def test_a_family_and_what_does_not_go_with_it(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(f"name: x\n{text}\n")
    with pytest.raises(UserError) as caught:
        load(path)
    assert words in str(caught.value)


def test_overrides_reach_the_fields_of_the_family(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nmodel: {family: bert}\nobjective: {kind: masked}\n")
    config = load(path, ["--model.token-types", "0", "--model.num-layers", "3"])
    assert (config.model.token_types, config.model.num_layers) == (0, 3)


def test_scores_are_those_of_sacrebleu():
    same = ["le roi est vieux et sage", "il parla ainsi au peuple"]
    assert score(same, same).bleu == 100
    assert score(["rien", "du tout"], same).bleu < 5


def test_spread_takes_from_all_over():
    pairs = [(str(n), "") for n in range(10)]
    assert [int(source) for source, _ in spread(pairs, 4)] == [0, 2, 5, 7]
    assert spread(pairs[:2], 4) == pairs[:2]
    assert spread([], 4) == []
