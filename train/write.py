"""Write with the model of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from train.checkpoint import Checkpoints
from train.config import RunConfig, parse
from train.data.tokenizer import StreamDecoder, Tokenizer
from train.mesh import make_mesh, use_mesh
from train.state import abstract_params
from transformer.decode.generate import Generator
from transformer.decode.sampling import Sampling
from transformer.errors import UserError, check_text
from transformer.models.gpt import GPT

DEFAULT_TOKENS = 256
STREAM_CHUNK = 8
"""Tokens between two flushes of the text: often enough to read along, seldom enough not to slow the device."""


def write(run: Path, prompts: list[str], step: str, max_tokens: int | None, sampling: Sampling, seed: int) -> None:
    """Print a continuation of each prompt, as it comes for one prompt, one after the other for several.

    Args:
        max_tokens: of each continuation; by default 256, or what the model's context leaves.

    Raises:
        UserError: no such run or checkpoint, or a prompt that does not fit the model.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max-tokens: got {max_tokens}; allowed: 1 or more")
    config, tokenizer, params, mesh = load_run(run, step)
    generator = Generator(config.model, end_of_text=tokenizer.end_of_text, num_tokens=tokenizer.vocab_size)
    for prompt in prompts:
        check_text("--prompt", prompt)
    ids = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    if max_tokens is None:
        max_tokens = max(min(DEFAULT_TOKENS, config.model.max_length - max(map(len, ids))), 1)
    generator.check(ids, max_tokens)
    decoders = [StreamDecoder(tokenizer) for _ in prompts]
    texts = [""] * len(prompts)
    alone = len(prompts) == 1
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with use_mesh(mesh, config.mesh.rules):
        if alone:
            console.print(prompts[0], end="")
        chunks = generator.generate(
            params, ids, max_tokens=max_tokens, sampling=sampling, seed=seed, chunk=STREAM_CHUNK if alone else None
        )
        ended = np.zeros(len(prompts), bool)
        for chunk in chunks:
            for row, tokens in enumerate(chunk):
                fresh = _until(tokens, tokenizer.end_of_text, ended, row)
                text = "".join(decoders[row].push(int(token)) for token in fresh)
                texts[row] += text
                if alone:
                    console.print(text, end="")
                    console.file.flush()
    for row, decoder in enumerate(decoders):
        texts[row] += decoder.flush()
    if alone:
        console.print(decoders[0].flush())
        return
    for prompt, text in zip(prompts, texts, strict=True):
        console.rule()
        console.print(prompt + text)


def load_run(run: Path, step: str = "latest") -> tuple[RunConfig, Tokenizer, nnx.State, jax.sharding.Mesh]:
    """A run's config, tokenizer and parameters, laid out over the devices that are here now.

    Args:
        step: `latest`, `best`, or a step's number.

    Raises:
        UserError: no such run or checkpoint.
    """
    with Checkpoints(run) as checkpoints:
        number = _choose(checkpoints, run, step)
        meta = checkpoints.meta(number)
        config = parse(meta["config"], f"{run}, step {number}")
        with tempfile.TemporaryDirectory() as folder:
            for name, text in meta["tokenizer"].items():
                Path(folder, name).write_text(text, encoding="utf-8")
            tokenizer = Tokenizer.load(Path(folder))
        mesh = make_mesh(type(config.mesh)(strategy=config.mesh.strategy))
        with use_mesh(mesh, config.mesh.rules):
            described = abstract_params(lambda rngs: GPT(config.model, rngs=rngs), mesh)
            params = checkpoints.restore_params(number, described)
    return config, tokenizer, params, mesh


def _choose(checkpoints: Checkpoints, run: Path, step: str) -> int:
    steps = checkpoints.steps
    if not steps:
        raise UserError(f"{run}: this run has no checkpoint yet")
    if step == "latest":
        return steps[-1]
    if step == "best":
        return steps[-1] if checkpoints.best is None else checkpoints.best
    if not step.isdecimal() or int(step) not in steps:
        raise UserError(f"--step: got {step!r}; this run has latest, best, {', '.join(map(str, steps))}")
    return int(step)


def _until(tokens: np.ndarray, end_of_text: int, ended: np.ndarray, row: int) -> np.ndarray:
    """The tokens before the end of the text, which is noted in `ended`."""
    if ended[row]:
        return tokens[:0]
    ends = np.flatnonzero(tokens == end_of_text)
    ended[row] = ends.size > 0
    return tokens[: ends[0]] if ends.size else tokens
