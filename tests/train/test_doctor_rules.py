"""What `manyheads doctor` makes of traces and programs in the style of a GPU and a TPU, and what it advises."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import pytest

from train.config import RunConfig, load
from train.examine.doctor.advice import Seen, advise
from train.examine.doctor.breakdown import Breakdown, Spent, break_down
from train.examine.doctor.events import Event, divided, read_events
from train.examine.doctor.operations import (
    ATTENTION,
    COLLECTIVE,
    COPY,
    ELEMENTWISE,
    MATRIX,
    NO_SCOPE,
    Operation,
    operations_of,
    unknown,
)
from train.examine.doctor.peaks import Peaks, peaks_of
from train.examine.doctor.report import rate
from train.program.hlo import Module
from train.report.attention_backends import Choice
from transformer.errors import UserError
from transformer.models.gpt import GPTConfig

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
PEAKS = Peaks(flops=1e15, bandwidth=1e12)

# A GPU's step in small: library calls, Triton's product, a loop over two layers, fusions, and a sum that overlaps with a product.
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={()->()}

%fused_gelu (param_0: bf16[1024,1024]) -> bf16[1024,1024] {
  %param_0 = bf16[1024,1024]{1,0} parameter(0)
  ROOT %tanh.1 = bf16[1024,1024]{1,0} tanh(%param_0), metadata={op_name="jit(step)/jvp(layers)/while/body/feed_forward/tanh"}
}

%triton_gemm_computation (parameter_0: bf16[1024,1024], parameter_1: bf16[1024,1024]) -> bf16[1024,1024] {
  %parameter_0 = bf16[1024,1024]{1,0} parameter(0)
  %parameter_1 = bf16[1024,1024]{1,0} parameter(1)
  ROOT %dot.7 = bf16[1024,1024]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_transpose (param_0.1: bf16[1024,1024]) -> bf16[1024,1024] {
  %param_0.1 = bf16[1024,1024]{1,0} parameter(0)
  ROOT %transpose.1 = bf16[1024,1024]{0,1} transpose(%param_0.1), dimensions={1,0}
}

%body (carry: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %carry = (s32[], bf16[1024,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[1024,1024]{1,0} get-tuple-element(%carry), index=1
  %cublas-gemm.1 = (bf16[1024,1024]{1,0}, s8[4194304]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(step)/jvp(layers)/while/body/feed_forward/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %y = bf16[1024,1024]{1,0} get-tuple-element(%cublas-gemm.1), index=0
  %loop_tanh_fusion = bf16[1024,1024]{1,0} fusion(%y), kind=kLoop, calls=%fused_gelu
  ROOT %tuple.1 = (s32[], bf16[1024,1024]{1,0}) tuple(%i, %loop_tanh_fusion)
}

%condition (carry.1: (s32[], bf16[1024,1024])) -> pred[] {
  %carry.1 = (s32[], bf16[1024,1024]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p: bf16[1024,1024], q: bf16[2,512,8,64]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  %q = bf16[2,512,8,64]{3,2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[1024,1024]{1,0}) tuple(%zero, %p)
  %while.1 = (s32[], bf16[1024,1024]{1,0}) while(%start), condition=%condition, body=%body, \
metadata={op_name="jit(step)/jvp(layers)/while"}, backend_config={"known_trip_count":{"n":"2"}}
  %out = bf16[1024,1024]{1,0} get-tuple-element(%while.1), index=1
  %cudnn-fmha.1 = (bf16[2,512,8,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", \
metadata={op_name="jit(step)/jvp(layers)/attention/attend/dot_product_attention_fwd"}, backend_config={"mask_type":"CAUSAL"}
  %all-reduce-start = bf16[1024,1024]{1,0} all-reduce-start(%out), replica_groups={{0,1}}, to_apply=%fused_gelu, \
metadata={op_name="jit(step)/transpose(jvp(layers))/attention/dot_general"}
  %gemm_fusion_dot.7 = bf16[1024,1024]{1,0} fusion(%out, %p), kind=kCustom, calls=%triton_gemm_computation, \
metadata={op_name="jit(step)/transpose(jvp(layers))/checkpoint/rematted_computation/feed_forward/dot_general"}
  %all-reduce-done = bf16[1024,1024]{1,0} all-reduce-done(%all-reduce-start)
  %copy.3 = bf16[1024,1024]{0,1} copy(%all-reduce-done)
  ROOT %loop_transpose_fusion = bf16[1024,1024]{0,1} fusion(%copy.3), kind=kLoop, calls=%fused_transpose, \
metadata={op_name="jit(step)/(optimizer/transpose:jvp(loss)/psum)"}
}
"""


def event(name, start, duration, op=None, **stats):
    stats |= {} if op is None else {"hlo_op": op, "hlo_module": "jit_step"}
    return types.SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=list(stats.items()))


def plane(name, **lines):
    return types.SimpleNamespace(
        name=name, lines=[types.SimpleNamespace(name=line, events=events) for line, events in lines.items()]
    )


def gpu(number):
    """A step of 1000 ns: 100 ns of them idle, and 100 of the sum's 150 behind a product."""
    computing = [
        event("sm90_xmma_gemm", 0, 150, "cublas-gemm.1"), event("loop_tanh_fusion", 150, 50, "loop_tanh_fusion"),
        event("sm90_xmma_gemm", 200, 150, "cublas-gemm.1"), event("loop_tanh_fusion", 350, 50, "loop_tanh_fusion"),
        event("cudnn_generated_fort_native_sdpa", 400, 200, "cudnn-fmha.1"),
        event("gemm_fusion_dot_7", 600, 100, "gemm_fusion_dot.7"),
        event("copy_3", 850, 50, "copy.3"), event("loop_transpose_fusion", 900, 100, "loop_transpose_fusion"),
    ]  # fmt: skip
    sending = [event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 600, 150, "all-reduce-start")]
    transfers = [event("MemcpyH2D", 450, 100)]
    lines = {"Stream #13(Compute)": computing, "Stream #20(Nccl)": sending, "Stream #15(MemcpyH2D)": transfers}
    # A tool may have derived this line from the streams.
    return plane(f"/device:GPU:{number}", **lines, **{"XLA Ops": computing})


def host():
    return plane("/host:CPU", python=[event("Thunk", 0, 5000, "cublas-gemm.1")])


def test_a_step_of_two_gpus():
    b = break_down(PROGRAM, read_events([host(), gpu(0), gpu(1)], "gpu"), 1, PEAKS)
    nanoseconds = {name: round(1e9 * total.seconds) for name, total in b.categories().items()}
    assert nanoseconds == {MATRIX: 400, ATTENTION: 200, COLLECTIVE: 50, COPY: 150, ELEMENTWISE: 100}
    assert (round(1e9 * b.step), round(1e9 * b.idle), round(1e9 * b.hidden), b.devices) == (1000, 100, 100, 2)
    # A copy without a scope has that of what reads it.
    scopes = {name: round(1e9 * total.seconds) for name, total in b.scopes().items()}
    assert scopes == {
        "layers/feed_forward": 500, "layers/attention/attend": 200, "optimizer": 150, "layers/attention": 50, NO_SCOPE: 0,
    }  # fmt: skip
    phases = b.scopes()["layers/feed_forward"].by_phase
    assert round(1e9 * phases["recomputed"]) == 100 and round(1e9 * phases["forward"]) == 400


def test_what_the_host_launches_is_not_what_a_gpu_runs():
    with pytest.raises(UserError, match="NVIDIA's driver may leave profiling to administrators"):
        break_down(PROGRAM, read_events([host(), plane("/device:GPU:0")], "gpu"), 1, PEAKS)


def test_the_roofline_of_each_operation():
    b = break_down(PROGRAM, read_events([gpu(0)], "gpu"), 1, PEAKS)
    by_name = {one.operation.name: one for one in b.spent}
    gemm, attention = by_name["cublas-gemm.1"], by_name["cudnn-fmha.1"]
    assert gemm.times == 2 and gemm.operation.flops == 2 * 1024**3
    # The memory is slow: the bytes of operands and results bound it.
    assert gemm.least == pytest.approx(2 * gemm.operation.bytes / PEAKS.bandwidth)
    assert attention.operation.flops == 2 * 2 * 2 * 8 * 512 * 512 * 64 * 0.5
    assert by_name["loop_transpose_fusion"].least == pytest.approx(2 * 2 * 1024**2 / PEAKS.bandwidth)
    assert by_name["all-reduce-start"].least is None
    (several,) = (total for one, total in b.alike().items() if one.name == "cublas-gemm.1")
    assert several.operations == 1 and several.times == 2


def test_a_tpu_names_operations_by_their_text():
    operations = [
        event("%while.1 = (s32[], bf16[1024,1024]{1,0}) while(%start)", 0, 400),
        event("%loop_tanh_fusion = bf16[1024,1024]{1,0} fusion(%y)", 0, 100),
        event("%copy.3 = bf16[1024,1024]{0,1} copy(%x)", 300, 100),
    ]
    lines = {"Steps": [event("0", 0, 400)], "XLA Modules": [event("jit_step(1)", 0, 400)], "XLA Ops": operations}
    b = break_down(PROGRAM, read_events([plane("/device:TPU:0", **lines)], "tpu"), 1, PEAKS)
    # The loop itself is not counted, only what runs in it.
    assert {one.operation.name for one in b.spent} == {"loop_tanh_fusion", "copy.3"}
    assert round(1e9 * b.idle) == 200


def test_an_operation_on_a_cpu_ends_with_the_last_of_its_threads():
    started = event("dot.7", 10, 5, "dot.7", _p=3, device_ordinal=1)
    planes = [plane("/host:CPU", one=[started], other=[event("end: dot.7", 90, 10, _c=3)])]
    assert read_events(planes, "cpu") == [Event("dot.7", "jit_step", 1, 10, 100)]


def test_time_is_divided_among_what_runs():
    events = [Event(name, "", 0, start, end) for name, start, end in (("a", 0, 4), ("b", 2, 6), ("c", 5, 9))]
    assert divided(events, [0, 0, 1], 0, 10) == ([3.0, 3.0, 3.0], 1.0)
    assert divided(events, [0, 0, 0], 1, 5) == ([2.0, 2.0, 0.0], 0.0)
    assert divided([], [], 0, 10) == ([], 10)


def test_kernels_that_are_not_of_the_step():
    names = {
        "MemcpyD2H": COPY, "ncclDevKernel_AllGather": COLLECTIVE, "all-to-all.3": COLLECTIVE, "flash_attention_fwd": ATTENTION,
        "ampere_bf16_gemm": MATRIX, "input_reduce_fusion": ELEMENTWISE,
    }  # fmt: skip
    assert {name: unknown(name).category for name in names} == names
    with pytest.raises(UserError, match="the trace holds no operation of the step"):
        break_down(PROGRAM, [Event("MemcpyD2H", "", 0, 0, 1)], 1, PEAKS)


def test_names_of_operations():
    operations = operations_of(Module(PROGRAM))
    assert operations["gemm_fusion_dot.7"].primitive == "dot_general" and operations["copy.3"].primitive == "copy"
    assert operations["while.1"].contains and operations["loop_tanh_fusion"].times == 2


def seen(spent, **changes):
    """A step of 100 ms on a GPU; `spent`: (category, scope, pass, milliseconds) of each operation."""
    times = [
        Spent(Operation(f"op.{number}", "op", category, scope, phase, 1, 0.0, 0.0), ms / 1e3, 1, ms / 1e3)
        for number, (category, scope, phase, ms) in enumerate(spent)
    ]
    idle = 0.1 - sum(one.seconds for one in times)
    model = GPTConfig(vocab_size=256, dtype="bfloat16", **changes.pop("model", {}))
    defaults = {
        "config": RunConfig(name="seen", model=model), "device": H100, "breakdown": Breakdown(0.1, idle, 0.0, 1, tuple(times)),
        "peaks": PEAKS, "choices": (), "seconds": 0.1, "waiting": 0.0, "padding": 0.0, "memory": (70e9, 80e9), "kept": 0.0,
    }  # fmt: skip
    return Seen(**defaults | changes)


PRODUCTS = (MATRIX, "layers/feed_forward", "forward", 100.0)


def only(found):
    (advice,) = advise(found)
    return advice


def test_nothing_to_change():
    assert advise(seen([PRODUCTS])) == []


def test_attention_without_a_fused_kernel():
    choice = Choice("12 heads of 64", "xla", ("cudnn: heads of 64 need bfloat16",), (), ())
    slow = seen([(MATRIX, "layers", "forward", 60.0), (ATTENTION, "layers/attend", "forward", 40.0)], choices=(choice,))
    assert only(slow).gain == pytest.approx(0.04) and "cudnn: heads of 64 need bfloat16" in only(slow).reason
    assert advise(dataclasses.replace(slow, device=types.SimpleNamespace(platform="cpu", device_kind="cpu"))) == []


def test_float32_on_a_gpu():
    found = seen([(MATRIX, "layers", "forward", 80.0), (ELEMENTWISE, "layers", "forward", 20.0)])
    config = dataclasses.replace(found.config, model=dataclasses.replace(found.config.model, dtype="float32"))
    advice = only(dataclasses.replace(found, config=config))
    assert advice.change == "model.dtype bfloat16"
    assert advice.gain == pytest.approx(0.08 * (1 - 494 / 989) + 0.01)
    old = types.SimpleNamespace(platform="gpu", device_kind="Tesla V100-SXM2-16GB")
    assert advise(dataclasses.replace(found, config=config, device=old)) == []


def test_recomputed_though_there_is_memory():
    spent = [(MATRIX, "layers", "forward", 75.0), (MATRIX, "layers", "recomputed", 25.0)]
    found = seen(spent, model={"remat": "full"}, memory=(50e9, 80e9), kept=10e9)
    assert only(found).change == "model.remat none" and only(found).gain == pytest.approx(0.025)
    assert advise(dataclasses.replace(found, kept=20e9)) == []


def test_copies_of_a_scan():
    spent = [(MATRIX, "layers", "forward", 90.0), (COPY, "layers", "forward", 10.0)]
    scanned = seen(spent, model={"scan_layers": True})
    assert only(scanned).change == "model.scan_layers false" and only(scanned).gain == pytest.approx(0.01)
    assert advise(seen(spent, model={"scan_layers": False})) == []
    assert advise(seen(spent, model={"scan_layers": True, "num_layers": 48})) == []


def test_other_copies_are_named():
    copies = [(COPY, "layers/attention", "forward", 12.0), (MATRIX, "layers", "forward", 88.0)]
    assert "most of them in layers/attention" in only(seen(copies)).reason


def test_idle_time_by_its_cause():
    busy = [(MATRIX, "layers", "forward", 60.0)]
    waits = only(seen(busy, waiting=0.035))
    assert "data.num_workers" in waits.change and waits.gain == pytest.approx(0.035)
    starved = only(seen(busy, memory=(10e9, 80e9)))
    assert starved.change == "batch_size 64" and starved.gain == pytest.approx(0.02)
    assert "idle for 40%" in starved.reason
    # There is no room for a larger batch; and without the profiler there is no idle time.
    assert advise(seen(busy)) == [] == advise(seen(busy, memory=(10e9, 80e9), seconds=0.06))


def test_a_batch_that_is_too_small():
    half = seen([(MATRIX, "layers", "forward", 50.0), (ELEMENTWISE, "optimizer", "update", 50.0)], memory=(1e9, 80e9))
    slow = dataclasses.replace(half.breakdown.spent[0], least=0.0175)
    found = dataclasses.replace(
        half, breakdown=dataclasses.replace(half.breakdown, spent=(slow, half.breakdown.spent[1]))
    )
    advice = only(found)
    assert "optimiser takes 50%" in advice.reason and "matrix products reach 35% of the peak" in advice.reason
    # Half of the optimiser, and products at twice their speed.
    assert advice.gain == pytest.approx(0.025 + 0.025)
    parts = dataclasses.replace(found.config, microbatches=4)
    assert only(dataclasses.replace(found, config=parts)).change == "microbatches 2"
    # The next smaller divisor, which also divides the batch.
    odd = dataclasses.replace(found.config, batch_size=15, microbatches=15)
    assert only(dataclasses.replace(found, config=odd)).change == "microbatches 5"


def test_communication_and_padding():
    spent = [(MATRIX, "layers", "forward", 80.0), (COLLECTIVE, "layers", "backward", 20.0)]
    first, second = advise(seen(spent, padding=0.1))
    assert first.change.startswith("another mesh.strategy") and first.gain == pytest.approx(0.02)
    assert second.change == "a smaller length" and second.gain == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "change"),
    [("translate_en_fr_recurrent", "a larger objective.max_shapes"),
     ("translate_en_fr_small", "a larger objective.max_shapes, or data.packing documents")],
)  # fmt: skip
def test_padding_of_pairs(name, change):
    config = load(CONFIGS / f"{name}.yaml")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing="pad"))
    found = advise(seen([(ATTENTION, "layers", "forward", 100.0)], padding=0.2, config=config))
    assert change in [advice.change for advice in found]


def test_peaks():
    known = peaks_of([H100] * 2, "bfloat16")
    assert (known.flops, known.bandwidth, known.measured, known.of_all(2)) == (989e12, 3352e9, False, 2 * 989e12)
    assert Peaks(2.0, 4.0, shared=True).of_all(8) == 2.0
    assert Peaks(2.0, 4.0).seconds(6.0, 4.0) == 3.0
    assert [rate(value) for value in (989e12, 3.352e12, 12.34e9, 5.0)] == ["989 T", "3.35 T", "12.3 G", "5.00 "]
