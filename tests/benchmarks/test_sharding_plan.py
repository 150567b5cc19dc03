"""A plan: targets are told apart, layouts divide the model, estimates are of the real shapes, the answer is a config."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import jax
import pytest

from benchmarks.cli import main
from benchmarks.sharding.devices.targets import parse_target
from benchmarks.sharding.measuring.layouts import NAMES, layouts
from benchmarks.sharding.planning import plan
from benchmarks.sharding.planning.candidates import describe, neighbours
from benchmarks.sharding.planning.search import promising, search
from benchmarks.sharding.predict import ahead
from benchmarks.sharding.predict.analytic import Analysis
from benchmarks.sharding.predict.least import least
from benchmarks.units import amount, duration
from benchmarks.workload import program_of
from tests.benchmarks.small import CONFIG, MODEL, candidates
from train.config import load
from train.parallel.mesh import MESH_AXES, MeshConfig, make_mesh, use_mesh
from train.program.program import Program
from transformer.errors import UserError
from transformer.layers.mixture_of_experts import ExpertsConfig


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10:8", r"got 'h10:8'; allowed: v5e, .* Did you mean 'h100'"),
        ("h100", "allowed: h100: and a number of chips"),
        ("v5e:16", "a slice of v5e is a torus of 2 dims; the nearest: v5e:4x4$"),
        ("v5e:3x4", "whose first two numbers are even, since a host has 2x2 chips; the nearest: v5e:4x4$"),
        ("v5e:32x32", "up to 256 chips .* the nearest: v5e:16x16$"),
        ("h100:12", "allowed: up to 8 GPUs, or a multiple of 8; the nearest: h100:16$"),
        ("h100:2x16", "at most 8 GPUs that fast links connect; the nearest: h100:32$"),
        ("gb200:73", "allowed: up to 72 GPUs, or a multiple of 72; the nearest: gb200:72$"),
        ("h100:2x2x2", "or hosts x GPUs"),
        ("nowhere.yaml:8", "nowhere.yaml: no such"),
    ],
)
def test_an_unknown_target_is_refused_with_what_is_allowed(text, message):
    with pytest.raises(UserError, match=message):
        parse_target(text)


def test_targets_know_their_devices_and_links():
    assert parse_target("h100:16").shape == (2, 8)
    host, two, slice_ = parse_target("h100:8"), parse_target("h100:2x8"), parse_target("v5e:4x4")
    assert (host.topology, two.topology, slice_.topology) == ("1x1x8", "1x2x8", "v5e:4x4")
    assert host.link(((0, 0), (0, 7)))[0] == "NVLink"
    assert two.link(((0, 0), (1, 0))) == ("network", two.chip.network)
    # Two dims of a torus have the links of both; a dim that is no ring half of one.
    row, plane = slice_.link(((0, 0), (0, 3))), slice_.link(((0, 0), (3, 3)))
    assert plane[1] == 2 * row[1]
    assert parse_target("v5p:4x4x4").link(((0, 0, 0), (0, 0, 3)))[1] == 0.9 * parse_target("v5p:4x4x4").chip.link


def test_layouts_divide_the_model_and_the_batch():
    found = candidates(CONFIG, parse_target("h100:8"))
    assert len(found) == len(set(found)) > 30
    for one in found:
        sizes = dict(zip(MESH_AXES, one.mesh.sizes(8), strict=True))
        assert MODEL.attention.num_heads % sizes["tensor"] == 0
        parts = one.microbatches if sizes["pipeline"] == 1 else one.mesh.pipeline_microbatches
        assert CONFIG.batch_size % (sizes["data"] * sizes["fsdp"] * parts) == 0
    assert {one.mesh.strategy for one in found} == {"dp", "fsdp", "zero1", "tensor_sequence"}
    pipelines = [one for one in found if one.mesh.pipeline > 1]
    assert {(one.mesh.pipeline, one.mesh.schedule) for one in pipelines} >= {(2, "gpipe"), (2, "1f1b"), (4, "1f1b")}
    assert "1f1b of 8 microbatches" in " ".join(map(describe, pipelines))


def test_pipelines_do_not_fill_the_list():
    target = parse_target("h100:8")
    entries = search(CONFIG, target).entries
    chosen = promising(entries, target, 24)
    assert len(chosen) == 24
    assert 1 <= sum(entry.config.mesh.pipeline > 1 for entry in chosen) <= 4


def test_a_schedule_that_goes_back_early_keeps_less():
    analysis, target = Analysis(CONFIG), parse_target("h100:8")
    gpipe, early = (
        analysis.estimate(dataclasses.replace(CONFIG, mesh=MeshConfig(
            strategy="pipeline", pipeline=2, data=4, schedule=schedule, pipeline_microbatches=4)), target)
        for schedule in ("gpipe", "1f1b")
    )  # fmt: skip
    assert early.activations < gpipe.activations and early.arithmetic > gpipe.arithmetic
    assert early.parameters == gpipe.parameters


def test_every_strategy_has_a_layout_or_a_reason():
    found, refused = layouts({"": CONFIG}, 8)
    assert found.keys() | refused.keys() == set(NAMES)
    assert refused.keys() == {"expert"}
    mixture = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, mlp=ExpertsConfig(num_experts=4, dim=32)))
    assert "expert" in layouts({"": mixture}, 8)[0]
    with pytest.raises(UserError, match="got 'fdsp'; allowed: .* Did you mean 'fsdp'"):
        layouts({"": CONFIG}, 8, ["fdsp"])


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(strategy="zero1"), MeshConfig(strategy="fsdp"), MeshConfig(strategy="fsdp", fsdp=2, tensor=4)],
    ids=lambda mesh: f"{mesh.strategy} {mesh.tensor}",
)
def test_the_state_on_a_device_is_that_of_the_real_program(mesh):
    config = dataclasses.replace(CONFIG, mesh=mesh)
    estimate = Analysis(config).estimate(config, parse_target("h100:8"))
    real = make_mesh(mesh)
    with use_mesh(real, mesh.rules):
        abstract = Program(config, real).abstract

    def held(tree):
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    assert estimate.parameters == held(abstract.params)
    assert estimate.optimizer == held(abstract.opt_state)


def test_the_least_is_that_of_the_papers():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(strategy="fsdp"))
    sizes = dict.fromkeys(MESH_AXES, 1)
    assert least(config, sizes) == []
    (fsdp,) = least(config, sizes | {"fsdp": 8}, parameters=1000)
    assert fsdp.bytes == 7 / 8 * 1000 * (4 + 4 + 4)
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(strategy="zero1"))
    assert least(config, sizes | {"fsdp": 8}, parameters=1000)[0].bytes == 7 / 8 * 1000 * 8
    config = dataclasses.replace(CONFIG, mesh=MeshConfig())
    assert least(config, sizes | {"data": 4}, parameters=1000)[0].bytes == 2 * 3 / 4 * 4000
    (tensor,) = least(config, sizes | {"tensor": 4})
    assert tensor.bytes == 2 * 3 / 4 * (4 * 4 + 2) * 16 * 32 * 32 * 4


def test_an_answer_by_formula_is_a_config_that_loads(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    assert (
        main(["plan", str(config_file), "--target", "v5e:2x4", "--dir", str(tmp_path / "plans"), "--tokens", "1e9"])
        == 0
    )
    said = capsys.readouterr().out
    assert "this plan is by formula only: no compiler for tpu" in said
    assert "Best: " in said and "bound by" in said and "device-hours" in said
    assert "no measurements on this kind of device are on record" in said
    best = load(tmp_path / "plans" / "small_v5e_2x4.yaml")
    assert best.mesh.sizes(8) and best.batch_size == 16
    page = (tmp_path / "plans" / "small_v5e_2x4.html").read_text()
    assert "<svg" in page and re.search(r"<h2>\d+ layouts that fit", page)
    assert "<b>exposed</b>: the part of it that adds to the step" in page


def test_a_layout_that_does_not_fit_is_reported_with_its_memory(config_file, tmp_path, capsys, monkeypatch):
    small = dataclasses.replace(parse_target("h100:8").chip, memory=1e5)
    monkeypatch.setitem(plan.parse_target.__globals__["CHIPS"], "h100", small)
    assert main(["plan", str(config_file), "--target", "h100:8", "--analytic", "--dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "No layout fits. Nearest: " in said and "best config" not in said
    assert [path.suffix for path in tmp_path.glob("small_h100_8.*")] == [".html"]
    assert "layouts that fit" not in (tmp_path / "small_h100_8.html").read_text()


@pytest.mark.parametrize("tokens", ["-1", "nan", "inf", "many"])
def test_tokens_that_are_not_a_positive_number_are_refused(config_file, capsys, tokens):
    with pytest.raises(SystemExit) as refused:
        main(["plan", str(config_file), "--target", "h100:8", f"--tokens={tokens}"])
    assert refused.value.code == 2
    assert f"got '{tokens}'; allowed: a number above 0" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_planning(config_file, capsys):
    assert main(["plan", str(config_file), "--target", "h100:8", "--analytic", "--dir", "/dev/null/plans"]) == 2
    told = capsys.readouterr()
    assert "/dev/null/plans" in told.err and "layouts by formula" not in told.out


def test_plain_copies_are_always_among_the_compiled():
    target = parse_target("v5p:2x2x2")
    entries = search(CONFIG, target).entries
    assert "dp: data 8" in " ".join(describe(one.config) for one in promising(entries, target, 3))


def test_every_collective_takes_its_time():
    target = parse_target("h100:8")
    analysis = Analysis(CONFIG)
    slow = analysis.estimate(dataclasses.replace(CONFIG, mesh=MeshConfig(tensor=4)), target)
    once = analysis.estimate(CONFIG, target)
    assert slow.sending > (4 * MODEL.num_layers) * target.latency > once.sending


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (38.7e-6, "38.7 µs"),
        (0.58412, "584 ms"),
        (0.00216, "2.16 ms"),
        (1.612, "1.61 s"),
        (12.34, "12.3 s"),
        (820, "820 s"),
    ],
)
def test_times_have_something_to_read(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(17.18e9, "17.180 GB"), (44_800, "44.8 kB"), (3.2e6, "3.2 MB"), (12, "12 B")]
)
def test_amounts_have_something_to_read(count, text):
    assert amount(count) == text


def test_no_layout_divides_the_batch(config_file, capsys):
    assert main(["plan", str(config_file), "--target", "h100:8", "--analytic", "--batch-size", "3"]) == 2
    assert (
        "no layout over 8 devices divides batch_size 3; the nearest that one divides: 2 and 4"
        in capsys.readouterr().err
    )
    for size in ("2", "4"):
        config = dataclasses.replace(CONFIG, batch_size=int(size))
        assert candidates(config, parse_target("h100:8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CONFIG"], "give a config and a --target"),
        (["CONFIG", "--validate"], "--validate has its own cases"),
        (["--validate", "--only", "GPT"], "--validate has its own cases, and takes no --only"),
        (["--regret", "--compile"], "--regret has its own cases, and takes no --compile"),
        (["--regret", "--published"], "--regret and --published do not go together"),
        (["--published", "--install"], "--published has its own runs, and takes no --install"),
        (["--published", "--tokens", "1e9"], "--published has its own runs, and takes no --tokens"),
        (["CONFIG", "--target", "h100:8", "--only", "GPT"], "--only belongs to --regret and --published"),
    ],
)
def test_plan_refuses_arguments_that_do_not_go_together(config_file, capsys, arguments, message):
    assert main(["plan", *(str(config_file) if one == "CONFIG" else one for one in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_config_has_layouts(path):
    """Whatever its objective refuses."""
    config = dataclasses.replace(load(path), batch_size=16, microbatches=1)
    target = parse_target("h100:2")
    found = search(config, target).entries
    assert found and all(list(neighbours(entry.config, target)) for entry in found[:1])


def test_a_missing_compiler_is_refused_with_its_path(config_file, capsys):
    arguments = ["plan", str(config_file), "--target", "h100:8", "--compiler-python"]
    assert main([*arguments, "/nowhere/python"]) == 2
    assert "/nowhere/python: cannot be started" in capsys.readouterr().err


def test_a_step_is_compiled_and_read():
    """For the devices that are here, by the same code as for those that are not."""
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(strategy="fsdp"))
    program = program_of(config, jax.devices())
    compiled = ahead.examined(*ahead.compile_step(program), program.mesh, parse_target("h100:8"))
    assert compiled.fits and compiled.memory > compiled.state > 0
    sent = {one["kind"]: one for one in compiled.collectives}
    assert sent["all-gather"]["bytes"] > 0
    assert compiled.prediction["seconds"] > 0
    assert ahead.from_data(dataclasses.asdict(compiled)) == compiled


def test_a_process_that_compiles_says_what_is_wrong_with_it():
    import sys

    compiler = ahead.Compiler(parse_target("v5e:2x4"), sys.executable)
    try:
        answer = compiler.compile(CONFIG)
    finally:
        compiler.close()
    assert not answer.fits and "the compiler is not installed: libtpu" in answer.error


@pytest.mark.parametrize(
    "said",
    [
        "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.",
        "the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G)",
    ],
)
def test_a_refusal_for_memory_says_by_how_much(said):
    target = parse_target("v5e:2x4")
    refused = ahead.refused(RuntimeError(f"RESOURCE_EXHAUSTED: {said}"), 1.0, target)
    assert refused.memory == 20 * 2**30 and refused.over == pytest.approx(4.25 * 2**30)


@pytest.mark.parametrize("command", ["plan", "sharding"])
def test_a_compiler_that_compiles_nothing_is_an_error(command, config_file, tmp_path, capsys, monkeypatch):
    """By a real process that has no such compiler, which every compile meets."""
    import sys

    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("benchmarks.environments.compilers.find", lambda *_, **__: sys.executable)
    arguments = [command, str(config_file), "--target", "v5e:2x2", "--dir", str(tmp_path / "plans")]
    arguments += ["--candidates", "2", "--workers", "1"] if command == "plan" else ["--strategies", "dp,fsdp"]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert (
        "v5e:2x2: all 2 layouts failed to compile; the first error: UserError: the compiler is not installed"
        in said.err
    )
    assert len(said.err.strip().splitlines()) == 1 and "No layout fits" not in said.out
