"""A device's profile: it round-trips, predictions by it are those made by hand, and its measurement runs."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import pytest

from benchmarks.cli import main
from benchmarks.sharding.devices import profile
from benchmarks.sharding.devices.profile import Product, Profile, Wire
from benchmarks.sharding.devices.targets import Target, host_target, parse_target
from benchmarks.sharding.predict.roofline import KEPT, kind_of, predict
from benchmarks.sharding.validation import calibrate, validate
from benchmarks.sharding.validation.cases import Case
from benchmarks.sharding.validation.fit import Parts, fitted, leave_one_out
from benchmarks.sharding.validation.quiet import quiet_rounds
from train.config import RunConfig
from train.parallel.mesh import MeshConfig
from train.program.hlo import Module
from train.program.work import products_of
from transformer.errors import UserError
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig

BY_HAND = Profile(
    kind="h100", device="NVIDIA H100", source="made up", date="2026-01-02T03:04:05+00:00", versions={"jax": "0"},
    products=(
        Product(dtype="float32", batch=1, smallest=100, flops=2e6, rate=1e9),
        Product(dtype="float32", batch=1, smallest=400, flops=2e6, rate=4e9),
        Product(dtype="float32", batch=8, smallest=100, flops=2e6, rate=5e8),
    ),
    curves={"elementwise": ((1e3, 1e9), (1e5, 3e9)), "transpose": ((1e3, 1e8),)}, gap=1e-3, transcendental=1e-6, arithmetic=1e-9,
    wires=(Wire(kind="all-reduce", devices=2, latency=1e-2, bandwidth=1e6),),
)  # fmt: skip

TEXT = """HloModule m
ENTRY %main (p: f32[100,100], q: f32[10,100]) -> f32[100,100] {
  %p = f32[100,100]{1,0} parameter(0)
  %q = f32[10,100]{1,0} parameter(1)
  %product = f32[100,100]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %e = f32[100,100]{1,0} exponential(%product)
  %turned = f32[100,100]{0,1} copy(%e)
  ROOT %sum = f32[100,100]{0,1} all-reduce(%turned), replica_groups={{0,1}}, to_apply=%add
}
"""


def at(one: Profile) -> Target:
    return dataclasses.replace(parse_target("h100:2"), dtype="float32", profile=one)


def test_a_profile_round_trips(tmp_path):
    path = tmp_path / "folder" / "h100.json"
    BY_HAND.write(path)
    assert profile.read(path) == BY_HAND
    target = at(BY_HAND)
    assert Target.from_data(json.loads(json.dumps(dataclasses.asdict(target)))) == target
    assert "NVIDIA H100 of 2026-01-02" in target.basis and "made up" in target.basis


def test_the_users_own_profile_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profile, "SHIPPED", tmp_path / "shipped")
    target = parse_target("h100:8")
    assert target.profiled().profile is None and "published figures" in target.profiled().basis
    BY_HAND.write(tmp_path / "shipped" / "h100.json")
    known = dataclasses.replace(target, dtype="float32").profiled()
    assert (known.matmul_efficiency, known.memory_efficiency) == (
        4e9 / target.chip.peak_float32,
        3e9 / target.chip.bandwidth,
    )
    assert target.profiled().matmul_efficiency == target.matmul_efficiency
    assert target.profiled().profile == BY_HAND
    own = dataclasses.replace(BY_HAND, device="mine")
    own.write(profile.own_path("h100"))
    assert target.profiled().profile == own


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"curves": {}, "products": [], "wires": []}'])
def test_a_damaged_profile_is_refused_with_its_file(tmp_path, text):
    path = tmp_path / "h100.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"h100\.json: not a profile of a device; delete the file") as refused:
        profile.read(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [{"rate": 0.0}, {"rate": "fast"}, {"flops": math.inf}, {"colour": 1}])
def test_a_profile_with_an_impossible_figure_is_refused(tmp_path, change):
    data = json.loads(json.dumps(dataclasses.asdict(BY_HAND)))
    data["products"][0] |= change
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="not a profile"):
        profile.read(path)


def test_rates_lie_between_those_measured():
    assert BY_HAND.rate("float32", 2e6, 100, 1) == 1e9
    # As far from both in the logarithm of the smallest dim: their geometric mean.
    assert BY_HAND.rate("float32", 2e6, 200, 1) == pytest.approx(2e9)
    assert BY_HAND.rate("float32", 2e6, 100, 4) == 5e8
    assert BY_HAND.rate("bfloat16", 2e6, 100, 1) is None
    assert [BY_HAND.bandwidth("elementwise", size) for size in (1, 1e3, 1e4, 1e5, 1e9)] == pytest.approx(
        [1e9, 1e9, 2e9, 3e9, 3e9]
    )
    assert BY_HAND.bandwidth("reduction", 1e9) == 3e9


def test_a_prediction_by_a_profile_is_that_made_by_hand():
    module = Module(TEXT)
    found = predict(module, at(BY_HAND), lambda group: ("wire", 1.0))
    assert found.compute == pytest.approx(2e6 / 1e9)
    through = 1e9 + 2e9 * math.log(80) / math.log(100)
    assert found.memory == pytest.approx(8e4 / through + 1e4 * 1e-6 + 8e4 / 1e8)
    assert found.gaps == pytest.approx(3e-3)
    assert found.exposed == pytest.approx(1e-2 + 4e4 / 1e6)
    assert found.seconds == pytest.approx(found.compute + found.memory + found.gaps + found.exposed)
    half = predict(module, at(dataclasses.replace(BY_HAND, product_efficiency=0.5)), lambda group: ("wire", 1.0))
    assert half.compute == pytest.approx(2 * found.compute) and half.memory == found.memory
    # Virtual devices of one machine take turns; memory is touched anew.
    shared = dataclasses.replace(BY_HAND, devices_share=True, fresh=1e6)
    turns = predict(module, at(shared), lambda group: ("wire", 1.0), temporary=KEPT)
    # Both devices' work together, at the rate of so much work.
    rate = BY_HAND.rate("float32", 2 * 2e6, 100, 1)
    assert turns.compute == pytest.approx(2 * 2e6 / rate)
    through = BY_HAND.bandwidth("elementwise", 2 * 8e4)
    memory = 8e4 / through + 1e4 * 1e-6 + 8e4 / 1e8
    assert turns.memory == pytest.approx(2 * (memory + KEPT / 1e6))
    # A block that the C library keeps is not.
    small = predict(module, at(shared), lambda group: ("wire", 1.0), temporary=KEPT - 1)
    assert small.memory == pytest.approx(2 * memory)
    assert turns.exposed == found.exposed


def test_products_have_their_shapes():
    def both(x, y):
        return jax.numpy.einsum("bij,bjk->bik", x, y)

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((3, 64, 32), (3, 32, 128))]
    module = Module(jax.jit(both).lower(*shapes).compile().as_text())
    found = [product for _, where, one in module.executed() for product in products_of(module, where, one)]
    assert [(one.flops, one.batch, one.smallest, one.dtype) for one in found] == [(2 * 3 * 64 * 32 * 128, 3, 32, "f32")]


def test_a_copy_that_turns_an_array_is_told_from_one_that_does_not():
    instructions = Module(TEXT.replace("%turned = f32[100,100]{0,1}", "%turned = f32[100,100]{1,0}"))
    kinds = {one.name: kind_of(instructions, where, one) for _, where, one in instructions.executed()}
    assert kinds["turned"] == "copy" and kinds["e"] == "elementwise"
    turned = Module(TEXT)
    assert {one.name: kind_of(turned, where, one) for _, where, one in turned.executed()}["turned"] == "transpose"


def test_a_fit_finds_what_the_parts_take():
    parts = [(1.0, 2.0, 0.1), (2.0, 1.0, 0.0), (3.0, 3.0, 0.2), (0.5, 2.0, 0.0)]
    steps = [Parts(p, m, rest, 1.25 * p + 0.8 * m + rest, 1.25 * p) for p, m, rest in parts]
    assert fitted(steps) == pytest.approx((1.25, 0.8))
    assert leave_one_out(steps, [True] * 4) == pytest.approx([0] * 4, abs=1e-9)
    # One that takes twice as long is only wrong where it is left out itself.
    steps.append(Parts(1.0, 1.0, 0.0, 4.1, 1.25))
    errors = leave_one_out(steps, [True] * 4 + [False])
    assert errors == pytest.approx([0, 0, 0, 0, -0.5], abs=1e-9)


def test_rounds_are_counted():
    timing = quiet_rounds(lambda: None, 6, 0.0)
    assert timing.rounds >= 6 and 0 < timing.fastest <= timing.seconds <= timing.slowest


def test_a_device_is_measured(tmp_path, monkeypatch, capsys):
    """By its real code, at sizes that take no time."""
    tiny = calibrate.Sizes(
        products=((1, 32, 32, 32), (2, 16, 8, 16)), dtypes=("float32",), bytes=(2**14, 2**19), chain=8, groups=(2,),
        sent=(2**8, 2**12),
    )  # fmt: skip
    monkeypatch.setattr(calibrate, "_LEAST", 1e-4)
    monkeypatch.setattr(calibrate, "_PATIENCE", 0.0)
    monkeypatch.setattr(calibrate, "sizes_of", lambda platform: tiny)
    # The devices of the tests are there already.
    monkeypatch.setattr(calibrate, "_virtual_wires", calibrate._wires)
    path = tmp_path / "cpu.json"
    assert main(["calibrate", "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert "matrix products in float32" in said and f"written to {path}" in said
    found = profile.read(path)
    assert found.kind == "cpu" and found.devices_share and found.fresh > 0 and found.gap > 0
    assert {one.kind for one in found.wires} == {
        "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    }  # fmt: skip
    assert set(found.curves) == set(profile.KINDS)


def test_steps_are_compared_with_their_predictions(monkeypatch):
    """As `plan --validate` compares its cases, in this process, on one device and on two."""
    monkeypatch.setattr(validate, "_PATIENCE", 0.0)
    monkeypatch.setattr(validate, "_SETTLED", 0.0)
    model = GPTConfig(vocab_size=64, max_length=16, num_layers=2, embed_dim=32, attention=SoftmaxConfig(num_heads=2))
    config = RunConfig(name="case", batch_size=4, model=model)
    alone = Case("alone", config)
    shared = Case("shared", dataclasses.replace(config, mesh=MeshConfig(strategy="fsdp")), devices=2)
    here = dataclasses.replace(BY_HAND, kind="cpu")
    found = []
    for case in (alone, shared):
        target = host_target(case.devices, here)
        one = validate.compared(case, target, 2, 0.0)
        assert one["measured_seconds"] > 0 and one["predicted_seconds"] > 0 and one["predicted_memory"] > 0
        assert sum(one["predicted_parts"].values()) == pytest.approx(one["predicted_seconds"])
        assert sum(one["measured_parts"].values()) == pytest.approx(one["measured_seconds"], rel=1e-3)
        assert (one["predicted_parts"]["collectives"] > 0) == (case is shared)
        found.append(one | {"disturbed": False})
    result = {"cases": found} | validate.judged(found)
    assert set(result["worst"]) == {"time", "memory"} and result["factors"]["products"] > 0
    lines = validate.sentences(result)
    assert lines[0].startswith("alone: ") and lines[-1].startswith("at worst, each case left out of the fit: time ")


def test_every_shipped_profile_can_be_read():
    for path in profile.SHIPPED.glob("*.json"):
        assert profile.read(path).kind == path.stem
