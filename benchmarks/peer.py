"""The peer: models of transformers, and a training step in torch, in their usual setup."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from train.config import RunConfig
from transformer.models.gpt import GPTConfig


def gpt2(c: GPTConfig) -> Any:
    """GPT-2 of the model's shape with random weights and no dropout, on the device that JAX uses."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=c.num_layers, n_embd=c.embed_dim, n_head=c.attention.num_heads, vocab_size=c.vocab_size, n_positions=c.max_length,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _placed(transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa"))


def bert_classifier(config: Any) -> Any:
    """BERT's classifier of the model's shape with random weights, on the device that JAX uses."""
    import torch
    import transformers

    from transformer.huggingface.encoders import BERT

    torch.manual_seed(0)
    theirs = transformers.BertConfig(**BERT.write(config))
    return _placed(transformers.BertForSequenceClassification._from_config(theirs, attn_implementation="sdpa"))


def training_step(
    work: RunConfig, model: Any, inputs: Mapping[str, np.ndarray], loss_of: Callable[..., Any]
) -> Callable[[], object]:
    """A function that takes one step: fused AdamW, clipping, autocast to bfloat16 if the workload uses it.

    Args:
        inputs: arguments of `loss_of`, of integers.
    """
    import torch

    device = next(model.train().parameters()).device
    o, clip_norm = work.optimizer, work.optimizer.clip_norm
    assert clip_norm is not None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.learning_rate, betas=(o.b1, o.b2), weight_decay=o.weight_decay, fused=True
    )
    tensors = {name: torch.tensor(array.astype(np.int64), device=device) for name, array in inputs.items()}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=work.model.dtype == "bfloat16")

    def take() -> object:
        with autocast:
            loss = loss_of(**tensors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        # Reading the loss waits for the step, as in a training loop that prints it.
        return loss.item()

    return take


def _placed(model: Any) -> Any:
    return model.to("cpu" if jax.default_backend() == "cpu" else "cuda")
