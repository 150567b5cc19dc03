"""What a run says of the backends of its attention, on devices of every kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from train.report.attention_backends import choices, in_a_line
from transformer.attention import dispatch
from transformer.attention.dispatch import attend
from transformer.attention.spec.mask import AttentionMask

X = jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.bfloat16)


def traced(*masks, backend="auto"):
    with choices() as found:
        for mask in masks:
            # Only the choice is wanted; a GPU's kernel cannot be traced here.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dispatch, "BACKENDS", {name: _Untraced(one) for name, one in dispatch.BACKENDS.items()})
                jax.eval_shape(lambda q, mask=mask: attend(q, q, q, mask, backend=backend)[0], X)
    return list(found)


class _Untraced:
    def __init__(self, backend):
        self.supports = backend.supports

    def attend(self, q, k, v, spec):
        return q


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "platform_of_program", lambda: "gpu")
    monkeypatch.setattr(dispatch, "compute_capability", lambda: 9.0)


CAUSAL, WINDOW = AttentionMask.causal(), AttentionMask.window(4, 4)


def test_one_backend_is_a_word(on_a_gpu):
    assert in_a_line(traced(CAUSAL, CAUSAL)) == "attention: cudnn"


def test_several_are_told_apart_with_the_reason(on_a_gpu):
    line = in_a_line(traced(CAUSAL, WINDOW))
    first, _, second = line.partition("; ")
    assert first == "attention: cudnn (4 heads of 16, 64 × 64, causal)"
    assert second.startswith("xla (4 heads of 16, 64 × 64, window), since cudnn: ")
    assert "this one sees 4 keys on the right" in line


def test_each_kind_is_seen_once_and_elsewhere_too():
    (causal, window) = traced(CAUSAL, WINDOW, CAUSAL)
    assert causal.here == window.here == "blockwise"
    assert dict(causal.elsewhere) == {"GPU": "cudnn", "TPU": "xla"}
    assert causal.reasons != window.reasons
    either = traced(WINDOW | AttentionMask.sinks(2))[0]
    assert either.call == "4 heads of 16, 64 × 64, (window or prefix)"


def test_nothing_is_seen_outside():
    with choices() as found:
        pass
    jax.eval_shape(lambda q: attend(q, q, q, CAUSAL)[0], X)
    assert not found


def test_a_named_backend_is_named_everywhere():
    (named,) = traced(CAUSAL, backend="reference")
    assert named.here == "reference" and dict(named.elsewhere) == {"GPU": "reference", "TPU": "reference"}
    assert not named.reasons
