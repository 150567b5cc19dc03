"""Adapters against Hugging Face's PEFT in torch, for one linear map with the same weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers.adapter import Adapter, AdapterConfig
from transformer.layers.linear import Linear

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
# What torch and PEFT say about themselves is not ours.
@pytest.mark.filterwarnings("ignore")
def test_the_forward_pass_is_pefts(kind, stabilized):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    I, N, H, r, alpha = 6, 2, 4, 3, 5  # noqa: E741
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(I, N * H))
    weight, bias = (parameter.detach().numpy().copy() for parameter in (base[0].weight, base[0].bias))
    config = peft.LoraConfig(
        target_modules=["0"], r=r, lora_alpha=alpha, use_dora=kind == "dora", use_rslora=stabilized
    )
    peer = peft.get_peft_model(base, config).eval()
    module = peer.base_model.model[0]

    options = AdapterConfig(kind=kind, rank=r, alpha=float(alpha), rank_stabilized=stabilized)
    linear = Linear(
        (I,), (N, H), axes=("embed", "heads", "head_dim"), kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)
    )
    linear.kernel.set_value(jnp.asarray(weight.T.reshape(I, N, H)))
    linear.bias.set_value(jnp.asarray(bias.reshape(N, H)))
    linear.adapter = adapter = Adapter(linear.kernel, 1, options, rngs=nnx.Rngs(1))
    if kind == "dora":
        magnitude = module.lora_magnitude_vector["default"].weight
        np.testing.assert_allclose(adapter.magnitude[...].ravel(), magnitude.detach().numpy(), rtol=1e-5)
        with torch.no_grad():
            magnitude.mul_(1 + 0.3 * torch.rand_like(magnitude))
        adapter.magnitude.set_value(jnp.asarray(magnitude.detach().numpy().reshape(N, H)))
    with torch.no_grad():
        module.lora_B["default"].weight.normal_()
    a, b = (getattr(module, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B"))
    assert np.abs(a).max() <= I**-0.5
    adapter.lora_a.set_value(jnp.asarray(a.T))
    adapter.lora_b.set_value(jnp.asarray(b.T.reshape(r, N, H)))

    x = np.random.default_rng(0).normal(size=(5, I)).astype(np.float32)
    with torch.no_grad():
        expected = peer(torch.tensor(x)).numpy()
    np.testing.assert_allclose(linear(jnp.asarray(x)).reshape(5, -1), expected, rtol=1e-4, atol=1e-5)
    plain = peer.merge_and_unload()[0]
    kernel = linear.plain().kernel[...].reshape(I, -1)
    np.testing.assert_allclose(kernel, plain.weight.detach().numpy().T, rtol=1e-4, atol=1e-5)
