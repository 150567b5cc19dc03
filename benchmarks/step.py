"""`manyheads-bench step`: one training step compared with Hugging Face's GPT-2 in torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from benchmarks import peer
from benchmarks.record import ratio, save, seconds_per_call, speeds_in_turn, summary
from benchmarks.workload import gpt_of, large, our_step, packed, random_batch, workload
from train.config import RunConfig
from train.parallel.hardware import utilization
from transformer.models.gpt import flops_per_token

CASES: dict[str, Callable[[RunConfig], RunConfig]] = {
    "plain": lambda work: work,
    "packed": packed,
    "large": lambda _: large(),
}


def run(
    rounds: int, steps: int, *, compiled_peer: bool = True, case: str = "plain", work: RunConfig | None = None
) -> dict[str, Any]:
    """Tokens per second of each, in turn, and the ratios.

    Args:
        rounds: how often the candidates take turns.
        steps: training steps in a turn.
        compiled_peer: also compare with torch.compile.
        case: plain, next to torch; packed, next to plain; or large.
        work: model and batch; the device's usual ones by default.
    """
    plain = workload() if work is None else work
    work = CASES[case](plain)
    model = gpt_of(work)
    candidates: dict[str, Callable[[], object]] = {"manyheads": our_step(work)}
    if case == "packed":
        candidates["manyheads plain"] = our_step(plain)
    if case == "plain":
        candidates["torch eager"] = _torch_step(work, compiled=False)
    if case == "plain" and compiled_peer:
        candidates["torch compiled"] = _torch_step(work, compiled=True)
    speeds = speeds_in_turn(candidates, rounds, steps, work.tokens_per_step)
    flops = 3 * flops_per_token(model, model.max_length)
    result: dict[str, Any] = {
        "case": case,
        "workload": f"GPT-2, {model.num_layers} layers, {model.embed_dim} wide, {model.attention.num_heads} heads, "
        f"context {model.max_length}, batch {work.batch_size}, vocabulary {model.vocab_size}, {model.dtype}, AdamW, clipping",
        "tokens_per_second": {name: summary(speed) for name, speed in speeds.items()},
        "flops_per_token": flops,
        "tflops_per_second": {name: summary(speed)["median"] * flops / 1e12 for name, speed in speeds.items()},
        "ratio_to": {name: ratio(speeds["manyheads"], speed) for name, speed in speeds.items() if name != "manyheads"},
        "matmul_peak_tflops_per_second": matmul_peak(model.dtype) / 1e12,
    }
    median = result["tokens_per_second"]["manyheads"]["median"]
    result["mfu"] = utilization(median * flops, jax.devices()[:1], model.dtype)
    name, option = ("step", "") if case == "plain" else (f"step_{case}", f" --case {case}")
    save(name, f"manyheads-bench step{option} --rounds {rounds} --steps {steps}", result)
    return result


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large square matrix product on this device: a practical limit for a step."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    seconds_per_call(lambda: product(x), 2)
    return 2 * size**3 / min(seconds_per_call(lambda: product(x), 5) for _ in range(3))


def _torch_step(work: RunConfig, *, compiled: bool) -> Callable[[], object]:
    import torch

    model = peer.gpt2(gpt_of(work))

    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = model(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))

    batch = random_batch(work)
    inputs = {name: batch[name] for name in ("tokens", "targets")}
    return peer.training_step(work, model, inputs, torch.compile(loss_of) if compiled else loss_of)
