"""The search of a plan: what is passed over could not have won, the neighbours of the best are tried, and picks are measured."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.cli import main
from benchmarks.sharding.devices.targets import Target, host_target, parse_target
from benchmarks.sharding.planning import search as searching
from benchmarks.sharding.planning.candidates import choices, describe, meshes, neighbours
from benchmarks.sharding.planning.entry import Entry
from benchmarks.sharding.planning.search import improved, search
from benchmarks.sharding.predict.analytic import Analysis
from benchmarks.sharding.validation import regret
from benchmarks.sharding.validation.cases import Case, regret_cases
from tests.benchmarks.small import CONFIG, MODEL, candidates
from tests.benchmarks.test_profile import BY_HAND
from train.config import load
from train.parallel.mesh import MeshConfig
from transformer.errors import UserError

TARGETS = ("h100:8", "v5e:2x4", "a10g:4")


@pytest.mark.parametrize("name", TARGETS)
def test_no_choice_on_a_mesh_is_faster_than_its_bound(name):
    target, analysis = parse_target(name), Analysis(CONFIG)
    found = 0
    for mesh in meshes(CONFIG, target):
        bound = searching._bound(CONFIG, mesh, target, analysis)
        seconds = [analysis.estimate(one, target).seconds for one in choices(CONFIG, mesh, target)]
        assert (bound is None) == (not seconds)
        if seconds:
            found += 1
            assert bound <= min(seconds) * (1 + 1e-9)
    assert found > 5


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_passed_over_could_not_have_won(name, monkeypatch):
    monkeypatch.setattr(searching, "ENOUGH", 5)
    target = parse_target(name)
    found, analysis = search(CONFIG, target), Analysis(CONFIG)
    whole = sorted(analysis.estimate(one, target).seconds for one in candidates(CONFIG, target))
    kept = sorted(entry.seconds for entry in found.entries)
    assert found.passed_over > 0 and len(kept) < len(whole)
    assert kept[:5] == pytest.approx(whole[:5])


def test_all_layouts_count_where_memory_is_to_be_least(monkeypatch):
    monkeypatch.setattr(searching, "ENOUGH", 5)
    target = parse_target("h100:8")
    found = search(CONFIG, target, "memory")
    assert found.passed_over == 0 and len(found.entries) == len(candidates(CONFIG, target))


def test_a_search_that_is_interrupted_keeps_what_it_found(monkeypatch, config_file, tmp_path, capsys):
    estimate, calls = Analysis.estimate, iter(range(10_000))

    def interrupted(self, config, target):
        if next(calls) == 300:
            raise KeyboardInterrupt
        return estimate(self, config, target)

    monkeypatch.setattr(Analysis, "estimate", interrupted)
    assert main(["plan", str(config_file), "--target", "h100:8", "--dir", str(tmp_path)]) == 0
    assert "Best: " in capsys.readouterr().out
    assert load(tmp_path / "small_h100_8.yaml").batch_size == 16


def test_a_neighbour_differs_in_one_choice():
    tpu, gpu = parse_target("v5e:2x4"), parse_target("h100:8")
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(strategy="fsdp", data=1, fsdp=8), microbatches=2)
    near = {describe(one).partition("; ")[2] for one in neighbours(config, tpu)}
    assert near == {
        "remat light, microbatches 2", "remat full, microbatches 2", "remat none, microbatches 1",
        "remat none, microbatches 2, unrolled", "remat none, microbatches 2, loss unchunked",
        "remat none, microbatches 2, optimiser on the host",
    }  # fmt: skip
    # On a GPU the few layers are a loop already, and its compiler leaves the optimiser's state on the device.
    on_gpu = {describe(one).partition("; ")[2] for one in neighbours(config, gpu)}
    assert near - on_gpu == {
        "remat none, microbatches 2, unrolled",
        "remat none, microbatches 2, optimiser on the host",
    }
    assert on_gpu < near


def test_the_best_layout_goes_on_to_better_neighbours():
    target, analysis = parse_target("v5e:2x4"), Analysis(CONFIG)
    slow = dataclasses.replace(
        CONFIG, mesh=MeshConfig(strategy="fsdp", data=1, fsdp=8), microbatches=2, model=dataclasses.replace(MODEL, remat="full")
    )  # fmt: skip
    first, seen = Entry(slow, analysis.estimate(slow, target)), []

    def examine(entries):
        seen.append(len(entries))
        return False

    found = improved([first], analysis, target, "time", examine)
    best = min(found, key=lambda entry: entry.seconds)
    assert best.seconds < first.seconds and len(found) == len({entry.config for entry in found}) == 1 + sum(seen)
    assert 1 < len(seen) <= searching.ROUNDS


def test_a_kind_of_model_has_its_own_choices():
    config = load("configs/bahdanau.yaml")
    (mesh,) = (one for one in meshes(config, parse_target("h100:1")))
    assert {one.model.remat for one in choices(config, mesh, parse_target("h100:1"))} == {"none", "full"}


def test_this_machine_is_a_target_once_it_is_measured(config_file, tmp_path, monkeypatch, capsys):
    """By its own compiler, in a process with as many virtual devices."""
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    arguments = [
        "plan",
        str(config_file),
        "--target",
        "cpu:2",
        "--candidates",
        "2",
        "--workers",
        "1",
        "--dir",
        str(tmp_path),
    ]
    assert main(arguments) == 2
    assert (
        "--target cpu: this machine's CPU has not been measured; run JAX_PLATFORMS=cpu manyheads-bench calibrate"
        in capsys.readouterr().err
    )
    dataclasses.replace(BY_HAND, kind="cpu", devices_share=True).write(tmp_path / "cache" / "profiles" / "cpu.json")
    monkeypatch.setattr(searching, "ROUNDS", 1)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "compiled by the target's compiler" in said and "Times rest on the profile of NVIDIA H100" in said
    assert (tmp_path / "small_cpu_2.yaml").exists()


@pytest.mark.parametrize("number", ["0", "", "4x4", "100"])
def test_virtual_devices_are_a_number(number):
    with pytest.raises(UserError, match=r"got 'cpu:.*'; allowed: 1 to 99 virtual devices, as in cpu:8"):
        parse_target(f"cpu:{number}")


def test_virtual_devices_share_the_processor():
    one, eight = (host_target(count, dataclasses.replace(BY_HAND, devices_share=True)) for count in (1, 8))
    assert one.turns == 1 and eight.turns == 8
    assert eight.peak_flops == one.peak_flops / 8 and eight.chip.memory == one.chip.memory / 8
    whole: Target = one.with_profile(one.profile)
    part: Target = eight.with_profile(eight.profile)
    assert part.matmul_efficiency == pytest.approx(whole.matmul_efficiency)


def test_a_pick_is_measured_against_other_layouts(monkeypatch):
    """In this process, with an interleaved pipeline among the layouts, whose step takes its state in stages."""
    monkeypatch.setattr(regret, "_PATIENCE", 0.0)
    monkeypatch.setattr(searching, "ROUNDS", 0)
    model = dataclasses.replace(MODEL, max_length=16, embed_dim=16)
    config = dataclasses.replace(CONFIG, model=model, batch_size=8)
    staged = dataclasses.replace(
        config, mesh=MeshConfig(pipeline=2, data=1, stages_per_device=2, pipeline_microbatches=8)
    )
    target = host_target(2, dataclasses.replace(BY_HAND, kind="cpu", devices_share=True))
    found = search(config, target)
    first = next(entry for entry in found.entries if describe(entry.config) == "dp: data 2; remat none, microbatches 1")
    last = Entry(staged, found.analysis.estimate(staged, target))
    monkeypatch.setattr(regret, "search", lambda *_: dataclasses.replace(found, entries=[first, last]))
    case = regret.measured(Case("small", config, devices=2), target, layouts=2, rounds=2, number=1)
    assert case["measured"] == 2 and case["pick"] == describe(first.config)
    assert case["best_seconds"] == min(one["measured_seconds"] for one in case["layouts"]) > 0
    assert case["regret"] == pytest.approx(case["pick_seconds"] / case["best_seconds"] - 1) and case["regret"] >= 0
    assert "the plan's pick (dp: data 2; remat none, microbatches 1) takes" in regret.sentence(case)
    assert case["plain_regret"] == case["regret"]
    summed = regret.summed([case | {"regret": loss} for loss in (0.01, 0.04, 0.07)])
    assert summed["worst"] == 0.07 and summed["within_5_percent"] == 2
    assert regret.total(summed | {"cases": [case] * 3}).startswith(
        "within 5% of the best layout in 2 of 3 cases, at worst 7.0%"
    )


def test_cases_are_chosen_by_their_beginnings():
    titles = [case.title for case in regret_cases("cpu", 1)]
    assert len(titles) >= 10
    assert regret._chosen(titles, ["wide", "BERT on two"]) == ["wide GPT on two", "BERT on two", "wide GPT on eight"]
    with pytest.raises(UserError, match=r"--only: got 'Bert'; allowed: GPT on one; .*"):
        regret._chosen(titles, ["Bert"])
    assert main(["plan", "--only", "GPT"]) == 2
