"""A training step compiled for accelerators that are absent, by their own compilers, through the command that users run.

The compilers are in environments of their own, several gigabytes of which are kept in the user's cache.
`MANYHEADS_REQUIRE_COMPILERS=1` makes those that are missing; without it their tests are skipped.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess

import pytest

from benchmarks.cli import main
from benchmarks.environments import compilers
from train.config import to_data
from train.config.load import parse

TARGETS = {"tpu": "v5e:2x2", "gpu": "h100:4"}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\nbatch_size: 8\n"
        "model: {vocab_size: 64, max_length: 32, num_layers: 2, embed_dim: 64, attention: {num_heads: 2}}\n"
    )
    return path


@pytest.fixture
def compiler(request, monkeypatch):
    """Platform and interpreter, of the user's own cache; what is planned is kept in the tests' cache."""
    with monkeypatch.context() as patch:
        patch.delenv("MANYHEADS_CACHE")
        python = compilers.find(request.param, make=os.environ.get("MANYHEADS_REQUIRE_COMPILERS") == "1")
    if python is None:
        pytest.skip(compilers.absent(request.param))
    return request.param, python


@pytest.mark.parametrize("compiler", TARGETS, indirect=True)
def test_a_plan_compiles_for_devices_that_are_absent(compiler, config_file, tmp_path, capsys, monkeypatch):
    platform, python = compiler
    # An answer that was kept would hide a compiler that no longer runs.
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    arguments = ["--target", TARGETS[platform], "--candidates", "2", "--workers", "1", "--compiler-python", python]
    assert main(["plan", str(config_file), *arguments, "--dir", str(tmp_path / "plans")]) == 0
    said = re.search(r"(\d+) of \d+ layouts compiled", capsys.readouterr().out)
    # The two most promising, and neighbours of the better one.
    assert said is not None and int(said.group(1)) >= 2
    (record,) = (tmp_path / "plans").glob("plan_small_*.json")
    result = json.loads(record.read_text())["result"]
    assert result["failed"] == []
    best = result["layouts"][0]
    assert best["fits"] and best["compiled"]["memory"] > best["compiled"]["state"] > 0
    assert best["compiled"]["prediction"]["seconds"] > 0 and best["compiled"]["collectives"]
    step = best["compiled"]["timeline"]
    assert step["segments"][-1]["end"] == pytest.approx(best["compiled"]["prediction"]["seconds"])
    # A TPU pads arrays as small as these to whole tiles, which what is alive does not count.
    least = 0.75 if platform == "gpu" else 0.5
    assert least <= step["memory"]["peak"] / step["memory"]["compiler"] <= 1.25


B, T, VOCAB, LAYERS = 8, 1024, 50304, 2
MODEL = {
    "vocab_size": VOCAB, "max_length": T, "num_layers": LAYERS, "embed_dim": 768, "dtype": "bfloat16",
    "attention": {"num_heads": 12},
}  # fmt: skip
ENCODER = {"family": "bert", **MODEL, "dropout": 0.1, "attention_dropout": 0.0}
DOCUMENTS = {"packing": "documents"}
STEPS = {
    "gpt": {"model": MODEL},
    "packed": {"model": MODEL, "data": DOCUMENTS},
    "packed encoder": {"model": ENCODER, "data": DOCUMENTS, "objective": {"kind": "masked"}},
    "padded encoder": {
        "model": {**ENCODER, "head": {"kind": "classification", "num_labels": 2}}, "objective": {"kind": "classification"},
    },
    "window": {"model": {**MODEL, "attention": {"num_heads": 12, "window": 256}}},
    "light rematerialisation": {"model": {**MODEL, "remat": "light"}, "data": DOCUMENTS},
}  # fmt: skip
# A TPU's compiler takes a minute for a step.
CASES = [("gpu", name) for name in STEPS] + [("tpu", "packed"), ("tpu", "window")]
FUSED = {"gpu": (r"__cudnn\$fmhaSoftmax\b", r"__cudnn\$fmhaSoftmaxBackward"), "tpu": ("tpu_custom_call",) * 2}

COMPILE = """
import json, sys
from benchmarks.environments import compilers
from benchmarks.sharding.predict.ahead import compile_step
from benchmarks.workload import program_of
from train.config import RunConfig
from train.config.restore import restore
platform, topology, configs = json.load(sys.stdin)
devices = compilers.devices_of(platform, topology)[:1]
for name, config in configs.items():
    compiled, _ = compile_step(program_of(restore(RunConfig, config), devices))
    print(json.dumps([name, compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes]), flush=True)
"""


@functools.cache
def programs(platform, python):
    """The compiled step of each case, and its temporary memory, on one device of full width."""
    rest = {"name": "ahead", "batch_size": B, "optimizer": {"schedule": "constant"}}
    configs = {name: to_data(parse(rest | STEPS[name], name)) for one, name in CASES if one == platform}
    topology = {"gpu": "1x1x1", "tpu": "v5e:2x2"}[platform]
    done = subprocess.run(
        [python, "-c", COMPILE], input=json.dumps([platform, topology, configs]), capture_output=True, text=True, timeout=600,
        env=compilers.process_environment(platform),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {name: (text, memory) for name, text, memory in lines}


@pytest.mark.parametrize(("compiler", "case"), CASES, indirect=["compiler"])
def test_a_step_on_an_accelerator_runs_fused_attention_and_makes_no_large_array(compiler, case):
    """Without a device at hand: what its own compiler made of a step of GPT-2's or BERT's width."""
    platform, python = compiler
    text, memory = programs(platform, python)[case]
    forward, backward = (len(re.findall(rf'custom_call_target="{name}', text)) for name in FUSED[platform])
    assert backward >= 1
    if platform == "gpu":
        # Rematerialisation does not run attention again.
        assert forward == backward == LAYERS
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\b\w+\[([\d,]+)\]", text)}
    assert not [shape for shape in shapes if shape.count(T) > 1], "an array of all pairs"
    if "padded" not in case:
        whole = B * T * VOCAB
        assert not [shape for shape in shapes if VOCAB in shape and math.prod(shape) >= whole], (
            "the logits of all tokens"
        )
    if platform == "gpu":
        assert not [shape for shape in shapes if shape[:3] == (LAYERS, B, T)], "what all layers keep, in one array"
        assert memory < 3 * 2**30
