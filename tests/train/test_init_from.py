"""Training that begins with another run's weights: what is taken, what is not, and what stands against it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.train.fine_tuning import SMALL, SPECIAL, classifier_of, config_of
from tests.train.stops import asked_to_stop
from train.commands.cli import main
from train.config import RunConfig, dump
from train.data.prepared.prepare import prepare
from train.data.tokenization.tokenizer import CLS, SEP, TokenizerConfig
from train.data.tokenization.vocabulary import make_tokenizer
from train.objectives import Causal
from train.optimizer import OptimizerConfig
from train.parallel.mesh import MeshConfig, make_mesh, use_mesh
from train.program.program import Program
from train.run.init_from import begin_from
from train.run.loop import train
from train.run.run_files import load_run
from transformer.errors import UserError
from transformer.layers.feed_forward import DenseConfig
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.gpt import GPTConfig
from transformer.models.heads import ClassificationHeadConfig

pytestmark = pytest.mark.usefixtures("one_device")


def beginning(config: RunConfig) -> tuple[dict, dict, str]:
    """Parameters of the model by path: random ones, those that training begins with; and what is said."""
    mesh = make_mesh(config.mesh)
    with use_mesh(mesh, config.mesh.rules):
        program = Program(config, mesh)
        fresh = program.init().params
        params, said = begin_from(fresh, config, prepare(config.data, progress=False))
        begun = program.init(params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract)
    assert jax.tree.map(lambda leaf: leaf.sharding, begun) == shardings
    values = [
        {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(part)} for part in (fresh, begun.params)
    ]
    return values[0], values[1], said


def stored(run, step="latest") -> dict:
    return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(load_run(run, step).params)}


@pytest.mark.all_devices
@pytest.mark.parametrize("strategy", ["dp", "fsdp"])
def test_the_encoder_is_taken_and_the_head_begins_afresh(texts, encoder, tmp_path, strategy):
    mesh = MeshConfig(strategy=strategy)
    fresh, begun, said = beginning(classifier_of(texts, tmp_path / "tuned", init_from=str(encoder), mesh=mesh))
    theirs = stored(encoder, "best")
    assert {path[0] for path in begun.keys() - theirs.keys()} == {"pooled_head"}
    for path, value in begun.items():
        np.testing.assert_array_equal(value, theirs.get(path, fresh[path]))
    taken = sum(begun[path].size for path in begun.keys() & theirs.keys())
    total = sum(value.size for value in begun.values())
    assert f"step 4: {taken:,} of {total:,} parameters. New, random: pooled_head. Not used: masked_head" in said
    assert "\n" not in said and "Changed" not in said


def test_what_else_is_another_model_is_said(texts, encoder, tmp_path):
    model = BertConfig(**SMALL, head=ClassificationHeadConfig(), norm_eps=1e-5, mlp=DenseConfig(activation="relu"))
    config = classifier_of(texts, tmp_path / "tuned", init_from=str(encoder), model=model)
    assert beginning(config)[2].endswith(
        ". Changed: model.mlp.activation: 'gelu_exact' → 'relu', model.norm_eps: 1e-12 → 1e-05"
    )


def test_a_run_begins_so_learns_and_goes_on_without_beginning_again(texts, encoder, tmp_path, capsys):
    config = classifier_of(
        texts,
        tmp_path / "tuned",
        init_from=str(encoder),
        steps=40,
        optimizer=OptimizerConfig(learning_rate=3e-3, ema_decay=0.5, warmup_steps=1),
    )
    whole = train(config)
    assert capsys.readouterr().out.count(f"weights from {encoder}, step") == 1
    assert whole.scores.accuracy == 1 and whole.scores.perplexity is None
    # Half of it, then the rest, with the encoder gone.
    moved = tmp_path / "encoder"
    shutil.copytree(encoder, moved)
    half = dataclasses.replace(config, run_dir=str(tmp_path / "half"), init_from=str(moved))
    with asked_to_stop(looks=6):
        assert train(half).interrupted
    shutil.rmtree(moved)
    capsys.readouterr()
    assert train(half).step == 40
    assert "weights from" not in capsys.readouterr().out
    one, other = stored(tmp_path / "tuned"), stored(tmp_path / "half")
    for path, value in one.items():
        np.testing.assert_array_equal(other[path], value)


def test_a_missing_init_from_run_is_refused_before_its_vocabulary_is_read(texts, tmp_path):
    config = classifier_of(texts, tmp_path / "tuned", init_from=str(tmp_path / "none"))
    gone = dataclasses.replace(config.data.tokenizer, kind="file", path=str(tmp_path / "none" / "tokenizer.json"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=gone))
    with pytest.raises(UserError, match="init_from: .*/none: no such run; train it first"):
        train(config)


def refusal(config: RunConfig) -> str:
    """What is said against it. Shapes alone are enough for that."""
    fresh = jax.eval_shape(lambda: nnx.state(make_model(config.model, nnx.Rngs(0)), nnx.Param))
    with pytest.raises(UserError) as raised:
        begin_from(fresh, config, prepare(config.data, progress=False))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 260}, "embed.table: [264, 32] there, [260, 32] here; set model.vocab_size to 264 (it is 260)"),
        ({"embed_dim": 64}, "set model.embed_dim to 32 (it is 64)"),
        ({"num_layers": 3}, "set model.num_layers to 2 (it is 3)"),
        ({"mlp": DenseConfig(dim=64, activation="gelu_exact")}, "set model.mlp.dim to None (it is 64)"),
    ],
)  # fmt: skip
def test_another_shape_names_the_field(texts, encoder, tmp_path, changes, told):
    model = BertConfig(**SMALL | changes, head=ClassificationHeadConfig())
    found = refusal(classifier_of(texts, tmp_path / "tuned", init_from=str(encoder), model=model))
    assert found.startswith("init_from: ") and "have a different shape" in found and told in found


@pytest.mark.all_devices
@pytest.mark.parametrize("strategy", ["dp", "fsdp"])
def test_a_larger_vocabulary_begins_each_new_token_as_the_mean_of_the_others(texts, encoder, tmp_path, strategy):
    config = config_of(texts, tmp_path / "more", init_from=str(encoder), mesh=MeshConfig(strategy=strategy))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=272))
    _, begun, said = beginning(config)
    theirs = stored(encoder, "best")
    grown = {path for path, value in begun.items() if value.shape != theirs[path].shape}
    assert {path[0] for path in grown} >= {"embed", "masked_head"} and "Changed: model.vocab_size: 264 → 272" in said
    for path, value in begun.items():
        if path not in grown:
            np.testing.assert_array_equal(value, theirs[path])
            continue
        old, new = value[:264], value[264:]
        np.testing.assert_array_equal(old, theirs[path])
        np.testing.assert_allclose(new, np.broadcast_to(old.mean(0), new.shape), rtol=1e-6, atol=1e-7)


def test_a_run_with_no_parameter_in_common_is_refused(texts, encoder, tmp_path):
    config = config_of(texts, tmp_path / "tuned", init_from=str(encoder))
    other = dataclasses.replace(config, model=GPTConfig(**SMALL), objective=Causal())
    fresh = nnx.State({"elsewhere": {"kernel": nnx.Param(jnp.zeros((2, 2)))}})
    with pytest.raises(
        UserError, match=r"of model\.family 'bert', has no parameter in common with this model, of family 'gpt'"
    ):
        begin_from(fresh, other, prepare(config.data, progress=False))


def test_a_head_over_classes_has_them_in_the_order_of_the_data(texts, tmp_path, monkeypatch):
    first = classifier_of(texts, tmp_path / "first", steps=2)
    train(first)
    again = classifier_of(texts, tmp_path / "again", init_from=str(first.directory))
    before = stored(first.directory)
    kernel = ("pooled_head", "out", "kernel")

    def telling(*labels):
        def load(run, step="latest", **options):
            return dataclasses.replace(load_run(run, step, **options), labels=labels)

        monkeypatch.setattr("train.run.init_from.load_run", load)
        return beginning(again)

    _, begun, said = telling("bad", "good")
    np.testing.assert_array_equal(begun[kernel], before[kernel])
    assert "lasses reordered" not in said and "other classes" not in said
    _, begun, said = telling("good", "bad")
    np.testing.assert_array_equal(begun[kernel], before[kernel][:, ::-1])
    assert "Classes reordered to match the data" in said
    fresh, begun, said = telling("cold", "warm")
    np.testing.assert_array_equal(begun[kernel], fresh[kernel])
    assert "It predicts other classes (cold, warm)" in said and "New, random: pooled_head" in said
    _, begun, said = telling("LABEL_0", "LABEL_1")
    np.testing.assert_array_equal(begun[kernel], before[kernel])
    assert "Its classes have no names, and were matched by number" in said
    assert "Changed" not in said
    head = ClassificationHeadConfig(pooling="cls")
    again = dataclasses.replace(again, model=dataclasses.replace(again.model, head=head))
    assert telling("bad", "good")[2].endswith(". Changed: model.head.pooling: 'mean' → 'cls'")


def test_a_missing_init_from_run_is_refused(texts, tmp_path):
    found = refusal(classifier_of(texts, tmp_path / "tuned", init_from=str(tmp_path / "none")))
    assert found.startswith("init_from: ") and "no run here" in found


def test_another_tokenizer_is_refused_and_the_message_shows_how_to_use_the_same(texts, encoder, tmp_path):
    tokenizer = TokenizerConfig(special_tokens=(CLS, SEP))
    config = classifier_of(texts, tmp_path / "tuned", init_from=str(encoder))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    assert "data.tokenizer: does not match the tokenizer of init_from" in refusal(config)
    assert refusal(config).endswith('set it to {kind: bytes, special_tokens: ["[MASK]", "[CLS]", "[SEP]"]}')


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "words", "unigram"])
def test_the_file_of_a_tokenizer_is_the_same_tokenizer(tmp_path, kind):
    config = TokenizerConfig(kind=kind, vocab_size=300, special_tokens=SPECIAL)
    trained = make_tokenizer(config, ["some words to learn from, and more"] * 3)
    trained.save(tmp_path)
    for special in ((), SPECIAL, (CLS, SEP)):
        same = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"), special_tokens=special)
        assert make_tokenizer(same, []).fingerprint() == trained.fingerprint()


def test_the_tokenizer_that_a_run_keeps_is_named(texts, tmp_path):
    first = config_of(texts, tmp_path / "encoder", steps=1)
    trained = TokenizerConfig(kind="bpe", vocab_size=264, special_tokens=SPECIAL)
    train(dataclasses.replace(first, data=dataclasses.replace(first.data, tokenizer=trained)))
    config = classifier_of(texts, tmp_path / "tuned", init_from=str(tmp_path / "encoder"))
    path = tmp_path / "encoder" / "tokenizer" / "tokenizer.json"
    assert refusal(config).endswith(f"set it to {{kind: file, path: {path}}}")
    same = TokenizerConfig(kind="file", path=str(path))
    beginning(dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=same)))


def test_pretraining_and_fine_tuning_from_the_command_line(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config in (config_of(texts, tmp_path / "encoder"), classifier_of(texts, tmp_path / "tuned", steps=40)):
        (tmp_path / f"{config.name}.yaml").write_text(dump(config), encoding="utf-8")
    assert main(["train", "encoder.yaml"]) == 0
    assert main(["train", "tuned.yaml", "--init-from", "encoder"]) == 0
    said = capsys.readouterr().out
    assert "tuned: weights from encoder, step" in said and "row/s" in said
    assert "held-out loss" in said and "accuracy 100.00%  f1 1.0000  matthews 1.0000 (the commonest class:" in said
    records = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if "eval/loss" in record)
    assert last["eval/accuracy"] == 1 and "eval/perplexity" not in last and "eval/bits_per_byte" not in last
    assert (
        main(["train", "tuned.yaml", "--init-from", "encoder", "--model.head.num-labels", "3", "--run-dir", "other"])
        == 2
    )
    assert "model.head.num_labels: got 3; the data has 2 classes: bad, good" in capsys.readouterr().err
    assert main(["explain", "tuned.yaml"]) == 0
