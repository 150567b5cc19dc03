"""The measurements run, at a tiny size, and leave a record that says where it comes from."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import compile_time, decode, experts, gpu, record, step, workload
from benchmarks.cli import _parser, main
from benchmarks.report import report
from benchmarks.workload import of_model
from transformer.errors import UserError
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPTConfig

TINY = of_model(
    GPTConfig(vocab_size=32, max_length=160, num_layers=2, embed_dim=16, attention=SoftmaxConfig(num_heads=2)),
    batch_size=2,
)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Figures of a test are not results."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def test_candidates_take_turns_in_an_order_that_turns():
    seen = []
    candidates = {name: lambda name=name: seen.append(name) or float(len(seen)) for name in "abc"}
    taken = record.in_turn(candidates, rounds=3)
    assert "".join(seen) == "abcbcacab"
    assert taken == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_ratios_are_taken_round_by_round():
    assert record.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == {"median": 3, "min": 2, "max": 4, "rounds": 3}


@pytest.mark.torch
def test_step_and_decode_compare_with_the_peer(results):
    result = step.run(rounds=1, steps=1, compiled_peer=False, work=TINY)
    assert set(result["tokens_per_second"]) == {"manyheads", "torch eager"}
    assert result["mfu"] is None
    written = decode.run(rounds=1, work=TINY)
    assert written["batch_8"]["ratio"]["median"] > 0
    kept = json.loads((results / "step_cpu.json").read_text())
    assert kept["command"] == "manyheads-bench step --rounds 1 --steps 1"
    assert {"date", "device", "versions", "result"} <= set(kept)
    assert kept["versions"]["jax"]


def test_the_report_is_made_from_the_records(results):
    with pytest.raises(UserError, match="no results yet"):
        report(results)
    values = {"median": 2.0, "min": 1.5, "max": 2.5, "rounds": 3}
    record.save("compile", "manyheads-bench compile", {"seconds": {}, "ratio": values})
    row = report(results).splitlines()[-1]
    assert row.startswith(
        "| compile time of the step, 48 layers over 6 | 2.00× | 1.50× to 2.50× | `manyheads-bench compile` |"
    )


def test_compile_time_is_taken_at_both_depths(results):
    result = compile_time.run(rounds=1, work=TINY)
    assert set(result["seconds"]) == {"6 layers", "48 layers"}


def test_experts_are_timed_over_the_number_of_tokens(results):
    result = experts.run(rounds=1, tokens=(16, 32))
    assert result["experts"]["dropless"]["seconds"].keys() == result["dense"]["seconds"].keys() == {"16", "32"}
    rows = report(results).splitlines()[2:]
    assert len(rows) == 4
    assert rows[0].startswith("| 8 experts, 2 per token, dropless, both passes, time of 32 tokens over 16 |")
    assert "| `manyheads-bench experts --rounds 1` |" in rows[0]


def test_without_an_accelerator_the_gpu_run_says_so(capsys):
    assert main(["gpu"]) == 2
    assert capsys.readouterr().err.startswith("manyheads-bench: no accelerator found")


def test_each_accelerator_measurement_has_a_process_and_a_limit(capfd):
    """One that fails or does not end takes nothing from the others."""
    asked = [
        gpu.Measurement(("attention", "--support"), 100),
        gpu.Measurement(("attention",), 100),
        gpu.Measurement(("attention", "--long", "1048576"), 6),
        gpu.Measurement(("report",), 100),
    ]
    with pytest.raises(UserError) as raised:
        gpu.run_all(asked, 300)
    assert str(raised.value).startswith(
        "attention: status 2; attention --long 1048576: not finished in 6 s. The other results"
    )
    said = capfd.readouterr().out
    assert "| mask: causal |" in said and "| measured | figure |" in said
    with pytest.raises(UserError, match="report: no time was left"):
        gpu.run_all(asked[3:], 0)


def test_every_accelerator_measurement_is_a_command():
    for one in gpu.MEASUREMENTS:
        _parser().parse_args(one.arguments)
    assert gpu.MEASUREMENTS[0].arguments[0] == "step"


def test_packed_rows_have_documents_of_their_own():
    config = workload.packed(TINY)
    batch = workload.random_batch(config)
    for row in range(config.batch_size):
        segments, positions, lengths = (batch[name][row] for name in ("segments", "positions", "lengths"))
        assert lengths.sum() == len(segments) and (lengths > 0).sum() == segments.max() > 1
        np.testing.assert_array_equal(segments, np.repeat(np.arange(1, len(lengths) + 1), lengths))
        np.testing.assert_array_equal(positions, np.concatenate([np.arange(size) for size in lengths]))


def test_a_packed_step_is_compared_with_a_plain_one(results):
    result = step.run(rounds=1, steps=1, work=TINY, case="packed")
    assert result["ratio_to"].keys() == {"manyheads plain"}
    assert "| training step, packed documents, speed over manyheads plain |" in report(results)
    with pytest.raises(UserError, match="large needs an accelerator"):
        step.run(rounds=1, steps=1, case="large")
