"""What holds for every family: it learns, padding is nothing, a scan is a loop, eight devices are one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.changed import changed
from tests.made import made
from train.loss import LossConfig
from train.objectives import OBJECTIVES
from train.objectives.encoder_decoder import EncoderDecoderObjective
from train.objectives.masked import HiddenTokens
from train.parallel.mesh import MeshConfig, batch_sharding, make_mesh, shard_batch, use_mesh
from transformer.functional import graphdef_of
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.layers.position import RelativeConfig, RotaryConfig
from transformer.mixers.disentangled import DisentangledConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.electra import ElectraConfig
from transformer.models.encoder_decoder import T5Config, VaswaniConfig
from transformer.models.families import count_parameters, flops_per_token, make_model
from transformer.models.gpt import GPTConfig
from transformer.models.heads import ClassificationHeadConfig, PretrainingHeadConfig
from transformer.models.recurrent_config import RecurrentConfig

V, B, T, S = 32, 8, 12, 10
SMALL = {
    "vocab_size": V,
    "max_length": 16,
    "num_layers": 2,
    "embed_dim": 16,
    "attention": SoftmaxConfig(num_heads=2),
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
EXPERTS = {"mlp": ExpertsConfig(num_experts=4, experts_per_token=2, dim=32)}
T5_ATTENTION = SoftmaxConfig(num_heads=2, head_dim=8, bias=False, scale=1.0, position=RelativeConfig())
ROTARY = SoftmaxConfig(num_heads=2, bias=False, position=RotaryConfig())
MODELS = {
    "gpt": (GPTConfig(**SMALL), "causal"),
    "gpt, prefix": (GPTConfig(**SMALL), "prefix"),
    "gpt, experts": (GPTConfig(**SMALL, **EXPERTS), "causal"),
    "bert, sentences": (BertConfig(**SMALL, head=PretrainingHeadConfig()), "next_sentence"),
    "bert, modern": (
        BertConfig(
            **SMALL | {"num_layers": 6}, norm_first=True, token_types=0, norm_bias=False,
            pattern=(changed(ROTARY, window=2), ROTARY), mlp=DenseConfig(activation="geglu", bias=False),
        ),
        "masked",
    ),
    "bert, disentangled": (
        BertConfig(
            **SMALL | {"attention": DisentangledConfig(num_heads=2, max_distance=6, num_buckets=4)}, token_types=0
        ),
        "masked",
    ),
    "electra": (
        ElectraConfig(
            **SMALL | {"embed_dim": 32, "attention": SoftmaxConfig(num_heads=4)}, embedding_size=16, generator_size=0.5
        ),
        "replaced_tokens",
    ),
    "bert, classes, experts": (
        BertConfig(**SMALL | EXPERTS, head=ClassificationHeadConfig(num_labels=3, pooling="mean")), "classification",
    ),
    "vaswani": (VaswaniConfig(**SMALL), "seq2seq"),
    "t5": (
        T5Config(
            **SMALL | {"attention": T5_ATTENTION, "num_decoder_layers": 1},
            mlp=DenseConfig(dim=32, activation="geglu", bias=False),
        ),
        "span_corruption",
    ),
    "t5, experts": (
        T5Config(
            **SMALL | {"attention": T5_ATTENTION}, tie_embeddings=True, scale_logits=True,
            mlp=ExpertsConfig(num_experts=4, experts_per_token=2, dim=32, activation="geglu", capacity_factor=1.5),
        ),
        "seq2seq",
    ),
    "recurrent": (RecurrentConfig(vocab_size=V, source_vocab_size=V, embed_dim=16, hidden_dim=16), "seq2seq"),
}  # fmt: skip


def batch_of(objective: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of different lengths with padding behind them."""
    rng = np.random.default_rng(seed)

    def side(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sizes = rng.integers(length // 2, length + 1, B)
        valid = np.arange(length) < sizes[:, None]
        tokens = np.where(valid, rng.integers(1, V, (B, length)), 0).astype(np.int32)
        positions = np.broadcast_to(np.arange(length), (B, length)) * valid
        return tokens, valid.astype(np.int32), positions.astype(np.int32)

    tokens, segments, positions = side(T)
    targets = np.where(segments, rng.integers(1, V, (B, T)), 0).astype(np.int32)
    batch = {
        "tokens": tokens, "targets": targets, "weights": segments.astype(np.float32), "segments": segments,
        "positions": positions,
    }  # fmt: skip
    if issubclass(OBJECTIVES[objective], HiddenTokens):
        hidden = (rng.random((B, T)) < 0.4) & (segments > 0)
        batch["predicted"] = np.argsort(~hidden, axis=1, kind="stable")[:, :6].astype(np.int32)
        hidden &= np.cumsum(hidden, axis=1) <= 6
        batch["weights"] *= hidden
    if objective == "next_sentence":
        batch["token_types"] = (positions >= 3).astype(np.int32)
        batch["labels"] = rng.integers(0, 2, B).astype(np.int32)
    if objective == "classification":
        del batch["targets"]
        batch |= {"weights": np.ones((B, 1), np.float32), "labels": rng.integers(0, 3, B).astype(np.int32)}
        batch["weights"][-1], batch["labels"][-1] = 0, -1  # a row of padding
    if objective == "prefix":
        batch["prefix"] = np.full(B, 4, np.int32)
        batch["weights"] *= np.arange(T) >= 4
    if issubclass(OBJECTIVES[objective], EncoderDecoderObjective):
        batch |= dict(zip(("source_tokens", "source_segments", "source_positions"), side(S), strict=True))
    return batch


@functools.cache
def make(config):
    """The model in two parts, made by one compiled program."""
    return jax.jit(lambda: nnx.split(make_model(config, nnx.Rngs(0)), nnx.Param))()


@functools.cache
def loss_and_gradient(name: str, **changes):
    config, objective = MODELS[name]
    graphdef = graphdef_of(functools.partial(make_model, dataclasses.replace(config, **changes)))

    @jax.jit
    def run(params, batch):
        def mean(params):
            sums = OBJECTIVES[objective]().loss(nnx.merge(graphdef, params), batch, LossConfig())
            return sums.total() / sums.weight

        return jax.value_and_grad(mean)(params)

    return make(config)[1], run


@functools.cache
def expected_of(name: str):
    params, run = loss_and_gradient(name)
    return run(params, batch_of(MODELS[name][1]))


def padded(name: str) -> dict[str, np.ndarray]:
    """The model's batch with other tokens where there is padding, and more of it."""
    batch = batch_of(MODELS[name][1])
    for tokens, segments in (("tokens", "segments"), ("source_tokens", "source_segments")):
        if tokens in batch:
            batch[tokens] = np.where(batch[segments], batch[tokens], 7)
    if getattr(getattr(MODELS[name][0], "mlp", None), "capacity_factor", None) is not None:
        # Room in proportion to the row's length depends on it.
        return batch
    fixed = ("predicted", "weights") if "labels" in batch and "targets" not in batch else ("predicted",)
    return {key: np.pad(x, ((0, 0), (0, 3))) if x.ndim == 2 and key not in fixed else x for key, x in batch.items()}


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_overfits_a_batch(name):
    """Adam (Kingma & Ba 2014, algorithm 1), in NumPy: its steps need no program but the gradient's."""
    params, run = loss_and_gradient(name)
    batch = jax.device_put(batch_of(MODELS[name][1]))
    # What the routers add never goes to zero.
    enough = 0.2 if "experts" in name else 0.1
    # At a higher rate routers may jump late, and the loss with them.
    rate = 0.005 if "experts" in name else 0.01
    leaves, structure = jax.tree.flatten(jax.device_get(params))
    first, second, losses = [0.0] * len(leaves), [0.0] * len(leaves), []
    for step in range(1, 301):
        loss, gradient = run(jax.tree.unflatten(structure, leaves), batch)
        gradient = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
        first = [0.9 * mean + 0.1 * g for mean, g in zip(first, gradient, strict=True)]
        second = [0.999 * mean + 0.001 * g * g for mean, g in zip(second, gradient, strict=True)]
        moved = [
            m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8) for m, v in zip(first, second, strict=True)
        ]
        leaves = [leaf - np.float32(rate) * move for leaf, move in zip(leaves, moved, strict=True)]
        losses.append(float(loss))
        if losses[-1] < enough:
            break
    assert losses[0] > (1 if "classes" in name else 2)
    assert losses[-1] < enough


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt, prefix"])
def test_padding_has_no_influence(name):
    params, run = loss_and_gradient(name)
    batch = padded(name)
    # The other tokens alone, by the program that is there.
    same = {key: batch[key][tuple(map(slice, x.shape))] for key, x in batch_of(MODELS[name][1]).items()}
    assert_close(run(params, same), expected_of(name))
    if name not in LOOPED:
        assert_close(run(params, batch), expected_of(name), atol=2e-6)


LOOPED = ["gpt", "gpt, experts", "bert, sentences", "bert, modern", "electra", "vaswani", "t5"]


@pytest.mark.parametrize("name", LOOPED)
def test_a_scan_is_a_loop_and_more_padding_is_nothing(name):
    params, run = loss_and_gradient(name, scan_layers=False)
    assert_close(run(params, padded(name)), expected_of(name))


SHARDED = [
    "gpt, experts",
    "bert, sentences",
    "bert, disentangled",
    "electra",
    "bert, classes, experts",
    "t5, experts",
    "recurrent",
]


@pytest.mark.parametrize("name", SHARDED)
def test_eight_devices_are_one(name):
    config = MeshConfig(strategy="fsdp")
    mesh = make_mesh(config)
    with use_mesh(mesh, config.rules):
        # Traced anew, under the mesh.
        params, run = loss_and_gradient.__wrapped__(name)
        got = run(params, shard_batch(batch_of(MODELS[name][1]), batch_sharding(mesh, config.rules)))
    assert_close(got, expected_of(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vaswani", "t5, experts"])
def test_packed_pairs_are_apart(name):
    config = MODELS[name][0]
    if config.mlp.kind == "experts":
        config = changed(config, mlp={"capacity_factor": None})
    graphdef, params = made(functools.partial(make_model, config))
    run = jax.jit(lambda *tokens, **options: nnx.merge(graphdef, params)(*tokens, **options).logits)
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(1, V, s), rng.integers(1, V, t)) for s, t in ((4, 5), (6, 3))]

    def row(sides):
        tokens = np.concatenate(sides)[None]
        segments = np.concatenate([np.full(len(side), n + 1) for n, side in enumerate(sides)])[None]
        positions = np.concatenate([np.arange(len(side)) for side in sides])[None]
        return (jnp.asarray(x, jnp.int32) for x in (tokens, segments, positions))

    source, source_segments, source_positions = row([pair[0] for pair in pairs])
    target, segments, positions = row([pair[1] for pair in pairs])
    packed = run(
        source, target, source_segments_BS=source_segments, source_positions_BS=source_positions,
        segments_BT=segments, positions_BT=positions,
    )  # fmt: skip
    apart = [run(*(jnp.asarray(side, jnp.int32)[None] for side in pair)) for pair in pairs]
    np.testing.assert_allclose(packed, np.concatenate(apart, axis=1), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vaswani", "t5"])
def test_step_by_step_is_all_at_once(name):
    graphdef, params = make(MODELS[name][0])
    batch = batch_of("seq2seq")

    @jax.jit
    def at_once(source, target, segments):
        model = nnx.merge(graphdef, params)
        whole = model(source, target, source_segments_BS=segments, return_weights=True)
        apart = model.unstacked()
        memory = apart.encode(source, source_segments_BS=segments)
        return whole.logits, whole.weights, memory, apart.begin(memory, T)

    @jax.jit
    def step(token, state, memory):
        return nnx.merge(graphdef, params).unstacked().step(token, state, memory, return_weights=True)

    whole, all_weights, memory, state = at_once(batch["source_tokens"], batch["tokens"], batch["source_segments"])
    whole, all_weights = np.asarray(whole), np.asarray(all_weights)
    for place in range(T):
        logits, state, weights = step(batch["tokens"][:, place], state, memory)
        np.testing.assert_allclose(logits, whole[:, place], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weights, all_weights[-1].mean(1)[:, place], atol=1e-5)
    padding = batch["source_segments"] == 0
    assert (all_weights * padding[None, :, None, None]).max() == 0


def test_shapes_of_the_papers():
    # Vaswani et al. 2017, table 3: 65 million with a shared vocabulary of 37,000.
    assert count_parameters(VaswaniConfig()) == pytest.approx(65e6, rel=0.05)
    # Devlin et al. 2018: 110 million, and the masked head's transform and bias.
    assert count_parameters(BertConfig()) == pytest.approx(110e6, rel=0.01)
    # Raffel et al. 2020's released t5-v1_1-small.
    assert count_parameters(T5Config()) == 76_961_152
    assert flops_per_token(VaswaniConfig(), 32) > 2 * 37_000 * 512
