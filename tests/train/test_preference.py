"""Preference tuning: its loss, its reference model, and what a run learns."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from tests.train.fine_tuning import by_path
from tests.train.stops import asked_to_stop
from train.commands.cli import main
from train.config import parse
from train.data.prepared.prepare import prepare
from train.loss import LossConfig
from train.objectives import Chat
from train.objectives.preference import Preference, log_probability
from train.report.metrics import METRICS, read_records
from train.run.loop import train
from train.run.run_files import load_run
from transformer.errors import UserError
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_device")

MODEL = GPTConfig(
    vocab_size=256, max_length=96, num_layers=1, embed_dim=32, attention=SoftmaxConfig(num_heads=2), dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions of which the shorter answer is preferred."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    found = []
    for number in range(48):
        prompt = [{"role": "user", "content": f"{number}?"}]
        chosen, rejected = "yes", f"no {number}"
        if number % 2:
            found.append({"prompt": f"{number}?", "chosen": chosen, "rejected": rejected})
        else:
            # As data sets with whole dialogues have them.
            answers = [[*prompt, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
            found.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def config_of(rows, folder, **changes):
    given = {
        "name": "tuned", "run_dir": str(folder), "steps": 12, "batch_size": 8,
        "model": {"vocab_size": 256, "max_length": 96, "num_layers": 1, "embed_dim": 32, "attention": {"num_heads": 2}},
        "objective": {"kind": "preference", "beta": 0.5},
        "data": {
            "sources": [{"kind": "files", "path": str(rows), "holds": "preferences"}],
            "packing": "documents", "validation_fraction": 0.25,
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 1, "weight_decay": 0.0},
        "evaluation": {"every": 4}, "checkpoint": {"every": 4, "best": "accuracy"},
        "log": {"every": 1, "trackers": []}, "sample": {"every": 0, "max_tokens": 4},
    }  # fmt: skip
    return parse(yaml.safe_load(json.dumps(given | changes)), "test")


@pytest.mark.torch
def test_the_loss_is_that_of_a_computation_by_hand(rows):
    import torch

    prepared = prepare(config_of(rows, rows.parent / "x").data, progress=False)
    objective = Preference(beta=0.3)
    examples = objective.examples(prepared.train[0], prepared.tokenizer, "documents", 80, training=True, shown=False)
    batch = examples.gather(np.arange(6))
    rng = np.random.default_rng(0)
    batch["reference"] = rng.normal(-20, 4, (6, 2)).astype(np.float32)
    batch["weights"][-1] = 0
    for side, answer in (("", b"yes\0"), ("other_", b"no ")):
        said = batch[f"{side}said"] > 0
        assert all(
            bytes(row[own].astype(np.uint8)).startswith(answer)
            for row, own in zip(batch[f"{side}targets"], said, strict=True)
        )
    graphdef, params = nnx.split(GPT(MODEL, rngs=nnx.Rngs(0)))
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}

    def summed(params, chunk):
        sums = objective.loss(nnx.merge(graphdef, params), arrays, LossConfig(chunk=chunk))
        return sums.loss, sums

    whole, chunked = (jax.grad(lambda p, n=n: summed(p, n), has_aux=True)(params) for n in (None, 100))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), whole[0], chunked[0])
    sums = whole[1]

    model, log_probs = nnx.merge(graphdef, params), []
    for side in ("", "other_"):
        logits = model(arrays[f"{side}tokens"], segments_BT=arrays[f"{side}segments"]).logits
        chosen = torch.log_softmax(torch.tensor(np.asarray(logits)), -1)
        chosen = chosen.gather(-1, torch.tensor(batch[f"{side}targets"]).long()[..., None])[..., 0]
        log_probs.append((chosen * torch.tensor(batch[f"{side}said"])).sum(-1))
    reference = torch.tensor(batch["reference"])
    margins = 0.3 * ((log_probs[0] - reference[:, 0]) - (log_probs[1] - reference[:, 1]))
    wanted = -torch.nn.functional.logsigmoid(margins)[:5]
    assert float(sums.loss) == pytest.approx(float(wanted.sum()), rel=1e-5)
    assert float(sums.weight) == 5
    assert float(sums.also["margin"]) == pytest.approx(float(margins[:5].sum()), rel=1e-4)
    assert float(sums.also["accuracy"]) == float((margins[:5] > 0).sum())


def test_a_chunk_is_a_part_of_the_sum():
    rng = np.random.default_rng(0)
    model = GPT(MODEL, rngs=nnx.Rngs(0))
    hidden = jnp.asarray(rng.normal(size=(3, 10, 32)), jnp.float32)
    targets, said = (jnp.asarray(rng.integers(0, most, (3, 10)), jnp.int32) for most in (256, 2))
    one, *others = (
        log_probability(model, hidden, targets, said, LossConfig(chunk=chunk)) for chunk in (None, 1, 9, 12)
    )
    for other in others:
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """A run that nothing interrupted, and how it ended."""
    from tests.devices import on_one_device

    with on_one_device():
        config = config_of(rows, tmp_path_factory.mktemp("whole") / "run")
        return config, train(config)


def test_a_run_begins_as_its_reference_and_prefers_what_it_is_told(whole, capsys):
    config, finished = whole
    records = {
        record["step"]: record for _, record in read_records(config.directory / METRICS) if "train/loss" in record
    }
    # Before the first update both models are the same.
    assert records[1]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert records[1]["train/margin"] == pytest.approx(0, abs=1e-4)
    assert records[12]["train/accuracy"] == 1 and records[12]["train/margin"] > 1
    assert finished.scores.loss < 0.3
    assert finished.scores.metrics["accuracy"] == 1 and finished.scores.metrics["margin"] > 1
    assert finished.scores.perplexity is None
    with np.load(config.directory / "reference.npz") as stored:
        assert np.isfinite(stored["train"]).all() and (stored["train"] < 0).all() and stored["validation"].shape[1] == 2
    # Its scores are found again with the same reference.
    assert main(["eval", str(config.directory), "--step", "latest"]) == 0
    assert f"loss {finished.scores.loss:.4f}  accuracy 100.00%  margin" in capsys.readouterr().out
    assert main(["replay", str(config.directory), "--step", "6"]) == 0
    assert "the run recorded the same, bit for bit" in capsys.readouterr().out


def test_it_goes_on_bitwise_with_the_same_reference(whole, tmp_path):
    config, _ = whole
    half = dataclasses.replace(config, run_dir=str(tmp_path / "half"))
    with asked_to_stop(looks=1):
        assert train(half).interrupted
    # While the reference model is applied nothing is there yet.
    assert not half.directory.exists()
    prepared = prepare(config.data, progress=False)
    sizes = [sum(array.documents for array in arrays) for arrays in (prepared.train, prepared.validation)]
    of_reference = sum(-(-size // config.evaluation_batch_size) for size in sizes)
    with asked_to_stop(looks=of_reference + 6):
        assert train(half).interrupted
    kept = tmp_path / "kept"
    shutil.copytree(half.directory, kept)
    assert train(half).step == 12
    one, other = (by_path(load_run(run, "latest").params) for run in (config.directory, half.directory))
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value)
    # Without it, or with that of other data, it does not go on.
    other = dataclasses.replace(half, run_dir=str(kept))
    (kept / "reference.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"reference\.npz: cannot be read .*restore it, or start a new run"):
        train(other)
    shutil.copy(half.directory / "reference.npz", kept)
    with pytest.raises(UserError, match=r"reference\.npz: it was made for other data, or for another length"):
        train(dataclasses.replace(other, length=90), allow_changed=["length"])


@pytest.mark.all_devices
def test_eight_devices_compute_what_one_does(whole, rows, tmp_path):
    first, _ = whole
    config = config_of(rows, tmp_path / "eight", steps=3, mesh={"strategy": "fsdp"}, loss={"chunk": 64})
    train(dataclasses.replace(config, optimizer=first.optimizer))
    one, eight = (
        [record["train/loss"] for _, record in read_records(run / METRICS) if "train/loss" in record][:2]
        for run in (first.directory, config.directory)
    )
    np.testing.assert_allclose(eight, one, rtol=1e-4)


def test_adapters_are_compared_with_the_model_without_them(whole, rows, tmp_path, capsys):
    first, _ = whole
    config = config_of(
        rows, tmp_path / "lora", init_from=str(first.directory), adapter={"rank": 2}, steps=4,
        optimizer={"learning_rate": 1e-2, "warmup_steps": 1},
    )  # fmt: skip
    finished = train(config)
    records = [record for _, record in read_records(config.directory / METRICS) if "train/loss" in record]
    assert records[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert finished.scores.metrics["margin"] > 0
    said = capsys.readouterr().out
    assert "user       " in said and "reference  yes" in said


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, r"a preference has .* 'prompt', 'chosen' and 'rejected' \(there is prompt, chosen\)"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "fields 'chosen' and 'rejected' hold the same answer"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "field 'prompt' holds int, not a text or a list of messages"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "field 'chosen' holds no answer of the assistant"),
    ],
)  # fmt: skip
def test_a_bad_pair_is_named_with_file_and_line(tmp_path, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: {reason}"):
        prepare(config_of(path, tmp_path / "run").data, progress=False)


def test_a_schedule_that_passes_the_model_once_is_refused(rows, tmp_path):
    with pytest.raises(
        UserError, match=r"schedule: got '1f1b'; preferences take the model twice in a step; allowed: gpipe"
    ):
        config_of(rows, tmp_path / "run", mesh={"strategy": "pipeline", "schedule": "1f1b"})


def test_preferences_need_their_objective(rows, tmp_path):
    prepared = prepare(config_of(rows, tmp_path / "run").data, progress=False)
    with pytest.raises(
        UserError, match="'chat' is for texts, but the sources hold preferences; set it to 'preference'"
    ):
        Chat().check_data(prepared, 64)
