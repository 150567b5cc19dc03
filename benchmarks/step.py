"""`manyheads-bench step`: one training step beside Hugging Face's GPT-2 in torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.record import in_turn, ratio, save, seconds_per_call, summary
from benchmarks.workload import gpt_of, our_step, random_batch, tokens_of, workload
from train.config import RunConfig
from train.hardware import utilization
from transformer.models.gpt import GPTConfig, flops_per_token


def run(rounds: int, steps: int, *, compiled_peer: bool = True, work: RunConfig | None = None) -> dict[str, Any]:
    """Tokens per second of each, in turn, and the ratios.

    Args:
        rounds: how often the candidates take turns.
        steps: training steps in a turn.
        compiled_peer: also compare with torch.compile.
        work: model and batch; the device's usual ones by default.
    """
    work = workload() if work is None else work
    model = gpt_of(work)
    candidates: dict[str, Callable[[], object]] = {"manyheads": our_step(work)}
    candidates["torch eager"] = _torch_step(work, compiled=False)
    if compiled_peer:
        candidates["torch compiled"] = _torch_step(work, compiled=True)
    for step in candidates.values():
        seconds_per_call(step, 2)
    timed = {name: _timer(step, steps) for name, step in candidates.items()}
    speeds = {name: [tokens_of(work) / s for s in taken] for name, taken in in_turn(timed, rounds).items()}
    flops = 3 * flops_per_token(model, model.max_length)
    result: dict[str, Any] = {
        "workload": f"GPT-2, {model.num_layers} layers, {model.embed_dim} wide, {model.num_heads} heads, "
        f"context {model.max_length}, batch {work.batch_size}, vocabulary {model.vocab_size}, {model.dtype}, AdamW, clipping",
        "tokens_per_second": {name: summary(speed) for name, speed in speeds.items()},
        "flops_per_token": flops,
        "tflops_per_second": {name: summary(speed)["median"] * flops / 1e12 for name, speed in speeds.items()},
        "ratio_to": {name: ratio(speeds["manyheads"], speed) for name, speed in speeds.items() if name != "manyheads"},
        "matmul_peak_tflops_per_second": matmul_peak(model.dtype) / 1e12,
    }
    median = result["tokens_per_second"]["manyheads"]["median"]
    result["mfu"] = utilization(median * flops, jax.devices()[:1], model.dtype)
    save("step", f"manyheads-bench step --rounds {rounds} --steps {steps}", result)
    return result


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large square matrix product here: the limit that a step can come near to."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    seconds_per_call(lambda: product(x), 2)
    return 2 * size**3 / min(seconds_per_call(lambda: product(x), 5) for _ in range(3))


def _timer(step: Callable[[], object], steps: int) -> Callable[[], float]:
    return lambda: seconds_per_call(step, steps)


def _torch_step(work: RunConfig, *, compiled: bool) -> Callable[[], object]:
    """The peer, set up as its users do: scaled-dot-product attention, fused AdamW, autocast to bfloat16 on a GPU."""
    import torch

    model = torch_gpt2(gpt_of(work)).train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = random_batch(work)
    inputs, targets = (torch.tensor(batch[name].astype(np.int64), device=device) for name in ("tokens", "targets"))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=work.model.dtype == "bfloat16")

    def loss_of(inputs: Any, targets: Any) -> Any:
        logits = model(inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))

    run = torch.compile(loss_of) if compiled else loss_of

    def take() -> object:
        with autocast:
            loss = run(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Reading the loss waits for the step, as a training loop that prints it does.
        return loss.item() if device.type == "cpu" else _synchronised(loss)

    return take


def _synchronised(loss: Any) -> float:
    import torch

    torch.cuda.synchronize()
    return float(loss)


def torch_gpt2(c: GPTConfig) -> Any:
    """Hugging Face's GPT-2 of the model's shape, random weights, no dropout, on the device that JAX uses."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=c.num_layers, n_embd=c.embed_dim, n_head=c.num_heads, vocab_size=c.vocab_size, n_positions=c.max_length,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    return model.to("cpu" if jax.default_backend() == "cpu" else "cuda")
