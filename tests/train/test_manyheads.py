"""The public face: what a notebook does with a run."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import manyheads as mh
import transformer
from tests.train.fine_tuning import classifier_of
from tests.train.run_records import surroundings
from train.commands.cli import main
from transformer.errors import UserError
from transformer.interpret.capture import AttentionMaps

pytestmark = pytest.mark.usefixtures("one_device")
ROOT = Path(__file__).parents[2]

TRANSLATOR = {
    "name": "pairs", "steps": 2, "batch_size": 4, "length": 24,
    "model": {
        "family": "recurrent", "source_vocab_size": 600, "vocab_size": 600, "max_length": 40, "embed_dim": 8,
        "hidden_dim": 8, "encoder_dim": 4,
    },
    "objective": {"kind": "seq2seq"},
    "data": {
        "sources": [{"kind": "synthetic", "limit": 100}], "tokenizer": {"kind": "words", "vocab_size": 600},
        "packing": "pad",
    },
    "evaluation": {"every": 0, "translations": 0}, "log": {"trackers": []}, "sample": {"max_tokens": 0},
}  # fmt: skip


def test_importing_starts_nothing():
    program = "import sys, manyheads, transformer; sys.exit(bool({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=surroundings(), check=True)


@pytest.mark.parametrize("module", [mh, transformer])
def test_every_exported_name_is_there(module):
    for name in module.__all__:
        assert getattr(module, name).__name__ == name and name in dir(module)
    with pytest.raises(AttributeError, match="has no attribute 'atend'"):
        _ = module.atend


def test_a_language_model(whole, capsys):
    run = mh.load(whole)
    assert repr(run) == f"Run({str(whole)!r}, step={run.step}, family='gpt')"
    one = run.generate("value", max_tokens=6, temperature=0.0)
    assert run.generate(["value", "a"], max_tokens=6, temperature=0.0)[0] == one
    assert main(["generate", str(whole), "--prompt", "value", "--max-tokens", "6", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == f"value{one}".rstrip("\n")
    assert isinstance(run.generate("value", max_tokens=3, beams=2), str)
    maps = run.attention("value", layers=[1])
    assert isinstance(maps, AttentionMaps) and maps.weights_LNTS.shape == (1, 2, 5, 5)
    logits = run.model(jnp.asarray(run.tokenizer.encode("value"), jnp.int32)[None]).logits
    assert logits.shape == (1, 5, 256)
    for wrong in (lambda: run.embed("a"), lambda: run.translate("a"), lambda: run.predict(["a"])):
        with pytest.raises(UserError, match=str(whole)):
            wrong()
    assert mh.load(whole, "latest").step == 12
    with pytest.raises(UserError, match="no such folder; give the folder of a run"):
        mh.load(whole / "nothing")


def test_an_encoder_and_a_classifier(encoder, texts, tmp_path):
    run = mh.load(encoder)
    vectors = run.embed(["a good text", "wxyz"])
    assert vectors.shape == (2, 32) and run.embed("a good text").shape == (32,)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert (np.linalg.norm(run.embed("wxyz", normalize=False)) - 1) ** 2 > 1e-4
    tuned = mh.train(classifier_of(texts, tmp_path / "tuned", steps=2))
    assert tuned.labels == ("bad", "good")
    found = tuned.predict(["a good text", "a bad one"])
    assert [one["label"] in tuned.labels for one in found] == [True, True]
    with pytest.raises(UserError, match="document 0: this model takes single texts"):
        tuned.predict([("a", "b")])


def test_a_translator_from_plain_data(tmp_path):
    from train.data.sources.synthetic import sentence

    data = TRANSLATOR | {"run_dir": str(tmp_path / "run")}
    run = mh.train(data, ["--steps=3"])
    assert run.step == 3 and run.config.steps == 3
    source = sentence(1)
    assert isinstance(run.translate(source, beams=1), str) and len(run.translate([source, source])) == 2
    maps = run.attention(source)
    assert maps.columns[:-1] == tuple(source.split()) and not maps.same_tokens
    with pytest.raises(UserError, match=r"steps: got 0"):
        mh.train(data, ["--steps=0"])


def test_a_config_is_trained_as_it_is(texts, tmp_path):
    config = dataclasses.replace(classifier_of(texts, tmp_path / "run"), steps=1)
    assert mh.train(config).config.steps == 1


def test_loading_a_run_warns_of_nothing(whole):
    program = f"import manyheads as mh; mh.load({str(whole)!r})"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=surroundings(), capture_output=True, text=True, check=True
    )
    assert ran.stderr == "" and ran.stdout == ""
