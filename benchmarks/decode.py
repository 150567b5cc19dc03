"""`manyheads-bench decode`: greedy decoding compared with `transformers`' generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import peer
from benchmarks.record import ratio, save, speeds_in_turn, summary
from benchmarks.workload import gpt_of, workload
from train.config import RunConfig
from transformer.generation.generate import Generator
from transformer.generation.sampling import Sampling
from transformer.models.gpt import GPT, GPTConfig

PROMPT_TOKENS = 16
NEW_TOKENS = 128
PEER_TOKENS = 16


def run(rounds: int, work: RunConfig | None = None) -> dict[str, Any]:
    """New tokens per second at batch 1 and 8, in turn, and the ratios.

    Both always generate `NEW_TOKENS` tokens; on an accelerator the peer `PEER_TOKENS`, which takes it a second. Each reads the
    prompt once, which for the peer is then a larger share: about 5% in favour of the first.
    """
    on_cpu = jax.default_backend() == "cpu"
    counts = {"manyheads": NEW_TOKENS, "transformers": NEW_TOKENS if on_cpu else PEER_TOKENS}
    model = gpt_of(workload() if work is None else work)
    result: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": counts}
    for batch_size in (1, 8):
        prompts = np.random.default_rng(0).integers(1, model.vocab_size, (batch_size, PROMPT_TOKENS))
        candidates = {
            "manyheads": _ours(model, prompts),
            "transformers": _theirs(model, prompts, counts["transformers"]),
        }
        calls = speeds_in_turn(candidates, rounds, 1, 1)
        speeds = {name: [batch_size * counts[name] * per for per in taken] for name, taken in calls.items()}
        result[f"batch_{batch_size}"] = {
            "tokens_per_second": {name: summary(speed) for name, speed in speeds.items()},
            "ratio": ratio(speeds["manyheads"], speeds["transformers"]),
        }
    save("decode", f"manyheads-bench decode --rounds {rounds}", result)
    return result


def _ours(config: GPTConfig, prompts: np.ndarray) -> Callable[[], object]:
    generator = Generator(config)
    params = jax.jit(lambda: nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param))()
    rows = [row.tolist() for row in prompts]
    return lambda: list(generator.generate(params, rows, max_tokens=NEW_TOKENS, sampling=Sampling(temperature=0.0)))


def _theirs(config: GPTConfig, prompts: np.ndarray, new_tokens: int) -> Callable[[], object]:
    import torch

    model = peer.gpt2(config).eval()
    if config.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    inputs = torch.tensor(prompts, device=model.device)
    options = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0}

    def write() -> object:
        with torch.no_grad():
            return model.generate(inputs, attention_mask=torch.ones_like(inputs), **options).cpu()

    return write
