"""Layers on devices one after the other: every schedule computes what one device does, and each device has its own layers.

M microbatches.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.changed import changed
from tests.devices import placed
from train.checkpoints.checkpoint import Checkpoints
from train.config import RunConfig
from train.config.sections import CheckpointConfig
from train.objectives import OBJECTIVES, Masked
from train.optimizer import OptimizerConfig
from train.parallel.mesh import MeshConfig, make_mesh, shard_batch, use_mesh
from train.program.program import Program
from train.program.state import TrainState
from transformer.errors import UserError
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.layers.position import RelativeConfig
from transformer.mixers.differential import DifferentialConfig
from transformer.mixers.disentangled import DisentangledConfig
from transformer.mixers.fast_weights import FastWeightConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.families import FAMILIES
from transformer.models.gpt import GPTConfig
from transformer.pipeline import in_order, in_stages

B, T = 16, 8
SHAPE = {"vocab_size": 32, "max_length": T, "num_layers": 4, "embed_dim": 16, "attention": SoftmaxConfig(num_heads=2)}
# With dropout, whose bits are of the example, the layer and the place alone: no schedule may change them.
MODEL = GPTConfig(**SHAPE, dropout=0.1, attention_dropout=0.1)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 32, (B, T + 1)).astype(np.int32)
BATCH = {
    "tokens": TOKENS[:, :-1],
    "targets": TOKENS[:, 1:],
    # Rows of very different weight: a mean of means would show.
    "weights": (RNG.random((B, T)) < np.linspace(0.1, 1, B)[:, None]).astype(np.float32),
    "segments": np.ones((B, T), np.int32),
    "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    # What a masked language model scores: all places.
    "predicted": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
}
MASKED = Masked()


def program_of(mesh_config, num_devices, model=MODEL, **fields):
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    optimizer = OptimizerConfig(learning_rate=1e-2)
    fields = {"batch_size": B, "steps": 10, "optimizer": optimizer} | fields
    with use_mesh(mesh, mesh_config.rules):
        return Program(RunConfig(name="test", model=model, mesh=mesh_config, **fields), mesh)


@dataclasses.dataclass(frozen=True)
class Run:
    """Some steps on one batch: what they reported, and what was there before and after them."""

    program: Program
    start: TrainState
    """On the host."""
    losses: np.ndarray
    grad_norms: np.ndarray
    first_moments: Any
    """Of the first step: its gradients by a factor."""
    state: TrainState

    def goes_on(self, state):
        """The loss of one more step."""
        with use_mesh(self.program.mesh, self.program.config.mesh.rules):
            _, metrics = self.program.train_step(state, shard_batch(BATCH, self.program.batch_sharding))
        return float(metrics["loss"])

    @functools.cached_property
    def held_out(self):
        with use_mesh(self.program.mesh, self.program.config.mesh.rules):
            batch = shard_batch(BATCH, self.program.batch_sharding)
            return float(self.program.eval_step(self.state.params, batch)[0].nll)


def run(mesh_config, num_devices, steps=2, start=None, **options):
    """Steps from a state that is brought to the mesh, or, without one, is made there."""
    program = program_of(mesh_config, num_devices, **options)
    with use_mesh(program.mesh, mesh_config.rules):
        state = program.init() if start is None else placed(start, program.abstract)
        start, seen, first = jax.device_get(state), [], None
        batch = shard_batch(BATCH, program.batch_sharding)
        for _ in range(steps):
            state, metrics = program.train_step(state, batch)
            seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
            first = jax.device_get(moments(state)) if first is None else first
    return Run(program, start, *np.array(seen).T, in_order(first), state)


def moments(state):
    return state.opt_state[1][0].mu


@functools.cache
def on_one_device(steps=2, **options):
    return run(MeshConfig(), 1, steps, **options)


def assert_same_run(got, expected):
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(got.grad_norms, expected.grad_norms, rtol=1e-4)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected.first_moments))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4 * largest)
    jax.tree.map(close, got.first_moments, expected.first_moments)


INTERLEAVED = MeshConfig(strategy="pipeline", data=2, tensor=2, stages_per_device=2)


@functools.cache
def interleaved():
    """Two stages on each of two devices, and a state that was made there."""
    return run(INTERLEAVED, 8, steps=4)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({"data": 2, "tensor": 2, "stages_per_device": 2}, {}),
        ({"pipeline": 4, "fsdp": 2}, {"microbatches": 2}),
        # More microbatches than devices, and each a part of a part of the batch.
        ({"data": 2, "tensor": 2, "schedule": "1f1b", "pipeline_microbatches": 4}, {"microbatches": 2}),
    ],
    ids=str,
)
def test_every_schedule_computes_what_one_device_does(layout, options):
    config = MeshConfig(strategy="pipeline", **layout)
    expected = on_one_device(steps=4)
    got = interleaved() if config == INTERLEAVED else run(config, 8, steps=4, start=expected.start, **options)
    assert_same_run(got, expected)
    assert got.held_out == pytest.approx(expected.held_out, rel=1e-4)
    # Parameters and moments: a device has its layers, and of these its slices.
    slices = 8 // (config.data or 1)
    for tree in (got.state.params, moments(got.state)):
        kernel = tree["layers"]["blocks"]["attention"]["query"]["kernel"].get_value()
        assert kernel.addressable_shards[0].data.size * slices == kernel.size


LOCAL = SoftmaxConfig(num_heads=2, window=2)
EXPERTS = ExpertsConfig(num_experts=4, experts_per_token=2, dim=16, balance_loss=1.0)
POSITIONS = RelativeConfig(num_buckets=8, max_distance=8)
DISTANCES = DisentangledConfig(num_heads=2, max_distance=6, num_buckets=4)
MODELS = {
    "experts": dataclasses.replace(
        MODEL, remat="full", attention=DifferentialConfig(num_heads=2, position=POSITIONS), mlp=EXPERTS
    ),
    "a loop over layers": changed(MODEL, scan_layers=False, attention={"window": 3, "sinks": 1}),
    "hybrid": dataclasses.replace(
        MODEL, pattern=(FastWeightConfig(kind="gated_sum", num_heads=2, chunk=4), SoftmaxConfig(num_heads=2))
    ),
}
ONE_FORWARD = {"schedule": "1f1b"}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("experts", {}),
        ("experts", {"pipeline": 4, "pipeline_microbatches": 8} | ONE_FORWARD),
        ("a loop over layers", {}),
        ("hybrid", {"pipeline_microbatches": 4}),
        ("hybrid", ONE_FORWARD),
    ],
    ids=str,
)
def test_every_model_goes_through_a_pipeline(name, layout):
    config = MeshConfig(strategy="pipeline", **{"pipeline": 2} | layout)
    expected = on_one_device(model=MODELS[name])
    assert_same_run(run(config, config.pipeline, start=expected.start, model=MODELS[name]), expected)


@pytest.mark.parametrize("layout", [{}, ONE_FORWARD], ids=str)
def test_an_encoder_whose_layers_share_embeddings_of_distances(layout):
    model = BertConfig(**SHAPE | {"attention": DISTANCES}, dropout=0.0, attention_dropout=0.0)
    options = {"model": model, "objective": MASKED}
    config = MeshConfig(strategy="pipeline", pipeline=2, **layout)
    expected = on_one_device(**options)
    assert_same_run(run(config, 2, start=expected.start, **options), expected)


@pytest.mark.parametrize("layout", [{}, ONE_FORWARD], ids=str)
def test_an_encoder_whose_layers_take_turns(layout):
    model = BertConfig(**SHAPE, dropout=0.0, attention_dropout=0.0, pattern=(SoftmaxConfig(num_heads=2), LOCAL))
    options = {"model": model, "objective": MASKED}
    config = MeshConfig(strategy="pipeline", pipeline=2, **layout)
    expected = on_one_device(**options)
    assert_same_run(run(config, 2, start=expected.start, **options), expected)
    longer = dataclasses.replace(model, pattern=(SoftmaxConfig(num_heads=2), LOCAL, LOCAL, LOCAL))
    program = program_of(config, 2, longer, objective=MASKED)
    with (
        use_mesh(program.mesh, config.rules),
        pytest.raises(UserError, match="num_layers: got 4, 2 in each stage .* a multiple of 4 in each stage"),
    ):
        program.lower()


@pytest.mark.parametrize("layout", [{"stages_per_device": 2}, ONE_FORWARD], ids=str)
def test_a_narrow_type_goes_through_a_pipeline(layout):
    config = MeshConfig(strategy="pipeline", pipeline=2, **layout)
    expected = on_one_device(steps=4)
    got = run(config, 2, steps=1, start=expected.start, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    np.testing.assert_allclose(got.losses, expected.losses[:1], rtol=1e-2)
    np.testing.assert_allclose(got.grad_norms, expected.grad_norms[:1], rtol=3e-2)


def test_what_one_forward_one_backward_keeps_does_not_grow_with_the_microbatches():
    model = dataclasses.replace(MODEL, embed_dim=64, max_length=64)

    def kept(schedule, microbatches):
        config = MeshConfig(strategy="pipeline", pipeline=2, schedule=schedule, pipeline_microbatches=microbatches)
        program = program_of(config, 2, model, batch_size=4 * microbatches)
        with use_mesh(program.mesh, config.rules):
            return program.lower().compile().memory_analysis().temp_size_in_bytes

    many = kept("1f1b", 16)
    assert many < 1.1 * kept("1f1b", 4)
    assert kept("gpipe", 16) > 2 * many


def test_a_checkpoint_has_its_layers_in_order(tmp_path):
    """Written from a pipeline's state in stages, and gone on with on one device."""
    piped, other = interleaved(), on_one_device(steps=4)
    assert jax.tree.leaves(piped.state.params["layers"]["blocks"])[0].shape[:2] == (2, 2)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, use_mesh(piped.program.mesh, INTERLEAVED.rules):
        checkpoints.save(in_order(piped.state), 4, {})
    config = other.program.config
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, use_mesh(other.program.mesh, config.mesh.rules):
        state = checkpoints.restore(4, other.program.abstract)
    # As if it had never been in a pipeline.
    assert other.goes_on(state) == pytest.approx(other.goes_on(jax.tree.map(jnp.copy, other.state)), rel=1e-5)


def test_in_stages_and_in_order_are_each_others_way_back():
    piped = interleaved()
    with use_mesh(piped.program.mesh, INTERLEAVED.rules):
        there = piped.state.params
        params = in_order(there)
        assert jax.tree.leaves(params["layers"]["blocks"])[0].shape[0] == 4
        jax.tree.map(np.testing.assert_array_equal, in_stages(params, 2), there)
        jax.tree.map(np.testing.assert_array_equal, in_order(params), params)
        jax.tree.map(np.testing.assert_array_equal, in_stages(there, 2), there)


WRONG_MESH = [
    ({"schedule": "1f1b", "stages_per_device": 2}, "stages_per_device: got 2; allowed: 1 with schedule 1f1b"),
    ({"stages_per_device": 0}, "stages_per_device: got 0; allowed: 1 or more"),
    ({"pipeline_microbatches": 0}, "pipeline_microbatches: got 0; allowed: 1 or more, or null"),
    ({"strategy": "ulysses"}, "pipeline: got 2; strategy ulysses shards sequences"),
    ({"context": 2}, "context: got 2; a pipeline needs whole sequences"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_MESH, ids=str)
def test_an_invalid_pipeline_mesh_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**{"strategy": "pipeline", "pipeline": 2} | fields)


WRONG_RUN = [
    (
        {"pipeline": 3},
        3,
        {},
        r"num_layers: got 4; allowed: a multiple of 3 \(3 devices of the pipeline × 1 stages per device\)",
    ),
    ({"pipeline": 2, "stages_per_device": 4}, 2, {}, "num_layers: got 4; allowed: a multiple of 8"),
    (
        {"pipeline": 2, "pipeline_microbatches": 3},
        2,
        {},
        "got 3; allowed: a multiple of the pipeline's devices .2., or null",
    ),
    ({"pipeline": 2, "pipeline_microbatches": 6}, 2, {}, "batch_size: got 16, .* try 12 or 18"),
    ({"pipeline": 2, "data": 4}, 8, {"microbatches": 4}, "batch_size: got 16, .* try 32"),
    ({"pipeline": 2}, 2, {"family": "vaswani"}, "family: got 'vaswani'; a pipeline .* gpt, bert, electra"),
    ({"pipeline": 2}, 2, {"family": "recurrent"}, "family: got 'recurrent'; a pipeline"),
    ({"pipeline": 2, "schedule": "1f1b"}, 2, {"family": "electra"}, "schedule: got '1f1b'; .* two stacks"),
]


@pytest.mark.parametrize(("layout", "num_devices", "options", "message"), WRONG_RUN, ids=str)
def test_a_run_that_cannot_be_pipelined_is_refused(layout, num_devices, options, message):
    if name := options.get("family"):
        family = FAMILIES[name]
        suited = next(one for one in OBJECTIVES.values() if name in one.families)
        options = {"model": family.config(), "objective": suited()}
    with pytest.raises(UserError, match=message):
        program_of(MeshConfig(strategy="pipeline", **layout), num_devices, **options)
