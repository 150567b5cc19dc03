"""What a plan is for: devices by their figures, an objective, prices, several targets, and why one layout is the best."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import types

import pytest

from benchmarks.cli import main
from benchmarks.environments import compilers, environment
from benchmarks.sharding.devices.chips import CHIPS
from benchmarks.sharding.devices.targets import parse_target
from benchmarks.sharding.planning import compare, explain, largest, legend, plan
from benchmarks.sharding.planning.objective import Goal, in_order, parse_prices
from benchmarks.sharding.predict.analytic import Analysis
from tests.benchmarks.small import CONFIG
from train.parallel.hardware import PEAK_TFLOPS
from transformer.errors import UserError

FIGURES = "tflops: {bfloat16: 400, float32: 200}\nmemory: 64\nbandwidth: 2000\nlink: 64\nnetwork: 12.5\n"


def test_every_chip_has_its_peaks_and_links():
    for name, chip in CHIPS.items():
        assert chip.peak_bfloat16 == PEAK_TFLOPS[chip.kind]["bfloat16"] * 1e12, name
        assert min(chip.memory, chip.bandwidth, chip.link, chip.network) > 0, name
        assert chip.network < chip.link < chip.bandwidth, name


def test_a_rack_is_one_domain_and_a_host_is_that_of_its_chip():
    rack, hosts = parse_target("gb200:72"), parse_target("h100:72")
    assert (rack.shape, hosts.shape) == ((1, 72), (9, 8))
    far = ((0, 0), (0, 71))
    assert rack.link(far)[0] == "NVLink" and parse_target("l4:8").link(((0, 0), (0, 7)))[0] == "PCIe"
    assert parse_target("gb200:144").link(((0, 0), (1, 0)))[0] == "network"


def test_a_chip_of_two_devices():
    target = parse_target("v7:2x2x1")
    assert (target.num_devices, target.topology) == (8, "tpu7x:2x2x1")
    place = target.place(types.SimpleNamespace(coords=[1, 0, 0], core_on_chip=1))
    assert place == (1, 0, 0, 1)
    inside, apart = target.link(((0, 0, 0, 0), (0, 0, 0, 1))), target.link(((0, 0, 0, 0), (1, 0, 0, 0)))
    assert inside[1] > apart[1] > 0
    sizes = {"data": 4, "tensor": 2}
    assert target.link_of_axis("tensor", sizes) == pytest.approx(inside[1])
    assert target.link_of_axis("data", sizes) < inside[1]


def test_a_device_by_its_figures(tmp_path, config_file, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(FIGURES + "devices_per_host: 4\nprice: 3\n")
    target = parse_target(f"{path}:8")
    assert (target.name, target.shape, target.chip.memory) == ("mine:8", (2, 4), 64e9)
    assert (
        main(["plan", str(config_file), "--target", f"{path}:8", "--objective", "cost", "--dir", str(tmp_path / "p")])
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "this plan is by formula only: no compiler's figures are known for mine" in said
        and "cost: of a billion" in said
    )
    assert (tmp_path / "p" / "small_mine_8.html").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bandwidth", "bandwdth", "mine.yaml: bandwdth: .* Did you mean 'bandwidth'"),
        ("memory: 64", "memory: -64", "mine.yaml: memory: got -64.0; allowed: a number above 0"),
        ("float32: 200", "float32: many", "mine.yaml: tflops.float32: got 'many'"),
        ("link: 64\n", "", "mine.yaml: link: "),
    ],
)
def test_a_mistake_in_figures_is_one_line(tmp_path, old, new, message):
    path = tmp_path / "mine.yaml"
    path.write_text(FIGURES.replace(old, new))
    with pytest.raises(UserError, match=message) as raised:
        parse_target(f"{path}:8")
    assert "\n" not in str(raised.value)


def test_figures_do_not_take_the_name_of_a_known_chip(tmp_path):
    (tmp_path / "h100.yaml").write_text(FIGURES)
    with pytest.raises(UserError, match="the name 'h100' is that of a chip"):
        parse_target(f"{tmp_path}/h100.yaml:8")


def test_of_layouts_as_fast_as_each_other_the_smallest_comes_first():
    items = [(1.0, 9.0), (1.005, 5.0), (1.02, 1.0), (2.0, 0.9)]
    seconds, memory = (lambda item: item[0]), (lambda item: item[1])
    assert in_order(items, "time", seconds, memory) == [(1.005, 5.0), (1.0, 9.0), (1.02, 1.0), (2.0, 0.9)]
    assert in_order(items, "memory", seconds, memory)[0] == (2.0, 0.9)


def test_prices():
    assert parse_prices(None, ["h100"]) == {}
    assert parse_prices("2.5", ["h100"]) == {"h100": 2.5}
    assert parse_prices("h100=2.5, v5e=1.2", ["v5e", "h100"]) == {"h100": 2.5, "v5e": 1.2}
    assert Goal(price=2.0).cost(1800, 8) == 8.0 and Goal().cost(1800, 8) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2.5", "a price for each kind of device, as in h100=2.5,v5e=2.5"),
        ("h10=2", "got 'h10'; allowed: h100, v5e. Did you mean 'h100'"),
        ("h100=-1", "got '-1'; allowed: a number above 0"),
        ("h100=nan", "got 'nan'; allowed: a number above 0"),
        ("h100=", "got ''; allowed: a number above 0"),
    ],
)
def test_prices_that_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_prices(text, ["h100", "v5e"])


@functools.cache
def ranking(objective="time", price=None):
    target = parse_target("h100:8")
    found = plan.planned(CONFIG, target, plan.How(analytic=True), Goal(objective=objective, price=price, tokens=1e9))
    return found.result


def test_a_training_has_a_cost_only_with_a_price():
    assert ranking()["training"]["cost"] is None and "cost" not in legend.heads(ranking())
    priced = ranking(price=2.0)
    assert priced["training"]["cost"] == pytest.approx(2.0 * priced["training"]["device_hours"])
    assert priced["layouts"][0]["cost"] == pytest.approx(priced["training"]["cost"])


def test_the_smallest_layout_is_first_if_memory_is_the_objective():
    least = ranking("memory")["layouts"]
    assert least[0]["memory"] <= 1.01 * min(row["memory"] for row in least)
    assert least[0]["memory"] < ranking()["layouts"][0]["memory"]


def test_parts_of_a_difference_add_up():
    result = ranking()
    first, last = result["layouts"][0], result["layouts"][-1]
    found = explain.explained(result, len(result["layouts"]), 1)
    assert found["numbers"] == [1, len(result["layouts"])]
    assert f"1 ({first['layout']}) is ahead of" in found["sentences"][0]
    assert any("optimizer" in line and "activations" in line for line in found["sentences"])
    for row in (first, last):
        estimate = row["estimate"]
        bubble = legend.times_of(row)["bubble"]
        whole = estimate["arithmetic"] + estimate["traffic"] + bubble + estimate["sending"]
        assert whole == pytest.approx(row["seconds"])
        assert (
            sum(estimate["axes"].values()) == pytest.approx(estimate["sent"])
            and estimate["sent"] >= estimate["sending"]
        )
    for numbers in ((0, 1), (1, 99), (2, 2)):
        with pytest.raises(UserError, match="--explain: got"):
            explain.explained(result, *numbers)


def test_the_command_explains_in_the_terminal_and_on_the_page(config_file, tmp_path, capsys):
    arguments = [
        "--target",
        "h100:8",
        "--analytic",
        "--explain",
        "1",
        "3",
        "--largest",
        "--price",
        "2",
        "--dir",
        str(tmp_path),
    ]
    assert main(["plan", str(config_file), *arguments]) == 0
    said = capsys.readouterr().out
    assert "is ahead of 3 (" in said and "Matrix products: " in said
    assert "exposed: the part of it that adds to the step" in said and "Verdict: enough to shortlist" in said
    page = (tmp_path / "small_h100_8.html").read_text()
    assert "<h2>Layouts 1 and 3 compared</h2>" in page and "<b>exposed</b>" in page


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (0.08, "good to rent on. .* 926 ms to 1.09 s a step"), (0.12, "with a margin of 12%"), (0.3, "enough to shortlist"),
        (1.2, "455 ms upwards"),
    ],
)  # fmt: skip
def test_a_verdict_is_by_the_errors_on_record(error, text, monkeypatch):
    monkeypatch.setattr(legend, "on_record", lambda kind: {"time": error, "memory": 0.05})
    result = {"target": "h100:8", "compiled": 3, "layouts": [{"seconds": 1.0}]}
    assert re.search(text, legend.verdict(result))
    assert "by formula" in legend.verdict(result | {"compiled": 0})


def test_targets_are_compared(config_file, tmp_path, capsys):
    names = "v5e:2x2,h100:8,mi300x:8"
    arguments = ["--analytic", "--dir", str(tmp_path), "--price", "h100=2.5,v5e=1.2,mi300x=2", "--objective", "cost"]
    assert main(["plan", str(config_file), "--compare", names, *arguments]) == 0
    said = capsys.readouterr().out
    assert "Targets are ordered by the cost of a token." in said
    (record,) = tmp_path.glob("compare_small_*.json")
    rows = json.loads(record.read_text())["result"]["targets"]
    assert [row["target"] for row in rows] == [row["target"] for row in sorted(rows, key=lambda row: row["cost"])]
    assert "mi300x:8" in (tmp_path / "compare_small.html").read_text()


def test_a_target_without_a_layout_does_not_end_a_comparison(config_file, tmp_path, capsys):
    arguments = ["--analytic", "--dir", str(tmp_path), "--compare", "h100:8,gb200:3"]
    assert main(["plan", str(config_file), *arguments]) == 0
    assert "gb200:3: plan: no layout over 3 devices divides batch_size 16" in capsys.readouterr().out


def test_a_comparison_that_is_stopped_keeps_what_it_found(config_file, tmp_path, capsys, monkeypatch):
    planned = compare.planned

    def stop(config, target, *rest):
        if target.kind == "h100":
            raise KeyboardInterrupt
        return planned(config, target, *rest)

    monkeypatch.setattr(compare, "planned", stop)
    arguments = ["--analytic", "--dir", str(tmp_path), "--compare", "v5e:2x2,h100:8"]
    assert main(["plan", str(config_file), *arguments]) == 0
    assert "Stopped early" in capsys.readouterr().out and (tmp_path / "compare_small.html").exists()
    arguments[-1] = "h100:8,v5e:2x2"
    assert main(["plan", str(config_file), *arguments]) == 130
    assert capsys.readouterr().err == "manyheads-bench: interrupted\n"


def test_the_largest_fits_and_a_larger_one_does_not():
    assert [largest.bisected(lambda count, most=most: count <= most) for most in (0, 1, 5, 64, 1000)] == [
        0,
        1,
        5,
        64,
        1000,
    ]
    assert largest.bisected(lambda count: True, most=100) == 100
    target = parse_target("h100:8")
    small = dataclasses.replace(target, chip=dataclasses.replace(target.chip, memory=3e6))
    found = largest.largest(CONFIG, small, None)
    best = found["batch_size"]["formula"]
    analysis = Analysis(CONFIG)

    def memory(batch_size):
        return analysis.estimate(dataclasses.replace(CONFIG, batch_size=batch_size), small).memory

    assert memory(best) <= 3e6 < memory(best + 8)
    assert found["sequence_length"]["formula"] % 256 == 0


def test_the_compiler_has_the_last_word_on_the_largest():
    class Compiler:
        def compile(self, config, timeout):
            return types.SimpleNamespace(fits=config.batch_size <= 40, failed=False, error=None)

    def make(count):
        return dataclasses.replace(CONFIG, batch_size=8 * count)

    found = largest._confirmed(make, 8, 8, Compiler())
    assert (found["formula"], found["compiled"], found["too_large"]) == (64, 40, 48)
    lines = largest.sentences({"batch_size": found, "sequence_length": found | {"formula": 0}, "batch_of_context": 8})
    assert (
        "64 sequences by formula; 40 fit by the compiler, 48 do not" in lines[0] and "none fits by formula" in lines[1]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "h100:8", "--objective", "cost"], "there is no price for h100"),
        (["--target", "h100:8", "--price", "v5e=1"], "got 'v5e'; allowed: h100"),
        (["--target", "mi300x:8", "--install"], "no compiler's figures are known for mi300x"),
        (["--target", "h100:8", "--compare", "v5e:2x2"], "--compare has its own targets"),
        (["--compare", "v5e:2x2,h100:8", "--price", "2"], "a price for each kind"),
    ],
)
def test_plan_refuses_in_one_line(config_file, capsys, arguments, message):
    assert main(["plan", str(config_file), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_strategies_are_not_compiled_for_a_chip_without_a_compiler(config_file, capsys):
    assert main(["sharding", str(config_file), "--target", "mi300x:8"]) == 2
    assert "no compiler's figures are known for mi300x" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_refused_before_an_installation(config_file, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1e9))
    assert main(["plan", str(config_file), "--target", "h100:8", "--install"]) == 2
    assert "it needs 7.0 GB, and 1.0 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_an_installation_without_a_network_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(environment.venv, "create", lambda folder, **_: None)
    said = "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution found for jax\n"
    failed = types.SimpleNamespace(returncode=1, stderr=said)
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        UserError, match="jax: the package index cannot be reached; connect to the network; look"
    ) as raised:
        environment.install(tmp_path / "new", ["jax"], "look elsewhere")
    assert "\n" not in str(raised.value)


def test_a_compiler_of_another_jax_is_refused(monkeypatch):
    done = types.SimpleNamespace(returncode=0, stdout="0.4.1\n", stderr="")
    monkeypatch.setattr(compilers.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match=r"python: it has jax 0\.4\.1; allowed: .*, this program's own"):
        compilers.find("gpu", "python")
