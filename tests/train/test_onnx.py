"""`manyheads export --format onnx`: ONNX Runtime computes what we do, on texts of any length, alone and in padded batches."""

from __future__ import annotations

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manyheads.run import Run
from tests.changed import changed
from tests.huggingface.ours import BERT, BERT_SPECIAL, GPT, MODERN, T5, WORDS, tokenizer_json, written
from tests.huggingface.peers import ENCODER, peer, saved
from tests.train.task_runs import run_of, write_rows
from tests.train.test_sentence_modules import TANH, add_modules, add_tensors
from train.commands.cli import main
from train.huggingface.import_checkpoint import import_checkpoint
from train.run.loop import train
from train.run.run_files import load_run
from transformer.models.heads import ClassificationHeadConfig, TokensHeadConfig

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.torch]

ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_random = random.Random(0)
TEXTS = [" ".join(_random.choices(WORDS, k=1 + number % 16)) for number in range(100)]
SMALL = ENCODER | {"num_hidden_layers": 1}
CLOSE = 1e-4


def exported(run, out, capsys):
    """A session of ONNX Runtime with what the command writes, its tokenizer, and what it says."""
    import onnxruntime
    from tokenizers import Tokenizer

    capsys.readouterr()
    assert main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "largest difference" in said and "note" not in said
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    return onnxruntime.InferenceSession(str(out / "onnx" / "model.onnx")), tokenizer, said


def inputs_of(session, encodings):
    every = {
        "input_ids": [one.ids for one in encodings], "attention_mask": [one.attention_mask for one in encodings],
        "token_type_ids": [one.type_ids for one in encodings],
    }  # fmt: skip
    return {one.name: np.array(every[one.name]) for one in session.get_inputs()}


def outputs_of(session, tokenizer, texts, name, batch=32, pad=0):
    """The output of each text: in padded batches, and every tenth also alone, which is the same."""
    found = []
    for first in range(0, len(texts), batch):
        tokenizer.enable_padding(pad_id=pad)
        encodings = tokenizer.encode_batch(texts[first : first + batch])
        (rows,) = session.run([name], inputs_of(session, encodings))
        tokenizer.no_padding()
        for number, (row, encoding) in enumerate(zip(rows, encodings, strict=True)):
            own = row[: sum(encoding.attention_mask)] if rows.ndim == 3 else row
            found.append(own)
            if number % 10 == 0:
                alone = inputs_of(session, tokenizer.encode_batch([texts[first + number]]))
                np.testing.assert_allclose(own, session.run([name], alone)[0][0], atol=CLOSE)
    return found


def logits_of(run, tokenizer, texts):
    """Our logits of each text, in one batch."""
    rows = [tokenizer.encode(text).ids for text in texts]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    valid = np.array([np.arange(ids.shape[1]) < len(row) for row in rows]).astype(np.int32)
    graphdef, params = nnx.split(Run(run, load_run(run)).model)
    ours = jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.asarray(ids), segments_BT=jnp.asarray(valid)).logits)
    found = np.asarray(ours(params))
    return [one[: len(row)] if found.ndim == 3 else one for one, row in zip(found, rows, strict=True)]


def test_embeddings_with_layers_after_the_pooling(tmp_path, capsys):
    folder = saved(peer("MPNetModel", SMALL), tmp_path / "mpnet")
    tokenizer_json(folder, ROBERTA_SPECIAL)
    dense = {"in_features": 48, "out_features": 8, "bias": True, "activation_function": TANH}
    modes = {"embedding_dimension": 24, "pooling_mode": ["mean", "max"]}
    add_modules(
        folder, ["Transformer", "Pooling", "Dense", "LayerNorm", "Normalize"], modes, at_2_Dense=dense,
        at_3_LayerNorm={"dimension": 8},
    )  # fmt: skip
    add_tensors(folder, "2_Dense", linear_weight=(8, 48), linear_bias=(8,))
    add_tensors(folder, "3_LayerNorm", norm_weight=(8,), norm_bias=(8,))
    run = import_checkpoint(str(folder), tmp_path / "run", verify=False)
    out = tmp_path / "out"
    session, tokenizer, said = exported(run, out, capsys)
    assert "outputs: last_hidden_state, sentence_embedding" in said
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert session.get_inputs()[0].shape == ["batch_size", "sequence_length"]
    ours = Run(run, load_run(run)).embed(TEXTS)
    np.testing.assert_allclose(outputs_of(session, tokenizer, TEXTS, "sentence_embedding", pad=1), ours, atol=CLOSE)
    hidden = outputs_of(session, tokenizer, TEXTS[:40], "last_hidden_state", pad=1)
    assert [len(one) for one in hidden] == [len(tokenizer.encode(text).ids) for text in TEXTS[:40]]
    content = (out / "onnx" / "model.onnx").read_bytes()
    assert b".py" not in content and str(tmp_path).encode() not in content
    # What sentence-transformers reads, without the weights of the Transformer, which are in the graph.
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    wanted = {"onnx/model.onnx", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "tokenizer.json"}
    assert wanted <= names and "model.safetensors" not in names
    graph = json.loads((out / "parity.json").read_text())
    assert graph["largest_difference"] < CLOSE and graph["lengths"][0] < graph["lengths"][-1]
    assert_the_card_runs(out, "sentence_embedding", tokenizer, session)


def assert_the_card_runs(out, name, tokenizer, session):
    """The code in README.md computes the vector of its text."""
    (code,) = (out / "README.md").read_text().split("```python\n")[1:]
    names = {"FOLDER": str(out)}
    exec(code.partition("```")[0], names)
    expected = session.run([name], inputs_of(session, [tokenizer.encode("A text.")]))[0]
    np.testing.assert_array_equal(names[name], expected)


def test_several_labels_with_positions_that_begin_later_and_weights_in_a_file_of_their_own(
    tmp_path, capsys, monkeypatch
):
    import transformers

    monkeypatch.setattr("train.huggingface.onnx_graph._SINGLE_LIMIT", 0)
    labels = {0: "sad", 1: "neutral", 2: "glad"}
    fields = SMALL | {"type_vocab_size": 1, "problem_type": "multi_label_classification", "id2label": labels}
    folder = saved(peer("RobertaForSequenceClassification", fields), tmp_path / "roberta")
    tokenizer_json(folder, ROBERTA_SPECIAL)
    run = import_checkpoint(str(folder), tmp_path / "run", verify=False)
    session, tokenizer, _ = exported(run, tmp_path / "out", capsys)
    assert {path.name for path in (tmp_path / "out" / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    found = outputs_of(session, tokenizer, TEXTS, "logits", pad=1)
    np.testing.assert_allclose(found, logits_of(run, tokenizer, TEXTS), atol=CLOSE)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == labels and config.problem_type == "multi_label_classification"
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(["the cat", "a"], padding=True)
    assert batch["input_ids"][1][-1] == 1 and set(batch) == {"input_ids", "attention_mask"}


def test_tags_with_rotary_positions_and_local_attention(tmp_path, capsys):
    head = TokensHeadConfig(num_labels=4, dense="gelu_exact", bias=False)
    config = dataclasses.replace(MODERN, num_layers=2, pattern=MODERN.pattern[:2], head=head)
    names = {str(number): name for number, name in enumerate(("O", "B-PER", "I-PER", "B-LOC"))}
    written(config, tmp_path / "modern", extra={"pad_token_id": 0, "id2label": names})
    tokenizer_json(tmp_path / "modern", BERT_SPECIAL)
    run = import_checkpoint(str(tmp_path / "modern"), tmp_path / "run", verify=False)
    session, tokenizer, _ = exported(run, tmp_path / "out", capsys)
    found = outputs_of(session, tokenizer, TEXTS, "logits")
    for one, ours in zip(found, logits_of(run, tokenizer, TEXTS), strict=True):
        np.testing.assert_allclose(one, ours, atol=CLOSE)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == names


def test_pairs_of_texts_of_a_run_that_was_trained_here(tmp_path, capsys):
    config = run_of("classification", write_rows("classification", tmp_path), tmp_path / "run", steps=1)
    model = changed(config.model, norm_first=False, head={"pooling": "cls"})
    # Of a model with norms before its sublayers there is no class, so no graph.
    train(dataclasses.replace(config, run_dir=str(tmp_path / "other")))
    said = refused(tmp_path / "other", capsys)
    assert "does not support norm_first True" in said and "a graph is made from a class of transformers. Train" in said
    train(dataclasses.replace(config, model=model))
    session, tokenizer, _ = exported(tmp_path / "run", tmp_path / "out", capsys)
    letters = [text.replace(" ", "")[:9] for text in TEXTS]
    pairs = list(zip(letters, letters[::-1], strict=True))
    logits = np.array(outputs_of(session, tokenizer, pairs, "logits", pad=256))
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ours = Run(tmp_path / "run", load_run(tmp_path / "run")).predict(pairs)
    np.testing.assert_allclose(scores, [list(one["scores"].values()) for one in ours], atol=CLOSE)
    labels = json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]
    assert list(labels.values()) == ["left", "middle", "right"]
    assert [labels[str(one)] for one in logits.argmax(1)] == [one["label"] for one in ours]


@pytest.fixture
def classifier(tmp_path):
    config = dataclasses.replace(BERT, num_layers=1, head=ClassificationHeadConfig(num_labels=1))
    written(config, tmp_path / "bert", extra={"pad_token_id": 0})
    tokenizer_json(tmp_path / "bert", BERT_SPECIAL)
    return import_checkpoint(str(tmp_path / "bert"), tmp_path / "run", verify=False)


def refused(run, capsys, *more):
    capsys.readouterr()
    out = run.parent / "refused"
    assert main(["export", str(run), "--format", "onnx", "--out", str(out), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not [path for path in run.parent.iterdir() if "refused" in path.name]
    return said


def test_a_graph_that_computes_something_else_is_not_kept(classifier, capsys, monkeypatch):
    monkeypatch.setattr("train.huggingface.onnx_export.LIMIT", 0.0)
    said = refused(classifier, capsys)
    assert (
        "BertForSequenceClassification: the ONNX graph computes something else than the model (largest differ" in said
    )


def test_a_number_is_known_to_be_one(classifier, tmp_path):
    import transformers

    assert main(["export", str(classifier), "--out", str(tmp_path / "out"), "--no-verify"]) == 0
    found = transformers.pipeline("text-classification", str(tmp_path / "out"))("the cat sat")
    assert found[0]["score"] == pytest.approx(
        Run(classifier, load_run(classifier)).predict(["the cat sat"])[0]["label"], abs=1e-5
    )


@pytest.mark.parametrize(("config", "family"), [(GPT, "gpt"), (T5, "t5")])
def test_decoders_are_refused(config, family, tmp_path, capsys):
    written(config, tmp_path / "hf", extra={"eos_token_id": 1})
    tokenizer_json(tmp_path / "hf", ("<pad>", "</s>", "<unk>"))
    run = import_checkpoint(str(tmp_path / "hf"), tmp_path / "run", verify=False)
    said = refused(run, capsys)
    assert (
        f"only encoders (family 'bert') are written as ONNX, and this is a model of family '{family}'; --format" in said
    )


def test_what_cannot_be_written_is_said(classifier, tmp_path, capsys, monkeypatch):
    for flags in (["--dtype", "float16"], ["--no-verify"], ["--max-shard-size", "5GB"]):
        said = refused(classifier, capsys, *flags)
        assert "only with --format hf; the graph is in float32, and always compared" in said
    said = refused(classifier, capsys, "--model-type", "distilbert")
    assert "cannot be written as distilbert; it does not support" in said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnx") else name)
    said = refused(classifier, capsys)
    assert "--format onnx: not installed: onnx, onnxscript, onnxruntime; pip install 'manyheads[onnx]'" in said
