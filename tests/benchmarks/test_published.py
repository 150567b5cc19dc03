"""Training runs that others published: what is in their file, one of them predicted through the command, and the fit."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from benchmarks import record
from benchmarks.cli import main
from benchmarks.report import report
from benchmarks.sharding.devices.targets import parse_target
from benchmarks.sharding.predict.analytic import EFFICIENCIES, Analysis, basis
from benchmarks.sharding.predict.shape import repeated
from benchmarks.sharding.validation import published
from benchmarks.sharding.validation.published_fit import Step, by_halves, fitted, leave_one_out
from benchmarks.sharding.validation.published_runs import published_runs
from tests.benchmarks.small import CONFIG, MODEL
from train.parallel.mesh import MESH_AXES, MeshConfig
from transformer.models.families import count_parameters, flops_per_token

SMALL = "llm.c-a100-124m"


@pytest.fixture(scope="module")
def runs():
    return published_runs()


def test_every_run_states_its_source_and_builds(runs):
    assert len({run.name for run in runs}) == len(runs) >= 20
    for run in runs:
        repository, commit, *_ = run.source.split()
        assert repository.count("/") == 1 and len(commit.rstrip(",")) == 12, run.name
        assert int(commit.rstrip(","), 16) and ("." in run.source.split(", ", 1)[1]), run.name
        assert run.config.model.dtype == "bfloat16" and run.figure > 0 and run.seconds > 0, run.name
        sizes = dict(zip(MESH_AXES, run.config.mesh.sizes(run.target.num_devices), strict=True))
        # What its own mesh divides, as a real run would have to; the fit has no pipelines.
        rows = sizes["data"] * sizes["fsdp"] * run.config.microbatches
        assert run.config.batch_size % rows == 0 and sizes["pipeline"] == 1, run.name


def test_models_have_the_parameters_that_their_sources_state(runs):
    stated = {run.config.model: run for run in runs if run.parameters}
    assert len(stated) >= 8
    for model, run in stated.items():
        assert count_parameters(model) == run.parameters, run.name


def test_a_unit_becomes_seconds(runs):
    named = {run.name: run for run in runs}
    assert named["jax-toolbox-h100-llama-2-7b"].seconds == 0.721
    by_tokens = named["maxtext-v6e-8-llama-3.1-8b"]
    # Its log states both: 3.443 s and 7138.890 tokens/s per device.
    assert by_tokens.seconds == pytest.approx(3.443, rel=1e-3)
    by_flops = named["maxtext-h100-8-llama-2-7b"]
    model = by_flops.config.model
    attention = 6 * model.num_layers * 4096 * model.embed_dim
    flops = 4 * 4096 * (6 * count_parameters(model) + attention)
    assert by_flops.seconds == pytest.approx(flops / 492e12, rel=1e-3)


def test_one_run_is_predicted_by_formula(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert main(["plan", "--published", "--only", SMALL]) == 0
    said = capsys.readouterr().out
    assert SMALL in said and "300 ms" in said and "by formula: 1 of 1 within 20%" in said
    # Only all of them are a record.
    assert not list(tmp_path.iterdir())


def test_a_result_becomes_rows_of_the_report(tmp_path, runs):
    few = [run for run in runs if run.name.startswith(("llm.c-a100", "maxtext-v6e-8"))]
    result = published.compared(few)
    record.save("published", "manyheads-bench plan --published", result, show=False, folder=tmp_path)
    assert set(result["families"]) == set(result["fits"]) == {"TPU", "NVIDIA"}
    row = result["published"][0]
    estimate = row["estimate"]
    assert row["error"] == pytest.approx(estimate["seconds"] / row["seconds"] - 1)
    assert row["basis"] == basis(parse_target(row["target"]))
    count = sum(abs(one["error"]) <= 0.2 for one in result["published"])
    assert f"steps predicted within 20%, by formula | {count} of 5 |" in report(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--published", "--only", "llm.c-a100-125m"], f"got 'llm.c-a100-125m'; allowed: .* Did you mean '{SMALL}'"),
        (["--published", "CONFIG"], "--published has its own runs"),
        (["--published", "--target", "h100:8"], "--published has its own runs"),
        (["--compile", "CONFIG"], "--compile belongs to --published"),
    ],
)
def test_what_is_refused(arguments, message, config_file, capsys):
    assert main(["plan", *(str(config_file) if one == "CONFIG" else one for one in arguments)]) == 2
    assert _matches(message, capsys.readouterr().err)


def _matches(message, text):

    return re.search(message, text) is not None and text.count("\n") == 1


def test_a_fit_finds_the_efficiencies_that_made_the_figures():
    made = (0.8, 0.4)
    parts = [(1.0, 0.05, 0.0, 0.0), (1.0, 0.3, 2.0, 0.1), (0.2, 0.4, 0.1, 0.0), (0.5, 0.1, 0.0, 0.3)]
    steps = [Step(*part, published=1.0) for part in parts]
    steps = [Step(*part, published=1 + step.error(made)) for part, step in zip(parts, steps, strict=True)]
    assert fitted(steps) == pytest.approx(made, rel=1e-3)
    assert max(map(abs, leave_one_out(steps))) < 1e-2 and max(map(abs, by_halves(steps))) < 1e-2


def test_the_shipped_efficiencies_are_those_of_the_record():
    path = record.RESULTS / "published_cpu.json"
    fits = json.loads(path.read_text())["result"]["fits"]
    for platform, family in published.FAMILIES.items():
        assert EFFICIENCIES[platform] == pytest.approx((fits[family]["products"], fits[family]["memory"]), abs=0.006)


def test_a_step_of_the_fit_is_the_estimate(runs):
    (run,) = (one for one in runs if one.name == SMALL)
    estimate = published.estimated([run])[SMALL]
    used = EFFICIENCIES["gpu"]
    assert Step.of(estimate, used, run.seconds).error(used) == pytest.approx(estimate.seconds / run.seconds - 1)


def test_remat_full_repeats_all_but_the_last_product_and_the_head():
    whole, head = flops_per_token(MODEL, 32), 2 * MODEL.embed_dim * MODEL.vocab_size
    last = MODEL.num_layers * 2 * 4 * MODEL.embed_dim**2
    assert repeated(MODEL, 32) == pytest.approx((whole - head - last) / whole)

    after = dataclasses.replace(MODEL, norm_first=False)
    assert repeated(after, 32) == pytest.approx((whole - head) / whole)


def test_a_tensor_axis_overlaps_on_a_tpu_and_shards_the_stream_where_the_strategy_does():

    analysis = Analysis(CONFIG)
    replicated, sharded = (
        dataclasses.replace(CONFIG, mesh=MeshConfig(strategy=strategy, tensor=4, fsdp=2))
        for strategy in ("fsdp_tensor", "tensor_sequence")
    )
    on_tpu, on_gpu = (analysis.estimate(replicated, parse_target(name)) for name in ("v5e:2x4", "h100:8"))
    assert on_tpu.hideable == on_tpu.sent and on_gpu.hideable < on_gpu.sent
    target = parse_target("h100:8")
    assert analysis.estimate(sharded, target).activations < analysis.estimate(replicated, target).activations
