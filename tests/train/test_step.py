"""One step, whatever the mesh, the strategy and the microbatches."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tests.changed import changed
from tests.devices import placed
from train.config import RunConfig
from train.optimizer import OptimizerConfig, make_optimizer
from train.parallel.mesh import MESH_AXES, MeshConfig, check_batch, make_mesh, shard_batch, use_mesh
from train.program.program import Program, suited
from train.program.state import abstract_state, init_state, state_maker
from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.mixers.fast_weights import FastWeightConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.gpt import GPT, GPTConfig
from transformer.models.recurrent_config import RecurrentConfig

# With dropout, whose bits are of the example and the place alone: no layout may change them.
MODEL = GPTConfig(
    vocab_size=32, max_length=16, num_layers=4, embed_dim=32, attention=SoftmaxConfig(num_heads=4), dropout=0.1,
    attention_dropout=0.1,
)  # fmt: skip
B, T = 16, 16
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 32, (B, T + 1)).astype(np.int32)
BATCH = {
    "tokens": TOKENS[:, :-1],
    "targets": TOKENS[:, 1:],
    # Rows of very different weight: a mean of means would show.
    "weights": (RNG.random((B, T)) < np.linspace(0.05, 1, B)[:, None]).astype(np.float32),
}


@dataclasses.dataclass
class Setup:
    program: Program
    state: object

    def step(self, state, batch=BATCH):
        return self.program.train_step(state, self.batch(batch))

    def batch(self, batch=BATCH):
        return shard_batch(batch, self.program.batch_sharding)


@dataclasses.dataclass
class Ran:
    seen: np.ndarray
    """Losses and gradient norms."""
    params: object
    state: object
    step: object
    """The compiled program."""


@functools.cache
def initial(run_config):
    """A fresh state on one device; its values depend on neither mesh nor microbatches."""
    mesh = make_mesh(run_config.mesh, jax.devices()[:1])
    with use_mesh(mesh, run_config.mesh.rules):
        return Program(run_config, mesh).init()


def build(config, num_devices, microbatches=1, optimizer=None, ema_decay=None, model=MODEL, batch_size=B):
    """Called under the mesh's rules; the initial values are those of one device, laid out as the mesh has them."""
    optimizer = dataclasses.replace(optimizer or OptimizerConfig(learning_rate=1e-2), ema_decay=ema_decay)
    run_config = RunConfig(
        name="test", steps=10, batch_size=batch_size, microbatches=microbatches, model=model, optimizer=optimizer, mesh=config
    )  # fmt: skip
    program = Program(run_config, make_mesh(config, jax.devices()[:num_devices]))
    alone = dataclasses.replace(run_config, mesh=MeshConfig(), microbatches=1)
    return Setup(program, placed(initial(alone), program.abstract))


def run(config, num_devices=8, microbatches=1, **options):
    """Three steps. Asked for again, they are not run again."""
    return _run(config, num_devices, microbatches, **options)


@functools.cache
def _run(config, num_devices, microbatches, **options):
    with use_mesh(make_mesh(config, jax.devices()[:num_devices]), config.rules):
        setup = build(config, num_devices, microbatches, **options)
        state, batch, step = setup.state, setup.batch(), setup.program.train_step
        # A mapped step takes batches apart before its program does.
        step = step if config.strategy == "pmap" else step.lower(state, batch).compile()
        seen = []
        for _ in range(3):
            state, metrics = step(state, batch)
            seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return Ran(np.array(seen), jax.device_get(state.params), state, step)


def layout_name(config):
    """The strategy, and the axes that are given."""
    if not isinstance(config, MeshConfig):
        return str(config)
    sizes = [f"{axis} {size}" for axis in MESH_AXES if (size := getattr(config, axis)) is not None]
    return ", ".join([config.strategy, *sizes])


def on_one_device(**options):
    return run(MeshConfig(), 1, **options)


@pytest.mark.parametrize(
    ("config", "num_devices", "microbatches"),
    [
        (MeshConfig(), 1, 4),
        (MeshConfig(strategy="dp"), 8, 1),
        (MeshConfig(strategy="pmap"), 8, 2),
        (MeshConfig(strategy="fsdp"), 8, 1),
        (MeshConfig(strategy="fsdp", data=2), 8, 2),
        (MeshConfig(strategy="zero1"), 8, 1),
        (MeshConfig(strategy="zero2"), 8, 2),
        (MeshConfig(strategy="hsdp", fsdp=4), 8, 1),
        (MeshConfig(strategy="tensor", data=2), 8, 1),
        (MeshConfig(strategy="tensor_sequence", data=2), 8, 1),
        (MeshConfig(strategy="fsdp_tensor", tensor=2), 8, 1),
        (MeshConfig(strategy="context", data=2), 8, 1),
        (MeshConfig(strategy="ulysses", data=2), 8, 1),
        (MeshConfig(data=1, fsdp=2, tensor=2, context=2), 8, 1),
    ],
    ids=layout_name,
)
def test_every_layout_computes_what_one_device_does(config, num_devices, microbatches):
    got, expected = run(config, num_devices, microbatches), on_one_device()
    np.testing.assert_allclose(got.seen, expected.seen, rtol=2e-5)
    # Adam divides by the root of squared gradients: where those are near 0, rounding moves an update by up to its size.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-3), got.params, expected.params)


@pytest.mark.parametrize(
    "config", [MeshConfig(strategy="fsdp_tensor", tensor=2), MeshConfig(strategy="zero1")], ids=layout_name
)
def test_a_state_made_on_its_devices_is_that_of_one_device(config):
    with use_mesh(make_mesh(config), config.rules):
        setup = build(config, 8)
        state = setup.program.init()
        for made, expected in zip(jax.tree.leaves(state), jax.tree.leaves(setup.state), strict=True):
            np.testing.assert_array_equal(*map(jax.device_get, (as_data(made), as_data(expected))))
            assert made.sharding.is_equivalent_to(expected.sharding, made.ndim)


def as_data(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@pytest.mark.parametrize(("strategy", "route"), [("context", "collective-permute"), ("ulysses", "all-to-all")])
def test_a_sliced_sequence_meets_itself_by_the_strategys_route(strategy, route):
    compiled = run(MeshConfig(strategy=strategy, data=2)).step.as_text()
    other = {"collective-permute": "all-to-all", "all-to-all": "collective-permute"}[route]
    assert f" {route}(" in compiled
    assert f" {other}(" not in compiled


def test_ulysses_is_a_strategy_of_one_attention():
    for model in (MODEL, changed(MODEL, attention={"backend": "ulysses"})):
        assert suited(model, MeshConfig(strategy="ulysses")).attention.backend == "ulysses"
    assert suited(changed(MODEL, attention={"backend": "xla"}), MeshConfig()).attention.backend == "xla"
    with pytest.raises(
        UserError, match="attention.backend: got 'ring'; mesh.strategy ulysses supports auto and ulysses"
    ):
        suited(changed(MODEL, attention={"backend": "ring"}), MeshConfig(strategy="ulysses"))
    hybrid = dataclasses.replace(MODEL, pattern=(FastWeightConfig(num_heads=4), MODEL.attention))
    with pytest.raises(UserError, match="pattern.0.kind: got 'delta'; mesh.strategy ulysses shards sequences"):
        suited(hybrid, MeshConfig(strategy="ulysses"))
    with pytest.raises(UserError, match="family: got 'recurrent'; mesh.strategy ulysses needs a Transformer"):
        suited(RecurrentConfig(), MeshConfig(strategy="ulysses"))


@pytest.mark.parametrize(
    "config", [MeshConfig(strategy="expert", data=2), MeshConfig(strategy="expert", tensor=2)], ids=layout_name
)
def test_experts_on_devices_of_their_own_compute_what_one_device_does(config):
    model = dataclasses.replace(
        MODEL, mlp=ExpertsConfig(num_experts=4, experts_per_token=2, capacity_factor=1.25, dim=32)
    )
    got = run(config, model=model)
    np.testing.assert_allclose(got.seen, on_one_device(model=model).seen, rtol=2e-5)
    up = got.state.params["layers"]["blocks"]["feed_forward"]["up_EDF"].get_value()
    assert up.addressable_shards[0].data.shape[1] == 1


@pytest.mark.parametrize(
    ("config", "parameters", "moments"),
    [
        (MeshConfig(strategy="zero1"), 1, 8),
        (MeshConfig(strategy="fsdp"), 8, 8),
        (MeshConfig(strategy="hsdp", fsdp=4), 4, 4),
        (MeshConfig(strategy="fsdp_tensor", tensor=2), 8, 8),
    ],
    ids=layout_name,
)
def test_devices_hold_their_slices_of_parameters_and_moments(config, parameters, moments):
    state = run(config).state
    for tree, slices in ((state.params, parameters), (state.opt_state[1][0].mu, moments)):
        kernel = tree["layers"]["blocks"]["attention"]["query"]["kernel"].get_value()
        assert kernel.addressable_shards[0].data.size * slices == kernel.size


def test_statistics_on_the_host_compute_the_same(tmp_path):
    config = MeshConfig(strategy="fsdp", offload_optimizer=True)
    got, expected = run(config), run(MeshConfig(strategy="fsdp"))
    np.testing.assert_array_equal(got.seen, expected.seen)
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)
    state = got.state
    moments = jax.tree.leaves(state.opt_state[1][0].mu)
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "moments", state.opt_state[1][0].mu)
        checkpointer.wait_until_finished()
        described = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state.opt_state[1][0].mu
        )
        restored = checkpointer.restore(tmp_path / "moments", described)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored)} == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, restored, state.opt_state[1][0].mu)


def test_a_narrow_moment_takes_half_and_learns():
    narrow = OptimizerConfig(learning_rate=1e-2, moment_dtype="bfloat16")
    got = on_one_device(optimizer=narrow)
    adam = got.state.opt_state[1][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(got.seen[:, 0], on_one_device().seen[:, 0], rtol=2e-3)


def test_a_batch_can_be_learnt_by_heart_with_one_program():
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.0)
    with use_mesh(make_mesh(MeshConfig(), jax.devices()[:1]), MeshConfig().rules):
        setup = build(MeshConfig(), 1, optimizer=optimizer)
        state, losses = setup.state, []
        for _ in range(120):
            state, metrics = setup.step(state)
            losses.append(float(metrics["loss"]))
    assert setup.program.train_step._cache_size() == 1
    assert losses[0] > 3
    assert losses[-1] < 0.1


def test_a_moving_average_and_an_update_that_is_not_finite():
    """The average is one; what is not finite is left out, of it too."""
    with use_mesh(make_mesh(MeshConfig(), jax.devices()[:1]), MeshConfig().rules):
        setup = build(MeshConfig(), 1, ema_decay=0.75)
        before = jax.device_get((setup.state.params, setup.state.opt_state, setup.state.ema))
        state, metrics = setup.step(setup.state, BATCH | {"weights": np.full((B, T), np.inf, np.float32)})
        assert float(metrics["skipped"]) == 1
        assert int(state.step) == 1
        after = jax.device_get((state.params, state.opt_state, state.ema))
        jax.tree.map(np.testing.assert_array_equal, after, before)
        state, metrics = setup.step(state)
        assert float(metrics["skipped"]) == 0
        assert np.isfinite(float(metrics["loss"]))
        expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before[0], jax.device_get(state.params))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), jax.device_get(state.ema), expected)


def test_evaluation_takes_the_same_mean():
    with use_mesh(make_mesh(MeshConfig(), jax.devices()[:1]), MeshConfig().rules):
        setup = build(MeshConfig(), 1)
        sums, _ = setup.program.eval_step(setup.state.params, setup.batch())
        model = nnx.merge(graphdef_of(lambda rngs: GPT(MODEL, rngs=rngs)), setup.state.params)
        likely = jax.nn.log_softmax(jax.jit(lambda tokens: model(tokens).logits)(BATCH["tokens"]))
        nll = -np.take_along_axis(np.asarray(likely), BATCH["targets"][..., None], axis=-1)[..., 0]
        expected = (nll * BATCH["weights"]).sum() / BATCH["weights"].sum()
        assert float(sums.nll / sums.weight) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "muon", "lion", "sgd"])
def test_every_optimiser_state_can_be_sharded(name):
    config = MeshConfig(strategy="fsdp")
    with use_mesh(make_mesh(config), config.rules):
        params = build(config, 8).state.params
        make_state = state_maker(lambda rngs: GPT(MODEL, rngs=rngs), make_optimizer(OptimizerConfig(name=name), 10))
        state = init_state(make_state, abstract_state(make_state, make_mesh(config)), 0, params)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(
    ("config", "num_devices", "message"),
    [
        (MeshConfig(data=3), 8, r"data 3 = 3 devices, but there are 8 \(factors 1, 2, 4, 8\)"),
        (MeshConfig(strategy="fsdp", fsdp=16), 8, "--devices 16"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(config, num_devices, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config, jax.devices()[:num_devices])


def test_a_batch_that_the_devices_do_not_divide():
    config = MeshConfig(strategy="fsdp", data=2)
    with pytest.raises(UserError, match="batch_size: got 12, .* try 8 or 16"):
        check_batch(make_mesh(config), config.rules, 12, 1)


def test_a_width_that_the_devices_do_not_divide():
    model = dataclasses.replace(MODEL, embed_dim=36)
    config = MeshConfig(strategy="fsdp")
    with use_mesh(make_mesh(config), config.rules), pytest.raises(UserError, match="do not divide evenly"):
        build(config, 8, model=model)
