"""`manyheads replay` takes a step again bit for bit, and finds where a value first was not finite."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from tests.devices import on_one_device
from train.commands.cli import main
from train.config import load
from train.examine.nonfinite import first_non_finite
from train.run.loop import train

pytestmark = pytest.mark.usefixtures("one_device")


def test_a_value_is_traced_to_the_operation_that_made_it():
    def layers(x, weights):
        def layer(x, weight):
            return jnp.log(x - weight), None

        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    weights = jnp.array([-3.0, -2.0, 9.0, 1.0])
    origin = first_non_finite(layers, jnp.full(3, 1.0), weights)
    assert (
        origin.operation == "log" and origin.inside == ("iteration 2 of 4",) and "3 of 3 values are nan" in str(origin)
    )
    assert first_non_finite(layers, jnp.full(3, 1.0), weights[:2]) is None


def test_infinities_of_masks_do_not_count():
    def masked(x):
        scores = jnp.where(jnp.arange(4) < 2, x, -jnp.inf)
        return jax.nn.softmax(scores).sum() + jnp.exp(x * 1000).sum()

    assert first_non_finite(masked, jnp.zeros(4)) is None
    assert first_non_finite(masked, jnp.ones(4)).operation == "exp"
    # A row of which all is masked: its nan comes from infinities alone.
    origin = first_non_finite(lambda x: jax.nn.softmax(jnp.where(x > 5, x, -jnp.inf)).sum(), jnp.zeros(3))
    assert origin is not None and "nan" in origin.what


def test_of_the_backward_pass():
    origin = first_non_finite(jax.grad(lambda x: jnp.sqrt(x).sum()), jnp.zeros(2))
    assert origin.is_backward or origin.operation in ("div", "rsqrt", "pow", "integer_pow")
    assert first_non_finite(lambda x: x, jnp.array([1.0, jnp.nan])).operation == "argument [0]"


@pytest.fixture(scope="module")
def run(config_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replayed") / "run"
    with on_one_device():
        train(dataclasses.replace(load(config_file), run_dir=str(folder)))
    return folder


def test_a_step_is_taken_again_bit_for_bit(run, capsys):
    for step in (3, 11):
        assert main(["replay", str(run), "--step", str(step), "--rows", "2"]) == 0
        said = capsys.readouterr().out
        assert "the run recorded the same, bit for bit" in said and "and 6 more" in said
        losses = [float(one) for one in re.findall(r"^ +(\d\.\d+)  row \d, example \d+: \"", said, re.MULTILINE)]
        assert len(losses) == 2 and losses == sorted(losses, reverse=True)
    assert "from the checkpoint of step 8" in said


def test_a_step_that_is_not_finite(config_file, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["--optimizer.learning-rate", "1e30", "--optimizer.clip-norm", "null", "--stability.max-skipped", "3"]
    assert main(["train", str(config_file), "--run-dir", str(folder), *arguments]) == 2
    step = int(re.search(r"step (\d+): loss", capsys.readouterr().out)[1])
    assert main(["replay", str(folder), "--step", str(step)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"first value that is not finite: `\w+` at transformer/\w+.*: [\d,]+ of [\d,]+ values are", said)


@pytest.mark.parametrize("step", ["0", "13"])
def test_no_such_step(run, step, capsys):
    assert main(["replay", str(run), "--step", step]) == 2
    assert f"--step: got {step}; allowed: 1 to 12" in capsys.readouterr().err
