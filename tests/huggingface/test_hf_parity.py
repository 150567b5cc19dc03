"""Checkpoints of transformers: what they compute there and here, and back again, bit for bit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.huggingface import peers
from tests.huggingface.ours import on_one_device
from transformer.functional import graphdef_of
from transformer.huggingface import checkpoint
from transformer.models.families import make_model

pytestmark = pytest.mark.torch

ROWS, LENGTH, PADDED = 3, 13, 9
"""Of the last row only so many tokens are none that pad it."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread_of_torch():
    """A second one would wait for the first, at models of this size."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outputs(read, params, call, *arrays):
    """What a call gives of our model with a checkpoint's parameters, on the host."""
    graphdef = graphdef_of(functools.partial(make_model, read.config))
    run = jax.jit(lambda params, *arrays: call(nnx.merge(graphdef, params), *arrays))
    return jax.device_get(run(params, *(None if x is None else jnp.asarray(x, jnp.int32) for x in arrays)))


def close(ours, theirs):
    """Within 1e-4, relative to the largest number."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=1e-4)


def given(vocab):
    """Token ids, and where they are none that pad a row."""
    valid = np.ones((ROWS, LENGTH), np.int32)
    valid[-1, PADDED:] = 0
    return peers.tokens(ROWS, LENGTH, vocab), valid


def round_trip(read, params, name, folder, compare):
    """Export, import again: the same bits; and transformers loads what was exported without a word."""
    folder.mkdir()
    special = {key: value for key, value in read.data.items() if key.endswith("token_id")}
    model_type = read.architecture.model_type
    model_type, written = checkpoint.write(folder, read.config, params, model_type=model_type, extra=special)
    assert (model_type, written) == (read.architecture.model_type, name)
    again = checkpoint.read(folder)
    assert again.config == read.config
    same = jax.tree.map(np.array_equal, params, again.params(on_one_device(again.config)))
    assert all(jax.tree.leaves(same))
    theirs, wrong = peers.loaded(name, folder)
    assert not wrong
    compare(theirs)


@pytest.mark.parametrize("case", peers.ENCODERS)
def test_encoders(case, tmp_path):
    import torch

    name, fields = peers.ENCODERS[case]
    theirs = peers.peer(name, fields)
    read = checkpoint.read(peers.saved(theirs, tmp_path / "theirs"))
    assert read.name == name
    params = read.params(on_one_device(read.config))
    ids, valid = given(fields["vocab_size"])
    types = np.random.default_rng(0).integers(0, max(read.config.token_types, 1), ids.shape)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(valid)}
    if read.config.token_types > 1:
        inputs["token_type_ids"] = torch.tensor(types)
    if read.config.head.kind == "choice":
        inputs = {key: value[None] for key, value in inputs.items()}
    # In the other classes what a head gives tells whether the states are theirs.
    is_body = name.endswith("Model")

    def call(model, ids, valid, types):
        options = {"segments_BT": valid, "token_types_BT": types}
        output = model(ids, **options)
        return model.hidden(ids, **options)[0] if is_body else None, output.logits, output.pooled_logits

    hidden, logits, pooled_logits = outputs(
        read, params, call, ids, valid, types if read.config.token_types > 1 else None
    )

    def compare(theirs):
        with torch.no_grad():
            out = theirs(**inputs)
        real = torch.tensor(valid, dtype=torch.bool)
        if is_body:
            close(hidden[valid > 0], out.last_hidden_state[real])
        match read.config.head.kind:
            case "masked":
                close(logits[valid > 0], out.logits[real])
            case "tokens" | "replaced":
                close(logits[valid > 0], out.logits[real])
            case "pretraining":
                close(logits[valid > 0], out.prediction_logits[real])
                close(pooled_logits, out.sop_logits if "sop_logits" in out else out.seq_relationship_logits)
            case "answer":
                close(logits[..., 0][:2], out.start_logits[:2])
                close(logits[..., 1][:2], out.end_logits[:2])
            case "choice":
                close(logits[:, 0][None], out.logits)
            case "classification":
                close(logits, out.logits)
            case "embedding" if read.config.head.pooler:
                close(pooled_logits, out.pooler_output)

    compare(theirs)
    round_trip(read, params, name, tmp_path / "ours", compare)


# Each of these differs from another of its architecture in sizes alone, which others have too.
SIZES = (
    "GPT2, one head", "Mistral, multi-query", "Mistral, odd sizes", "Qwen2, all heads", "Qwen3, one group",
    "Marian, wide",
)  # fmt: skip


@pytest.mark.parametrize("case", [case for case in peers.DECODERS if case not in SIZES])
def test_decoders(case, tmp_path):
    import torch

    name, fields = peers.DECODERS[case]
    theirs = peers.peer(name, fields)
    read = checkpoint.read(peers.saved(theirs, tmp_path / "theirs"))
    params = read.params(on_one_device(read.config))
    ids, valid = given(fields["vocab_size"])

    def call(model, ids, valid):
        hidden, _ = model.hidden(ids, segments_BT=valid)
        return hidden, model.logits(hidden)

    hidden, logits = outputs(read, params, call, ids, valid)

    def compare(theirs):
        with torch.no_grad():
            out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(valid), output_hidden_states=True)
        real = torch.tensor(valid, dtype=torch.bool)
        close(hidden[valid > 0], out.hidden_states[-1][real])
        if not name.endswith("Model"):
            close(logits[valid > 0], out.logits[real])

    compare(theirs)
    # A body is read as a whole model, whose head is tied.
    whole = read.architecture.class_of(read.config)
    round_trip(read, params, whole, tmp_path / "ours", compare)


@pytest.mark.parametrize("case", [case for case in peers.ENCODER_DECODERS if case not in SIZES])
def test_encoder_decoders(case, tmp_path):
    import torch

    name, fields = peers.ENCODER_DECODERS[case]
    theirs = peers.peer(name, fields)
    read = checkpoint.read(peers.saved(theirs, tmp_path / "theirs"))
    params = read.params(on_one_device(read.config))
    source, valid = given(fields["vocab_size"])
    target = peers.tokens(ROWS, 7, fields["vocab_size"]).copy()
    target[:, 0] = read.config.start_token

    def call(model, source, target, valid):
        return model(source, target, source_segments_BS=valid).logits

    logits = outputs(read, params, call, source, target, valid)

    def compare(theirs):
        with torch.no_grad():
            out = theirs(
                input_ids=torch.tensor(source),
                attention_mask=torch.tensor(valid),
                decoder_input_ids=torch.tensor(target),
            )
        close(logits, out.logits)

    compare(theirs)
    round_trip(read, params, name, tmp_path / "ours", compare)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "LlamaConfig"), ("mistral", "MistralConfig"), ("qwen2", "Qwen2Config"), ("qwen3", "Qwen3Config"),
        ("mixtral", "MixtralConfig"), ("qwen3_moe", "Qwen3MoeConfig"), ("gemma", "GemmaConfig"),
        ("gemma2", "Gemma2Config"), ("gemma3_text", "Gemma3TextConfig"), ("phi3", "Phi3Config"),
    ],
)  # fmt: skip
def test_fields_that_are_not_written_are_those_of_transformers(kind, name):
    import transformers

    # What only transformers 5 writes in another way is left out of the comparison by writing it here too.
    needed = {"num_experts_per_tok": 2, "norm_topk_prob": True}
    architecture = checkpoint.ARCHITECTURES[kind]
    theirs = getattr(transformers, name)(**needed).to_dict()
    written, bare = ({"model_type": kind, **fields} for fields in (theirs, needed))
    (own, _), (expected, _) = (
        architecture.config(one, next(iter(architecture.classes)), kind) for one in (bare, written)
    )
    assert own == expected
