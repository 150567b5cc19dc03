"""A predicted step over time: its segments and its memory are those of a program written by hand, and of real programs."""

from __future__ import annotations

import dataclasses
import json
import re
from xml.etree import ElementTree

import jax
import pytest

from benchmarks.sharding.devices.targets import Target, parse_target
from benchmarks.sharding.planning import plan_report, timeline_report
from benchmarks.sharding.planning.entry import Entry
from benchmarks.sharding.planning.explain import explained
from benchmarks.sharding.planning.objective import Goal
from benchmarks.sharding.planning.plan import slim, summarised
from benchmarks.sharding.predict import ahead
from benchmarks.sharding.predict.analytic import Analysis
from benchmarks.sharding.predict.liveness import lifetimes
from benchmarks.sharding.predict.roofline import costs_of
from benchmarks.sharding.predict.timeline import KINDS, MOST, PARTS, SAMPLES, timeline_of
from benchmarks.sharding.predict.what_if import what_if
from benchmarks.workload import program_of
from tests.benchmarks.small import CONFIG
from train.parallel.mesh import MeshConfig
from train.program.hlo import Module

MB = 4e6
"""Bytes of each matrix below."""

BY_HAND = """HloModule m, is_scheduled=true, input_output_alias={ {1}: (0, {}, may-alias) }, entry_computation_layout={()->()}
%cond (c: (s32[], f32[1000,1000])) -> pred[] {
  %c = (s32[], f32[1000,1000]{1,0}) parameter(0)
  %end = s32[] constant(3)
  %n = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%n, %end), direction=LT
}
%body (b: (s32[], f32[1000,1000])) -> (s32[], f32[1000,1000]) {
  %b = (s32[], f32[1000,1000]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%b), index=0
  %x = f32[1000,1000]{1,0} get-tuple-element(%b), index=1
  %turned = f32[1000,1000]{1,0} transpose(%x), dimensions={1,0}, metadata={op_name="jit(s)/transpose(jvp(layers))/t"}
  %y = f32[1000,1000]{1,0} multiply(%x, %turned), metadata={op_name="jit(s)/transpose(jvp(layers))/mul"}
  ROOT %pair = (s32[], f32[1000,1000]{1,0}) tuple(%n, %y)
}
ENTRY %main (w: f32[1000,1000], t: f32[1000,1000]) -> (f32[1000,1000], f32[1000,1000]) {
  %w = f32[1000,1000]{1,0} parameter(0), metadata={op_name="state.params['w'].value"}
  %t = f32[1000,1000]{1,0} parameter(1), metadata={op_name="batch['t']"}
  %zero = s32[] constant(0)
  %first = f32[1000,1000]{1,0} dot(%w, %t), CONTRACTED, metadata={op_name="jit(s)/jvp(layers)/dot"}
  %start = f32[1000,1000]{1,0} all-reduce-start(%first), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %second = f32[1000,1000]{1,0} dot(%t, %t), CONTRACTED, metadata={op_name="jit(s)/jvp(loss)/dot"}
  %done = f32[1000,1000]{1,0} all-reduce-done(%start)
  %carried = (s32[], f32[1000,1000]{1,0}) tuple(%zero, %second)
  %loop = (s32[], f32[1000,1000]{1,0}) while(%carried), condition=%cond, body=%body, TRIPS, LOOP
  %grad = f32[1000,1000]{1,0} get-tuple-element(%loop), index=1
  %new = f32[1000,1000]{1,0} subtract(%w, %grad), metadata={op_name="jit(s)/optimizer/sub"}
  ROOT %results = (f32[1000,1000]{1,0}, f32[1000,1000]{1,0}) tuple(%done, %new)
}
""".replace("CONTRACTED", "lhs_contracting_dims={1}, rhs_contracting_dims={0}").replace(
    "TRIPS, LOOP", 'known_trip_count={"n":"3"}, metadata={op_name="jit(s)/transpose(jvp(layers))/while"}'
)


@pytest.fixture(scope="module")
def by_hand():
    """Two products of 2 ms, an all-reduce of 3 ms, of which the second product hides 2, a loop of 3 × (2/3 + 1) ms, and 1 ms."""
    chip = dataclasses.replace(parse_target("h100:8").chip, peak_bfloat16=1e12, bandwidth=12e9)
    target = Target("by-hand:8", chip, (1, 8), matmul_efficiency=1.0, memory_efficiency=1.0, latency=0.0)

    def link_of(group):
        return "wire", 2 * 7 / 8 * MB / 3e-3

    module = Module(BY_HAND)
    costs = costs_of(module, target, link_of)
    timeline = timeline_of(module, costs, compiler=5 * MB)
    return timeline | {"what_if": what_if(module, target, link_of, costs, timeline)}, costs


def test_segments_are_what_is_executed(by_hand):
    step, costs = by_hand
    found = [
        (one["stage"], one["phase"], one["trips"], *(round(1e3 * one[name], 6) for name in ("start", "end")))
        for one in step["segments"]
    ]
    assert found == [
        ("layers", "forward", 0, 0, 2),
        ("loss", "forward", 0, 2, 5),
        ("layers", "backward", 3, 5, 10),
        ("optimiser", "optimiser", 0, 10, 11),
    ]
    parts = [[round(1e3 * one["parts"][part], 6) for part in PARTS] for one in step["segments"]]
    assert parts == [[2, 0, 0, 0], [2, 0, 0, 1], [0, 5, 0, 0], [0, 1, 0, 0]]
    assert step["seconds"] == pytest.approx(costs.prediction().seconds)
    assert {name: round(1e3 * sum(by_part.values()), 6) for name, by_part in step["stages"].items()} == {
        "layers forward": 2, "loss forward": 3, "layers backward": 5, "optimiser": 1,
    }  # fmt: skip
    (sent,) = step["communication"]
    assert (sent["kind"], sent["link"], sent["count"]) == ("all-reduce", "wire", 1)
    times = [1e3 * sent[name] for name in ("start", "end", "seconds", "exposed")]
    assert times == pytest.approx([2, 5, 3, 1])


def test_memory_is_what_is_alive(by_hand):
    step, _ = by_hand
    memory = step["memory"]
    # In the loop: two arguments, the sum, what the loop carries and what its body transposes; both become the gradient.
    assert memory["peak"] == pytest.approx(5 * MB, abs=100)
    at_peak = {kind: round(count / MB, 3) for kind, count in memory["at_peak"].items() if count > 100}
    assert at_peak == {"parameters": 1, "other arguments": 1, "gradients": 2, "temporaries": 1}

    def at(seconds):
        index = max(index for index, time in enumerate(memory["times"]) if time <= seconds)
        return round(sum(kind[index] for kind in memory["kinds"].values()) / MB, 3)

    # The reduced sum is in place, and the result of the optimiser in the argument's memory.
    assert [at(1e-3), at(4e-3), at(7e-3), at(10.9e-3)] == [3, 4, 5, 4]


def test_what_would_change_the_step(by_hand):
    change = by_hand[0]["what_if"]
    assert change["link"] == {"name": "wire", "seconds": pytest.approx(10e-3)}
    # Products become bound by arithmetic alone, as before; all else takes half as long.
    assert change["memory"]["seconds"] == pytest.approx(8e-3)
    assert change["batch"]["seconds"] == pytest.approx(21e-3)
    assert change["batch"]["bytes"] == pytest.approx(6 * MB, abs=100)


def test_an_update_in_place_takes_no_memory_and_a_reused_operand_none_twice():
    head = """HloModule m
ENTRY %main (p: f32[1000,1000], i: s32[]) -> f32[1000,1000] {
  %p = f32[1000,1000]{1,0} parameter(0)
  %i = s32[] parameter(1)
"""
    row = "  %part = f32[1,1000]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,1000}\n"
    whole = "  %whole = f32[1000,1000]{1,0} copy(%p)\n"
    update = "  ROOT %new = f32[1000,1000]{1,0} dynamic-update-slice(%whole, %part, %i, %i)\n}\n"
    assert lifetimes(Module(head + row + whole + update)).peak().sum() == 2 * MB + 4000 + 4
    elementwise = (
        "  %twice = f32[1000,1000]{1,0} add(%whole, %whole)\n  ROOT %e = f32[1000,1000]{1,0} negate(%twice)\n}\n"
    )
    assert lifetimes(Module(head + whole + elementwise)).peak().sum() == 2 * MB + 4
    read_later = (
        "  %twice = f32[1000,1000]{1,0} add(%whole, %p)\n  ROOT %e = f32[1000,1000]{1,0} dot(%twice, %whole)\n}\n"
    )
    assert lifetimes(Module(head + whole + read_later)).peak().sum() == 4 * MB + 4
    # On a TPU an array may be in the chip's own memory.
    near = whole.replace("{1,0}", "{1,0:T(8,128)S(1)}") + elementwise
    assert lifetimes(Module(head + near), (1, 5)).peak().sum() == 2 * MB + 4


def compiled(**changes):
    """The small GPT's step as the CPU's compiler makes it, with its figures and a timeline for an H100's."""
    model = {name: changes.pop(name) for name in ("remat", "scan_layers") if name in changes}
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=2, **model), **changes)
    program = program_of(config, jax.devices())
    return config, ahead.examined(*ahead.compile_step(program), program.mesh, parse_target("h100:8"))


@pytest.fixture(scope="module")
def real():
    dp, fsdp = MeshConfig(strategy="dp"), MeshConfig(strategy="fsdp")
    return {
        "scanned": compiled(mesh=dp, scan_layers=True, remat="none"),
        "scanned, remat": compiled(mesh=fsdp, scan_layers=True, remat="full"),
        "unrolled": compiled(mesh=fsdp, scan_layers=False, remat="none"),
        "unrolled, remat": compiled(mesh=dp, scan_layers=False, remat="full"),
        "microbatches": compiled(mesh=fsdp, scan_layers=True, remat="none", microbatches=2),
    }


def test_segments_follow_each_other_and_add_up_to_the_step(real):
    for name, (_, found) in real.items():
        step = json.loads(json.dumps(found.timeline))
        ends = [0.0, *(one["end"] for one in step["segments"])]
        assert all(one["start"] == pytest.approx(end) for one, end in zip(step["segments"], ends, strict=False)), name
        assert ends[-1] == pytest.approx(found.prediction["seconds"]) == pytest.approx(step["seconds"])
        assert 4 <= len(step["segments"]) <= MOST and len(step["memory"]["times"]) <= SAMPLES
        for part, named in zip(PARTS, ("compute", "memory", "gaps", "exposed"), strict=True):
            for ones in ([one["parts"] for one in step["segments"]], step["stages"].values()):
                assert sum(parts[part] for parts in ones) == pytest.approx(found.prediction[named])
        sent = sum(one["seconds"] for one in step["communication"])
        assert sent == pytest.approx(found.prediction["exposed"] + found.prediction["overlapped"])
        assert {"layers forward", "layers backward", "loss forward", "optimiser"} <= step["stages"].keys()


def test_the_peak_is_near_the_compilers(real):
    for name, (_, found) in real.items():
        memory = found.timeline["memory"]
        assert memory["compiler"] == found.state + found.temporary
        assert 0.75 <= memory["peak"] / memory["compiler"] <= 1.25, name
        # Every argument is one of the three kinds of arguments.
        arguments = sum(memory["at_peak"][kind] for kind in KINDS[:3])
        assert arguments == pytest.approx(found.state, abs=1024)
        assert max(sum(kinds) for kinds in zip(*memory["kinds"].values(), strict=True)) == memory["peak"]
    scanned, remat = (real[name][1].timeline["memory"]["at_peak"] for name in ("scanned", "scanned, remat"))
    assert remat["activations"] < 0.3 * scanned["activations"]


def test_a_loop_over_layers_is_one_segment_and_one_over_microbatches_is_gone_into(real):
    for name in ("scanned", "microbatches"):
        loops = [one for one in real[name][1].timeline["segments"] if one["trips"]]
        assert {(one["stage"], one["phase"]) for one in loops} >= {("layers", "forward"), ("layers", "backward")}
        assert {one["trips"] for one in loops if one["stage"] == "layers"} == {2}
    turns = [one["turn"] for one in real["microbatches"][1].timeline["segments"]]
    assert turns.index("1 of 2") < turns.index("2 of 2") and turns[-1] == ""
    assert not any(one["turn"] for one in real["scanned"][1].timeline["segments"])


@pytest.fixture(scope="module")
def result(real):
    """A plan's result of these steps, of which one does not fit."""
    target = parse_target("h100:8")
    large = {"fits": False, "over": 1e6, "memory": 1e12}
    entries = [
        Entry(
            config,
            Analysis(config).estimate(config, target),
            dataclasses.replace(found, **(large if name == "unrolled" else {})),
        )
        for name, (config, found) in real.items()
    ]
    return summarised(CONFIG, target, entries, Goal(), len(entries), 1.0, False, 0)


def test_the_report_draws_the_steps_of_interest(result, tmp_path):
    chosen = timeline_report.chosen(result["layouts"])
    assert chosen[0] == "the best"
    assert "the nearest of those that do not fit" in chosen.values() and len(chosen) <= 4
    plan_report.write(result, tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    pictures = [ElementTree.fromstring(one) for one in re.findall(r"<figure>(<svg.*?</svg>)<figcaption>", page, re.S)]
    assert len(pictures) == 2 * len(chosen)
    assert "prefers-color-scheme: dark" in page and "Bound by" in page and "With twice the batch" in page
    times, memory = pictures[:2]
    step = result["layouts"][0]["compiled"]["timeline"]
    words = " ".join(text.text or "" for one in (times, memory) for text in one.iter() if text.tag.endswith("title"))
    assert all(one["stage"] in words for one in step["segments"])
    # Segments fill the width, and nothing is outside of it.
    rects = [one for one in times.iter() if one.tag.endswith("rect")]
    ends = [float(one.get("x")[:-1]) + float(one.get("width")[:-1]) for one in rects]
    assert max(ends) == pytest.approx(100, abs=0.5)
    points = [
        float(y) for one in memory.iter() if one.get("points") for y in re.findall(r",([-\d.]+)", one.get("points"))
    ]
    assert points and min(points) >= 0


def test_the_record_keeps_the_timelines_that_are_drawn(result):
    kept = [index for index, row in enumerate(slim(result)["layouts"]) if row["compiled"]["timeline"]]
    assert kept == sorted(timeline_report.chosen(result["layouts"]))
    assert all(row["compiled"]["timeline"] for row in result["layouts"])


def test_two_layouts_are_compared_stage_by_stage(result):
    found = explained(result, 1, 2)
    steps = [row["compiled"]["timeline"]["stages"] for row in result["layouts"][:2]]
    assert {row[0] for row in found["stages"]} == steps[0].keys() | steps[1].keys()
    assert any(line.startswith("By stage, layout 1 is ahead in ") for line in found["sentences"])
