"""Interventions on every family: what holds whatever the weights are."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.made import made
from transformer.errors import UserError
from transformer.hooks import Hooks
from transformer.interpret import attention_maps
from transformer.interpret.interventions import (
    Subject,
    ablate,
    attribute,
    encoder_inputs,
    head_importance,
    head_statistics,
    induction_scores,
    logit_lens,
    next_token_inputs,
    pair_inputs,
    patch,
)
from transformer.interpret.rollout import entropy, mean_distance
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.layers.position import RotaryConfig
from transformer.mixers.differential import DifferentialConfig
from transformer.mixers.fast_weights import FastWeightConfig
from transformer.mixers.latent import LatentConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.electra import ElectraConfig
from transformer.models.encoder_decoder import T5Config, VaswaniConfig
from transformer.models.families import make_model
from transformer.models.gpt import GPTConfig
from transformer.models.heads import AnswerHeadConfig, ClassificationHeadConfig
from transformer.models.layer_stack import hooked
from transformer.models.recurrent_config import RecurrentConfig

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = {"vocab_size": 24, "max_length": 12, "num_layers": 2, "embed_dim": 16}
HEADS = SoftmaxConfig(num_heads=2)
RELATIVE = T5Config().attention.position
MODELS = {
    "gpt": GPTConfig(**SMALL, attention=HEADS, mlp=DenseConfig(dim=32)),
    "modern": GPTConfig(
        **SMALL, attention=SoftmaxConfig(num_heads=4, num_kv_heads=2, position=RotaryConfig(), bias=False, qk_norm=True),
        norm="rms_norm", norm_outputs=True, scale_embeddings=True, tie_embeddings=False, remat="full",
        mlp=DenseConfig(dim=32, activation="swiglu"),
    ),
    "parallel": GPTConfig(**SMALL, attention=HEADS, parallel_residual=True, norm_outputs=True, mlp=DenseConfig(dim=32)),
    "hybrid": GPTConfig(
        **SMALL, pattern=(FastWeightConfig(kind="delta", num_heads=4), LatentConfig(num_heads=2)),
        mlp=ExpertsConfig(num_experts=2, experts_per_token=1, dim=16),
    ),
    "differential": GPTConfig(**SMALL, attention=DifferentialConfig(num_heads=2), mlp=DenseConfig(dim=32)),
    "bert": BertConfig(**SMALL, attention=HEADS, mlp=DenseConfig(dim=32)),
    "classifier": BertConfig(
        **SMALL, attention=HEADS, mlp=DenseConfig(dim=32), norm_first=True, head=ClassificationHeadConfig(num_labels=3),
    ),
    "t5": T5Config(
        **SMALL, attention=SoftmaxConfig(num_heads=2, head_dim=8, bias=False, scale=1.0, position=RELATIVE),
        mlp=DenseConfig(dim=32, bias=False), scale_logits=True, tie_embeddings=True, num_decoder_layers=3,
    ),
    "vaswani": VaswaniConfig(**SMALL, attention=HEADS, mlp=DenseConfig(dim=32), output_bias=True),
}  # fmt: skip
FIRST, SECOND = [3, 7, 1, 9, 4], [3, 8, 1, 9, 4]


@functools.cache
def subject(name):
    return Subject(nnx.merge(*made(lambda rngs: make_model(MODELS[name], rngs), std=0.4)))


def inputs(name, *texts):
    texts = texts or (FIRST,)
    family = MODELS[name].family
    if family == "gpt":
        return next_token_inputs(texts)
    if family == "bert":
        return encoder_inputs(texts, [2] * len(texts))
    return pair_inputs(texts, [[5, 6]] * len(texts), start=0, end=0)


EVERY = pytest.mark.parametrize("name", MODELS)


@EVERY
def test_without_hooks_and_with_hooks_that_only_look_the_result_is_the_same(name):
    own, given = subject(name), inputs(name)
    final = f"{own.last}final"
    plain = own.model(
        *([] if given.source_BS is None else [jnp.asarray(given.source_BS)]), jnp.asarray(given.tokens_BT)
    )
    hooks = Hooks(keep=(final,))
    hooked(own.model, hooks)(
        *([] if given.source_BS is None else [jnp.asarray(given.source_BS)]), jnp.asarray(given.tokens_BT)
    )
    read = own.readout(own.model, hooks.kept[final], jnp.asarray(given.segments_BT))
    logits = plain.logits[:, None] if own.scores_rows else plain.logits
    np.testing.assert_allclose(read, logits, rtol=1e-4, atol=1e-4)
    assert own.model.layers.hooks is None if own.last == "" else own.model.decoder.hooks is None


@pytest.mark.parametrize(("hooks", "message"), [
    ({"change": {"layers.0.atention.heads": jnp.zeros_like}},
     r"'layers.0.atention.heads' was not met. Did you mean 'layers.0.attention.heads'\?"),
    ({"keep": ("layers.2.out", "embed", "final.norm")}, "'final.norm' was not met.* 'layers.2.out' was not met"),
])  # fmt: skip
def test_a_place_that_the_model_does_not_have_is_named(hooks, message):
    own = subject("gpt")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *given: nnx.state(own.call(*given, Hooks(**hooks))), own.params, inputs("gpt"))


def test_what_can_only_be_kept_is_not_changed():
    with pytest.raises(ValueError, match=r"change: 'layers.0.attention.weights' can be kept, not changed"):
        Hooks({"layers.0.attention.weights": jnp.zeros_like})


@EVERY
def test_patching_what_the_answer_is_read_from_restores_it(name):
    own = subject(name)
    found = patch(own, inputs(name), inputs(name, SECOND))
    # Before the first layer the texts differ in one word, which is all that they differ in.
    assert found.stream["encoder." if own.last else ""][0, 1] == pytest.approx(1, abs=1e-3)
    if not own.scores_rows:
        at = int(inputs(name).at_B[0])
        assert found.stream[own.last][-1, at] == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(np.delete(found.stream[own.last][-1], at), 0, atol=1e-3)
    if own.last:
        # The target is the same, so that the decoder differs from its attention to the source on.
        np.testing.assert_allclose(found.stream["decoder."][0], 0, atol=1e-4)
        assert set(found.heads) == {"encoder.attention", "decoder.attention", "decoder.cross"}
        assert found.heads["decoder.cross"].shape == (own.stacks["decoder."].num_layers, 2)


@pytest.mark.parametrize("name", ["gpt", "modern", "parallel", "hybrid", "differential", "t5"])
def test_attributions_add_up(name):
    found = attribute(subject(name), inputs(name), answer=5, instead=11)
    assert found.total == pytest.approx(found.difference, rel=1e-4, abs=1e-4)
    assert abs(found.difference) > 0.01 and np.nanmax(np.abs(next(iter(found.heads.values())))) > 1e-4


@pytest.mark.parametrize(("name", "why"), [
    ("bert", "model.norm_first: false"), ("vaswani", "model.norm_first: false"), ("classifier", "model.head: 'classification'"),
])  # fmt: skip
def test_attribution_is_refused_where_logits_are_no_sum(name, why):
    with pytest.raises(UserError, match=f"{why}.* so that logits are not a sum of parts; use ablation or patching"):
        attribute(subject(name), inputs(name))


@EVERY
def test_the_last_layer_of_the_lens_is_the_models_own_answer(name):
    own, given = subject(name), inputs(name)
    found = logit_lens(own, given, top=2)
    scores = own.scores(given)[0][0]
    at = 0 if own.scores_rows else int(given.at_B[0])
    assert found.tokens_LTK[-1, at, 0] == scores.argmax()
    assert found.probabilities_LTK[-1, at, 0] == pytest.approx(float(jax.nn.softmax(scores).max()), rel=1e-4)
    assert found.tokens_LTK.shape[0] == own.stacks[own.last].num_layers + 1


@pytest.mark.parametrize("name", ["hybrid", "classifier", "t5"])
def test_importance_is_the_ablation_of_each_head(name):
    own, given = subject(name), inputs(name, FIRST, SECOND[:4])
    found = head_importance(own, given, "mean", answer=0, instead=1)
    for head in (own.all_heads()[0], own.all_heads()[-1]):
        change = ablate(own, given, [head], "mean").change_BC
        expected = -np.mean(change[:, 0] - change[:, 1])
        assert found.tables[head[0]][head[1:]] == pytest.approx(expected, abs=1e-4)
    if name == "hybrid":
        # Layers have different numbers of heads.
        assert np.isnan(found.tables["attention"][1, 2:]).all() and not np.isnan(found.tables["attention"][0]).any()


@pytest.mark.parametrize("name", ["gpt", "hybrid", "classifier", "t5"])
def test_ablation_is_the_same_in_chunks_of_rows(name):
    own, given = subject(name), inputs(name, FIRST, SECOND[:4], FIRST[1:])
    # Two rows at once, of 5 tokens or of 5 and 3: the second chunk ends with a row of padding.
    chunked = Subject(own.model, tokens_of_pass=16 if name == "t5" else 10)
    assert [start for start, _ in chunked.chunks(given)] == [0, 2] and len(list(own.chunks(given))) == 1
    for how in ("zero", "mean"):
        expected, found = (ablate(one, given, own.all_heads()[:2], how) for one in (own, chunked))
        np.testing.assert_allclose(found.ablated_scores_BC, expected.ablated_scores_BC, atol=1e-4)
        assert found.ablated_loss == (None if expected.loss is None else pytest.approx(expected.ablated_loss, rel=1e-5))
    expected, found = (head_importance(one, given, "mean").tables for one in (own, chunked))
    for part, table in expected.items():
        np.testing.assert_allclose(found[part], table, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_statistics_are_those_of_the_attention_maps(name):
    own = subject(name)
    maps = attention_maps(own.model, FIRST).weights_LNTS
    found = head_statistics(own, inputs(name))["attention"]
    np.testing.assert_allclose(found.entropy, entropy(maps), atol=1e-4)
    np.testing.assert_allclose(found.distance, mean_distance(maps), atol=1e-4)
    later = np.arange(1, 5)
    np.testing.assert_allclose(found.previous, maps[:, :, later, later - 1].mean(-1), atol=1e-4)
    np.testing.assert_allclose(found.first, maps[:, :, later, 0].mean(-1), atol=1e-4)


def test_statistics_of_pairs_and_of_hybrids():
    found = head_statistics(subject("t5"), inputs("t5", FIRST, FIRST[:3]))
    assert {part: one.entropy.shape for part, one in found.items()} == {
        "encoder.attention": (2, 2), "decoder.attention": (3, 2), "decoder.cross": (3, 2),
    }  # fmt: skip
    assert found["decoder.cross"].previous is None is found["decoder.cross"].distance
    mixed = head_statistics(subject("hybrid"), inputs("hybrid"))["attention"].entropy
    assert np.isnan(mixed[0]).all() and not np.isnan(mixed[1, :2]).any()
    for name, message in (("differential", "not distributions"), ("bert", "induction needs gpt"), ("t5", "needs gpt")):
        with pytest.raises(UserError, match=message):
            induction_scores(subject(name))


def test_statistics_of_pairs_are_the_same_in_chunks_of_rows():
    own, given = subject("t5"), inputs("t5", FIRST, FIRST[:3], SECOND[:4])
    whole = head_statistics(own, given)
    # Two rows of one layer: 4 arrays of 2 x 5 x 5 numbers each. The second chunk is filled up with padding.
    chunked = head_statistics(own, given, max_bytes=2 * 4 * 4 * 2 * 25)
    for part, expected in whole.items():
        for measure, values in dataclasses.asdict(expected).items():
            found = getattr(chunked[part], measure)
            assert (found is None) == (values is None)
            if values is not None:
                np.testing.assert_allclose(found, values, atol=1e-5, err_msg=f"{part} {measure}")


@pytest.mark.parametrize(("config", "message"), [
    (RecurrentConfig(vocab_size=20, max_length=8, embed_dim=4, hidden_dim=4, encoder_dim=2),
     "model.family: 'recurrent' has no blocks of attention"),
    (BertConfig(**SMALL, attention=HEADS, head=AnswerHeadConfig()), "model.head: 'answer' gives neither"),
    (ElectraConfig(**SMALL, attention=HEADS), "model.head: 'replaced' gives neither"),
])  # fmt: skip
def test_models_without_such_parts_or_answers_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        Subject(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))))


def test_heads_of_pairs_are_named_with_their_part():
    with pytest.raises(
        UserError, match=r"heads: got \(0, 1\); allowed: \(part, layer, head\), with part one of encoder"
    ):
        ablate(subject("t5"), inputs("t5"), [(0, 1)])
    found = ablate(subject("t5"), inputs("t5"), [("decoder.cross", 2, 1)])
    assert np.abs(found.change_BC).max() > 1e-4 and found.loss_change is not None
