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


def model_of(read):
    """Our model with a checkpoint's parameters."""
    graphdef = graphdef_of(functools.partial(make_model, read.config))
    return nnx.merge(graphdef, read.params(on_one_device(read.config)))


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


def round_trip(read, name, folder, compare):
    """Export, import again: the same bits; and transformers loads what was exported without a word."""
    params = read.params(on_one_device(read.config))
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
    model = model_of(read)
    ids, valid = given(fields["vocab_size"])
    types = np.random.default_rng(0).integers(0, max(read.config.token_types, 1), ids.shape)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(valid)}
    if read.config.token_types > 1:
        inputs["token_type_ids"] = torch.tensor(types)
    if read.config.head.kind == "choice":
        inputs = {key: value[None] for key, value in inputs.items()}
    ours = {
        "segments_BT": jnp.asarray(valid),
        "token_types_BT": jnp.asarray(types, jnp.int32) if read.config.token_types > 1 else None,
    }
    hidden, _ = model.hidden(jnp.asarray(ids, jnp.int32), **ours)
    output = model(jnp.asarray(ids, jnp.int32), **ours)

    def compare(theirs):
        with torch.no_grad():
            out = theirs(**inputs, output_hidden_states=True)
        real = torch.tensor(valid, dtype=torch.bool)
        last = out.last_hidden_state if name.endswith("Model") else out.hidden_states[-1]
        close(np.asarray(hidden)[valid > 0], last.reshape(*valid.shape, -1)[real])
        match read.config.head.kind:
            case "masked":
                close(np.asarray(output.logits)[valid > 0], out.logits[real])
            case "tokens" | "replaced":
                close(np.asarray(output.logits)[valid > 0], out.logits[real])
            case "pretraining":
                close(np.asarray(output.logits)[valid > 0], out.prediction_logits[real])
                close(output.pooled_logits, out.seq_relationship_logits)
            case "answer":
                close(output.logits[..., 0][:2], out.start_logits[:2])
                close(output.logits[..., 1][:2], out.end_logits[:2])
            case "choice":
                close(output.logits[:, 0][None], out.logits)
            case "classification":
                close(output.logits, out.logits)
            case "embedding" if read.config.head.pooler:
                close(output.pooled_logits, out.pooler_output)

    compare(theirs)
    round_trip(read, name, tmp_path / "ours", compare)


@pytest.mark.parametrize("case", peers.DECODERS)
def test_decoders(case, tmp_path):
    import torch

    name, fields = peers.DECODERS[case]
    theirs = peers.peer(name, fields)
    read = checkpoint.read(peers.saved(theirs, tmp_path / "theirs"))
    model = model_of(read)
    ids, valid = given(fields["vocab_size"])
    hidden, _ = model.hidden(jnp.asarray(ids, jnp.int32), segments_BT=jnp.asarray(valid))
    logits = model.logits(hidden)

    def compare(theirs):
        with torch.no_grad():
            out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(valid), output_hidden_states=True)
        real = torch.tensor(valid, dtype=torch.bool)
        close(np.asarray(hidden)[valid > 0], out.hidden_states[-1][real])
        if not name.endswith("Model"):
            close(np.asarray(logits)[valid > 0], out.logits[real])

    compare(theirs)
    # A body is read as a whole model, whose head is tied.
    whole = read.architecture.class_of(read.config)
    round_trip(read, whole, tmp_path / "ours", compare)


@pytest.mark.parametrize("case", peers.ENCODER_DECODERS)
def test_encoder_decoders(case, tmp_path):
    import torch

    name, fields = peers.ENCODER_DECODERS[case]
    theirs = peers.peer(name, fields)
    read = checkpoint.read(peers.saved(theirs, tmp_path / "theirs"))
    model = model_of(read)
    source, valid = given(fields["vocab_size"])
    target = peers.tokens(ROWS, 7, fields["vocab_size"]).copy()
    target[:, 0] = read.config.start_token
    logits = model(
        jnp.asarray(source, jnp.int32), jnp.asarray(target, jnp.int32), source_segments_BS=jnp.asarray(valid)
    ).logits

    def compare(theirs):
        with torch.no_grad():
            out = theirs(
                input_ids=torch.tensor(source),
                attention_mask=torch.tensor(valid),
                decoder_input_ids=torch.tensor(target),
            )
        close(logits, out.logits)

    compare(theirs)
    round_trip(read, name, tmp_path / "ours", compare)
