"""Float32 products on which a choice or a long sum depends are asked for at the highest precision, the gradient's too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from transformer.alignment.additive import additive_scores
from transformer.alignment.multiplicative import dot_scores
from transformer.alignment.structured import redundancy_penalty
from transformer.attention.common import context
from transformer.attention.linear.fast_weights import RULES, fast_weights, unit_lower_inverse
from transformer.attention.linear.linear_attention import linear_attention
from transformer.layers.adapter import merged_kernel
from transformer.layers.mixture_of_experts import MixtureOfExperts
from transformer.models.heads import contrastive_logits


def products(function, *shapes, dtype=jnp.float32):
    """(operands' types, precision) of each product of the function and of its gradient."""

    def loss(*arrays):
        out = function(*arrays)
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(out))

    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    traced = jax.make_jaxpr(jax.value_and_grad(loss, tuple(range(len(shapes)))))(*arrays)
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general"):
                found.append(({var.aval.dtype.name for var in eqn.invars[:2]}, eqn.params["precision"]))
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(traced.jaxpr)
    return found


def is_highest(precision):
    return precision is not None and set(precision) == {jax.lax.Precision.HIGHEST}


def memories(rule, chunk):
    def run(q, k, v, beta, decay):
        return fast_weights(
            q, k, v, beta, -jnp.exp(decay) if RULES[rule].decays else None, rule=rule, chunk=chunk,
            feature_map="favor",
        )  # fmt: skip

    return run, (1, 8, 2, 4), (1, 8, 2, 4), (1, 8, 2, 3), (1, 8, 2), (1, 8, 2)


def linear(**options):
    return lambda q, k, v: linear_attention(q, k, v, **options)[0], (1, 8, 2, 4), (1, 8, 2, 4), (1, 8, 2, 3)


SEGMENTS = jnp.array([[1] * 3 + [2] * 5])
CASES = {f"{rule}, {chunk}": memories(rule, chunk) for rule in RULES for chunk in (1, 4, None)} | {
    "inverse": (unit_lower_inverse, (2, 8, 8)),
    "linear": linear(),
    "linear, both ways": linear(causal=False),
    "linear, both ways at once": linear(causal=False, chunk=None),
    "linear, both ways in documents": linear(causal=False, segments_BT=SEGMENTS),
    "context": (context, (1, 3, 4), (1, 4, 5)),
    "dot scores": (dot_scores, (1, 3, 4), (1, 5, 4)),
    "additive scores": (additive_scores, (1, 3, 4), (1, 5, 4), (4,)),
    "redundancy": (redundancy_penalty, (1, 3, 4)),
    "merged adapters": (
        lambda kernel, a, b: merged_kernel(kernel, {"lora_a": a, "lora_b": b}, 2.0), (6, 4), (6, 2), (2, 4)
    ),
    "contrast": (contrastive_logits, (3, 4), (3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_products_are_exact(name):
    function, *shapes = CASES[name]
    found = products(function, *shapes)
    assert found
    assert all(is_highest(precision) for types, precision in found if types == {"float32"}), found


def test_what_is_in_bfloat16_is_multiplied_as_it_is():
    found = products(
        lambda kernel, a, b: merged_kernel(kernel, {"lora_a": a, "lora_b": b}, 2.0), (6, 4), (6, 2), (2, 4),
        dtype=jnp.bfloat16,
    )  # fmt: skip
    assert found and all(precision is None for _, precision in found)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_router_decides_on_all_bits(dtype):
    """Its logits come from float32, whatever the experts compute in; theirs are a network's products like any other."""
    normal = nnx.initializers.normal(0.1)
    layer = MixtureOfExperts(
        8, 16, num_experts=4, experts_per_token=2, capacity=None, kernel_init=normal, out_init=normal, dtype=dtype,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    found = products(lambda x, kernel: layer.router(x) * kernel.sum(), (2, 8, 8), ())
    assert found and all(is_highest(precision) for _, precision in found)
    traced = jax.make_jaxpr(layer)(jnp.zeros((2, 8, 8), dtype))
    highest = [
        eqn for eqn in traced.eqns if eqn.primitive.name == "dot_general" and is_highest(eqn.params["precision"])
    ]
    calls = [str(eqn.params["call_jaxpr"]) for eqn in traced.eqns if "call_jaxpr" in eqn.params]
    assert len(highest) + sum("HIGHEST" in call for call in calls) == 1
