"""Parameters that stay as they are: what is trained around them, on any mesh, and that nothing is computed or kept for them."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.devices import placed
from tests.train.fine_tuning import by_path
from train.commands.cli import main
from train.config import RunConfig
from train.examine.explain import cost
from train.loss import LossConfig, LossSums
from train.objectives import Seq2Seq
from train.optimizer import OptimizerConfig, layer_factors, make_optimizer
from train.parallel.mesh import MeshConfig, make_mesh, shard_batch, use_mesh
from train.program.program import Program
from train.program.state import TrainState
from train.program.step import make_gradient, update
from train.trained import chosen, dotted
from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.encoder_decoder import VaswaniConfig
from transformer.models.families import described_parameters, make_model
from transformer.models.gpt import GPTConfig
from transformer.models.heads import ClassificationHeadConfig
from transformer.pipeline import in_order

B, T = 16, 8
MODEL = GPTConfig(vocab_size=32, max_length=T, num_layers=4, embed_dim=16, attention=SoftmaxConfig(num_heads=2))
FREEZE = ("embed.*", "layers.blocks.attention*", "positions.table")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 32, (B, T + 1)).astype(np.int32)
BATCH = {
    "tokens": TOKENS[:, :-1],
    "targets": TOKENS[:, 1:],
    "weights": (RNG.random((B, T)) < np.linspace(0.1, 1, B)[:, None]).astype(np.float32),
}


def program_of(mesh_config, num_devices, *, freeze=FREEZE, model=MODEL, adapter=None, microbatches=1, **options):
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=1.0, freeze=freeze, **options)
    config = RunConfig(
        name="test", steps=10, batch_size=B, microbatches=microbatches, model=model, optimizer=optimizer,
        adapter=adapter, mesh=mesh_config,
    )  # fmt: skip
    with use_mesh(mesh, mesh_config.rules):
        return Program(config, mesh)


@dataclasses.dataclass(frozen=True)
class Run:
    """Some steps on one batch: losses and gradient norms, the parameters before and after, and whole states."""

    seen: np.ndarray
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    start: TrainState
    first: TrainState
    """After one step."""
    state: TrainState


def run(program, steps=3, start=None):
    """Steps from a state that is brought to the mesh, or, without one, is made there."""
    with use_mesh(program.mesh, program.config.mesh.rules):
        state = program.init() if start is None else placed(start, program.abstract)
        start, first, seen = jax.device_get(state), None, []
        batch = shard_batch(BATCH, program.batch_sharding)
        for _ in range(steps):
            state, metrics = program.train_step(state, batch)
            seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
            first = jax.device_get(state) if first is None else first
        return Run(np.array(seen), by_path(start.params), by_path(in_order(state.params)), start, first, state)


def is_frozen(name):
    return name.startswith(("embed.", "positions.", "layers.blocks.attention"))


@functools.cache
def on_one_device():
    return run(program_of(MeshConfig(), 1, layer_decay=0.5, ema_decay=0.5))


def test_the_frozen_stay_and_the_others_learn():
    ran = on_one_device()
    for name, value in ran.after.items():
        assert np.array_equal(value, ran.before[name]) == is_frozen(name), name
        average = by_path(ran.state.ema)[name]
        assert np.array_equal(average, ran.before[name]) == is_frozen(name), name
    assert ran.seen[-1, 0] < ran.seen[0, 0]
    moments = by_path(ran.state.opt_state[1][0].mu)
    assert moments.keys() == {name for name in ran.after if not is_frozen(name)}


def test_the_gradient_is_of_the_trained_parameters_alone_and_so_is_its_norm():
    program, ran = program_of(MeshConfig(), 1), on_one_device()
    graphdef = graphdef_of(functools.partial(make_model, MODEL))
    gradient = make_gradient(graphdef, LossConfig(), trained=program.trained)
    grads, _ = jax.eval_shape(gradient, program.abstract.params, BATCH, jax.random.key(0))
    everything = [dotted(path) for path, _ in nnx.to_flat_state(program.abstract.params)]
    assert [dotted(path) for path, _ in nnx.to_flat_state(grads)] == [n for n in everything if not is_frozen(n)]

    whole, sums = jax.jit(make_gradient(graphdef, LossConfig()))(ran.start.params, BATCH, jax.random.key(0))
    expected = {name: value / sums.weight for name, value in by_path(whole).items() if not is_frozen(name)}
    norm = np.sqrt(sum(np.square(value).sum() for value in expected.values()))
    assert norm == pytest.approx(ran.seen[0, 1], rel=1e-4)
    # The first moments of the first step are its gradients, clipped by their norm to 1, by a factor of 1 - b1.
    moments = by_path(ran.first.opt_state[1][0].mu)
    assert moments.keys() == expected.keys()
    for name, value in moments.items():
        np.testing.assert_allclose(value, 0.1 * expected[name] / max(norm, 1), rtol=1e-4, atol=1e-6)


def test_nothing_is_multiplied_for_frozen_matrices():
    model = GPTConfig(**vars(MODEL) | {"num_layers": 2, "scan_layers": False})

    def flops(**options):
        program = program_of(MeshConfig(), 1, model=model, **options)
        with use_mesh(program.mesh, program.config.mesh.rules):
            return program.lower().cost_analysis()["flops"]

    none, blocks = flops(freeze=()), flops(freeze=("layers.blocks.*",))
    # Of each matrix of the blocks two products are left of three.
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 64)
    assert none - blocks > 0.95 * 2 * matrices * B * T


def layout_name(value):
    if not isinstance(value, MeshConfig):
        return getattr(value, "kind", str(value))
    return f"{value.strategy}-{value.schedule}"


LAYOUTS = [
    (MeshConfig(strategy="pmap"), 8, 2),
    (MeshConfig(strategy="zero2"), 8, 2),
    (MeshConfig(data=2, fsdp=2, tensor=2), 8, 1),
    (MeshConfig(strategy="pipeline", pipeline=2, stages_per_device=2), 2, 1),
    (MeshConfig(strategy="pipeline", pipeline=2, schedule="1f1b"), 2, 2),
]


@pytest.mark.parametrize(("config", "num_devices", "microbatches"), LAYOUTS, ids=layout_name)
def test_every_layout_computes_what_one_device_does(config, num_devices, microbatches):
    expected = on_one_device()
    program = program_of(config, num_devices, microbatches=microbatches, layer_decay=0.5)
    # One of them makes its state on its own mesh.
    start = None if config.strategy == "zero2" else dataclasses.replace(expected.start, ema=None)
    got = run(program, start=start)
    np.testing.assert_allclose(got.seen, expected.seen, rtol=1e-4)
    for name, value in got.after.items():
        np.testing.assert_allclose(value, expected.after[name], atol=2e-3)
        assert np.array_equal(value, expected.before[name]) == is_frozen(name), name


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon", "sgd"])
def test_every_optimiser_leaves_the_frozen_alone(name):
    program, params = program_of(MeshConfig(), 1, name=name), on_one_device().start.params
    optimizer = make_optimizer(program.config.optimizer, program.config.steps, MODEL.num_layers)

    @jax.jit
    def step(params):
        grads = jax.tree.map(lambda value: jnp.cos(100 * value), program.trained.select(params))
        one = jnp.ones(())
        state = program.make_state(jax.random.key(0), params)
        return update(state, grads, LossSums(one, one, one), optimizer, trained=program.trained)[0].params

    before, after = by_path(params), by_path(step(params))
    assert {path for path in after if np.array_equal(after[path], before[path])} == set(filter(is_frozen, after))


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            ("layer.blocks.*",),
            r"optimizer.freeze: 'layer.blocks.\*' matches no parameter; the nearest are layers.blocks",
        ),
        (("embed",), "'embed' matches no parameter; the nearest are embed.table, "),
        (("embed.*", "*"), r"got \['embed.\*', '\*'\], which leaves no parameter to train"),
    ],
)
def test_an_invalid_freeze_pattern_is_refused(freeze, message):
    with pytest.raises(UserError, match=message) as raised:
        chosen(described_parameters(MODEL), freeze, None)
    assert "\n" not in str(raised.value)


def test_explain_counts_what_is_trained(config_file, capsys):
    config = program_of(MeshConfig(), 1).config
    found, all_ = cost(config), cost(program_of(MeshConfig(), 1, freeze=()).config)
    trained = sum(value.size for name, value in on_one_device().before.items() if not is_frozen(name))
    assert found.trained == trained and found.parameters == all_.parameters == all_.trained
    assert found.gradient_bytes == 4 * trained
    assert all_.optimizer_bytes - found.optimizer_bytes == 8 * (all_.parameters - trained)
    assert main(["explain", str(config_file), "--optimizer.freeze", "embed.*", "positions.*"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"trained +[\d,]+ \(\d\d\.\d%\) +of the parameters; the others are frozen", output)


def test_the_work_of_a_step_is_of_what_is_trained():
    params = described_parameters(MODEL)

    def passes(*freeze):
        trained = chosen(params, freeze, None)
        return trained.flops_factor(params), sum(leaf.size for leaf in jax.tree.leaves(trained.select(params))) / total

    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert passes() == (3, 1)
    found, share = passes(*FREEZE)
    assert found == 2 + share and 0 < share < 1
    # The final norm alone: nothing goes back through the blocks.
    found, share = passes("embed.*", "positions.*", "layers.blocks.*")
    assert found == 1 + 2 * share and share < 0.01


def test_layer_decay_is_electras():
    model = BertConfig(
        vocab_size=32,
        max_length=8,
        num_layers=3,
        embed_dim=8,
        attention=SoftmaxConfig(num_heads=2),
        head=ClassificationHeadConfig(),
        embedding_size=4,
    )
    factors = {
        dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(layer_factors(described_parameters(model), 0.5, 3))
    }  # fmt: skip
    for name in ("embed.table", "positions.table", "types.table", "embed_norm.scale", "embedding_projection.kernel"):
        assert factors[name] == 0.5**4
    for name, value in factors.items():
        if name.startswith("layers.blocks"):
            np.testing.assert_array_equal(value.ravel(), [0.125, 0.25, 0.5])
        elif not name.startswith(("embed", "positions", "types")):
            assert value == 1, name


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_a_factor_is_of_the_rate_and_so_of_the_decay_too(name):
    """Steps of blocks that learn by a half of the rate are those of a run whose whole rate is half."""
    model = GPTConfig(**vars(MODEL) | {"num_layers": 1})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), described_parameters(model))

    def updates(params, **options):
        config = OptimizerConfig(name=name, weight_decay=0.5, clip_norm=None, schedule="linear", **options)
        optimizer = make_optimizer(config, 5, 1)
        state, moved = optimizer.init(params), params
        with jax.numpy_dtype_promotion("standard"):
            for step in range(2):
                grads = jax.tree.map(lambda p: jnp.cos(p + step), params)  # noqa: B023
                moved, state = optimizer.update(grads, state, params)
        return moved

    @jax.jit
    def all_updates(params):
        rates = {"learning_rate": 0.1, "layer_decay": 0.5}, {"learning_rate": 0.05}, {"learning_rate": 0.1}
        return [updates(params, **options) for options in rates]

    halved, half, whole = map(by_path, all_updates(params))
    for path, value in halved.items():
        factor = 0.5 if path.startswith("layers.blocks") else 0.25 if path.startswith(("embed", "positions")) else 1
        np.testing.assert_allclose(value, factor * whole[path], rtol=1e-5, atol=1e-7)
        if factor == 0.5:
            np.testing.assert_allclose(value, half[path], rtol=1e-5, atol=1e-7)


def test_layer_decay_is_for_one_stack():
    objective, optimizer = Seq2Seq(), OptimizerConfig(layer_decay=0.9)
    with pytest.raises(
        UserError, match="layer_decay: got 0.9; layer_decay needs one stack of blocks .* family is 'vaswani'"
    ):
        RunConfig(name="test", model=VaswaniConfig(), objective=objective, optimizer=optimizer)
