"""A compiled program's text: loops count as often as they run, collectives are found in every form, bytes and FLOPs are right."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.sharding.devices.targets import parse_target
from benchmarks.sharding.predict.roofline import hide, predict
from train.program.hlo import Module, stage_of
from train.program.work import bytes_of, flops_of
from transformer.layers.grouped_matmul import grouped_matmul
from transformer.loop_length import expected_trips


def text_of(function, *arguments):
    return Module(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.fixture(scope="module")
def line():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def laid_out(mesh, shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def test_a_loop_counts_as_often_as_it_runs(line):
    def repeated(x):
        def inner(total, _):
            return total + jax.lax.psum(jnp.sin(total), "x"), None

        def outer(total, _):
            return jax.lax.scan(inner, total, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    spec = PartitionSpec("x")
    mapped = jax.shard_map(repeated, mesh=line, in_specs=spec, out_specs=spec, check_vma=False)
    module = text_of(mapped, laid_out(line, (8, 100), "x"))
    (sum_,) = module.collectives()
    assert (sum_.kind, sum_.count, len(sum_.group)) == ("all-reduce", 15, 8)
    assert sum_.sent == 2 * 7 / 8 * 400
    assert sum_.total == 15 * sum_.sent


def test_a_gather_and_a_permutation_send_what_they_send(line):
    def both(x):
        whole = jax.lax.all_gather(x, "x", tiled=True)
        return jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]) + whole[:1]

    spec = PartitionSpec("x")
    mapped = jax.shard_map(both, mesh=line, in_specs=spec, out_specs=spec, check_vma=False)
    found = {one.kind: one for one in text_of(mapped, laid_out(line, (8, 25), "x")).collectives()}
    assert found["all-gather"].sent == 7 * 100
    assert found["collective-permute"].sent == 100


def test_groups_of_different_mesh_axes_are_distinguished():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("a", "b")
    for axis, group in (("a", (0, 4)), ("b", (0, 1, 2, 3))):
        mapped = jax.shard_map(
            lambda x, axis=axis: jax.lax.psum(x, axis),
            mesh=mesh,
            in_specs=spec,
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        (sum_,) = text_of(mapped, laid_out(mesh, (2, 4), "a", "b")).collectives()
        assert sum_.group == group


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0','axis_1'}", tuple(range(16))),
    ],
)
def test_every_notation_of_a_group(written, group):
    text = f"""HloModule m
ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %sum = f32[4]{{0}} all-reduce(%p), channel_id=1, {written}, to_apply=%add
}}
"""
    (sum_,) = Module(text).collectives()
    assert sum_.group == group


def test_an_unknown_notation_raises():
    text = """HloModule m
ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %sum = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups=torus(2), to_apply=%add
}
"""
    with pytest.raises(ValueError, match="have an unknown notation: .*torus"):
        Module(text).collectives()


def test_an_unrolled_loop_counts_by_what_it_adds():
    text = """HloModule m
%cond (c: (u32[], f32[4])) -> pred[] {
  %c = (u32[], f32[4]{0}) parameter(0)
  %end = u32[] constant(8)
  %n = u32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%n, %end), direction=LT
}
%body (b: (u32[], f32[4])) -> (u32[], f32[4]) {
  %b = (u32[], f32[4]{0}) parameter(0)
  %two = u32[] constant(2)
  %m = u32[] get-tuple-element(%b), index=0
  %next = u32[] add(%m, %two)
  %x = f32[4]{0} get-tuple-element(%b), index=1
  %send = f32[4]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %pair = (u32[], f32[4]{0}) tuple(%next, %send)
}
ENTRY %main (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %p = (u32[], f32[4]{0}) parameter(0)
  ROOT %loop = (u32[], f32[4]{0}) while(%p), condition=%cond, body=%body
}
"""
    module = Module(text)
    (sent,) = module.collectives()
    assert (sent.count, sent.sent, module.uncounted) == (4, 16, set())


def test_pieces_of_a_collective_are_one():
    text = """HloModule m
%piece (a: f32[4]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  ROOT %part = f32[8]{0} all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}
%rest (b: f32[4]) -> f32[8] {
  %b = f32[4]{0} parameter(0)
  ROOT %other = f32[8]{0} all-gather(%b), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}
ENTRY %main (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %first = f32[8]{0} fusion(%p), kind=kCustom, calls=%piece
  ROOT %second = f32[8]{0} fusion(%p), kind=kCustom, calls=%rest
}
"""
    (gather,) = Module(text).collectives()
    assert (gather.sent, gather.span, gather.asynchronous) == (16, ("first", "second"), True)


def test_flops_are_those_of_the_products():
    def products(x, y):
        def body(total, _):
            return jnp.tanh(total @ y), None

        return jax.lax.scan(body, x, None, length=6)[0].sum()

    shape = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    module = text_of(products, shape, shape)
    total = sum(times * flops_of(module, where, one) for times, where, one in module.executed())
    assert total == 6 * 2 * 32**3


def test_a_product_written_as_a_convolution_counts_each_pair_once():
    """As a TPU's compiler writes a batched product: the batch is a window of which all places but one meet holes."""
    text = """HloModule m
ENTRY %main (p: bf16[4,1024,16,128], q: bf16[4,16,1024,1024]) -> bf16[4,16,128,1024] {
  %p = bf16[4,1024,16,128]{3,1,2,0} parameter(0)
  %q = bf16[4,16,1024,1024]{3,2,1,0} parameter(1)
  ROOT %c = bf16[4,16,128,1024]{3,2,1,0} convolution(%p, %q), WINDOW
}
"""
    window = "window={size=4x16 stride=3x15 lhs_dilate=4x16}, dim_labels=0f1b_01oi->01bf"
    module = Module(text.replace("WINDOW", window))
    ((_, where, one),) = [each for each in module.executed() if each[2].opcode == "convolution"]
    assert flops_of(module, where, one) == 2 * 4 * 16 * 128 * 1024 * 1024


def test_communication_overlaps_with_computation_in_between():
    text = """HloModule m
ENTRY %main (p: f32[1000,1000]) -> f32[1000,1000] {
  %p = f32[1000,1000]{1,0} parameter(0)
  %start = f32[1000,1000]{1,0} all-reduce-start(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %work = f32[1000,1000]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = f32[1000,1000]{1,0} all-reduce-done(%start)
  ROOT %end = f32[1000,1000]{1,0} add(%work, %done)
}
"""
    target = dataclasses.replace(parse_target("h100:8"), latency=0.0)
    # It is bound by its three matrices.
    work = 3 * 4e6 / (target.memory_bandwidth * target.memory_efficiency)

    def at(bandwidth):
        return predict(Module(text), target, lambda group: ("wire", bandwidth))

    fast, slow = at(1e15), at(1e9)
    assert fast.exposed == pytest.approx(0, abs=1e-12) and fast.overlapped > 0
    assert slow.overlapped == pytest.approx(work)
    assert slow.exposed + slow.overlapped == pytest.approx(slow.links["wire"])
    assert slow.bound == "wire"
    assert fast.flops == 2 * 1000**3


def test_rounding_hides_no_more_than_is_sent():
    # 0.074 + (0.23 - 0.074) is more than 0.23.
    spent = {"first": 0.074, "second": 0.9}
    assert hide(0.23, ["start", "first", "second", "copy", "done"], ("start", "done"), spent) == 0.23
    assert spent["first"] == 0 and spent["second"] == pytest.approx(0.744)


def test_what_comes_from_the_host_takes_its_time():
    text = """HloModule m
ENTRY %main (p: f32[1000,1000], w: f32[1000,1000]) -> f32[1000,1000] {
  %p = f32[1000,1000]{1,0:T(8,128)S(5)} parameter(0)
  %w = f32[1000,1000]{1,0} parameter(1)
  %start = (f32[1000,1000]{1,0:T(8,128)}, f32[1000,1000]{1,0:T(8,128)S(5)}, u32[]{:S(2)}) copy-start(%p)
  %work = f32[1000,1000]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = f32[1000,1000]{1,0:T(8,128)} copy-done(%start)
  %near = (f32[1000,1000]{1,0:S(1)}, f32[1000,1000]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %here = f32[1000,1000]{1,0:S(1)} copy-done(%near)
  ROOT %end = f32[1000,1000]{1,0} add(%work, %done)
}
"""
    target = parse_target("v5e:2x4")
    found = predict(Module(text), target, lambda group: ("ICI", 1.0))
    assert found.links == {"PCIe": 4e6 / 16e9}
    assert found.overlapped > 0 and found.exposed + found.overlapped == pytest.approx(4e6 / 16e9)


def test_a_stage_is_named_by_the_model():
    def loss(x):
        with jax.named_scope("feed_forward"):
            return jnp.sum(jnp.tanh(x @ x))

    module = text_of(jax.grad(loss), jax.ShapeDtypeStruct((32, 32), jnp.float32))
    stages = {stage_of(one) for _, _, one in module.executed()}
    assert any("feed_forward" in stage for stage in stages)
    assert any(stage.startswith("backward") for stage in stages)


def test_a_loop_whose_length_the_data_decide_counts_as_often_as_is_expected():
    def run(x, length):
        def body(_, x):
            return jnp.tanh(x @ x)

        with jax.named_scope("outer"), expected_trips(2.5):
            return jax.lax.fori_loop(0, length, body, x)

    shapes = jax.ShapeDtypeStruct((32, 32), "float32"), jax.ShapeDtypeStruct((), "int32")
    module = Module(jax.jit(run).lower(*shapes).compile().as_text())
    work = sum(times * flops_of(module, where, one) for times, where, one in module.executed())
    assert work == 2.5 * 2 * 32**3 and not module.uncounted
    # The scope is not one of the model's.
    assert all("expected" not in stage_of(one) for _, _, one in module.executed())


def test_products_of_groups_count_all_their_blocks():
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1024, 16), "float32"), ((4, 16, 8), "float32"), ((4,), "int32"))
    ]
    module = Module(jax.jit(grouped_matmul).lower(*shapes).compile().as_text())
    work = sum(times * flops_of(module, where, one) for times, where, one in module.executed())
    # Eight blocks of 128 vectors, and half a block for each of the four groups.
    assert work == (8 + 2) * 2 * 128 * 16 * 8 and not module.uncounted


def test_a_fusion_that_reads_and_replaces_a_slice_counts_the_slice():
    module = Module("""HloModule m
%inside (a: f32[64,8], n: f32[2,8], i: s32[]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %n = f32[2,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %before = f32[2,8]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={2,8}
  %sum = f32[2,8]{1,0} add(%before, %n)
  ROOT %after = f32[64,8]{1,0} dynamic-update-slice(%a, %sum, %i, %zero)
}
ENTRY %main (a: f32[64,8], n: f32[2,8], i: s32[]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %n = f32[2,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[64,8]{1,0} fusion(%a, %n, %i), kind=kLoop, calls=%inside
}
""")
    (found,) = [(where, one) for _, where, one in module.executed() if one.opcode == "fusion"]
    # It reads the slice and the new part, and writes the slice; and the index.
    assert bytes_of(module, *found) == 3 * 2 * 8 * 4 + 4
