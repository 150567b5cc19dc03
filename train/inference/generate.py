"""`manyheads generate`: generates text with the model of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from train.data.tokenization.tokenizer import StreamDecoder, Tokenizer
from train.parallel.mesh import use_mesh
from train.run.run_files import load_run
from transformer.errors import UserError, check_text
from transformer.generation.beam import BeamSearch, Hypothesis
from transformer.generation.generate import Generator
from transformer.generation.sampling import Sampling
from transformer.models.gpt import GPTConfig

DEFAULT_TOKENS = 256
STREAM_CHUNK = 8
"""Tokens between two flushes of the text: frequent enough to read along, and rare enough not to slow the device."""


def generate(
    run: Path, prompts: list[str], step: str, max_tokens: int | None, how: Sampling | BeamSearch, seed: int
) -> None:
    """Print a continuation of each prompt: streamed for one prompt, in turn for several; a beam search prints the best
    ones. A blank prompt among others, such as a blank line of a file, has an empty one.

    Args:
        max_tokens: of each continuation; by default 256, or what the model's context leaves.
        how: how to sample, with `seed`, or to search.

    Raises:
        UserError: no such run or checkpoint, or a prompt that does not fit the model.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens: got {max_tokens}; allowed: 1 or more")
    loaded = load_run(run, step)
    model, tokenizer = loaded.config.model, loaded.tokenizer
    if not isinstance(model, GPTConfig):
        raise UserError(
            f"{run}: cannot generate text: family {model.family!r} is not a language model; use predict or embed"
        )
    generator = Generator(model, end_of_text=tokenizer.end_of_text, num_tokens=tokenizer.vocab_size)
    for prompt in prompts:
        check_text("prompt", prompt)
    is_blank = [not prompt.strip() for prompt in prompts]
    if all(is_blank):  # none is left out: the check below refuses what has no tokens
        is_blank = [False] * len(prompts)
    asked = [prompt for prompt, blank in zip(prompts, is_blank, strict=True) if not blank]
    ids = [tokenizer.encode(prompt).tolist() for prompt in asked]
    if max_tokens is None:
        max_tokens = default_length(model, ids)
    # Numbered as they were given.
    checked = iter(ids)
    generator.check([[tokenizer.end_of_text] if blank else next(checked) for blank in is_blank], max_tokens)
    if isinstance(how, BeamSearch):
        with use_mesh(loaded.mesh, loaded.config.mesh.rules):
            found = generator.search(loaded.params, ids, max_tokens=max_tokens, search=how)
        results = iter(found)
        _show(prompts, [[] if blank else next(results) for blank in is_blank], tokenizer)
        return
    decoders = [StreamDecoder(tokenizer) for _ in asked]
    texts = [""] * len(asked)
    alone = len(prompts) == 1
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with use_mesh(loaded.mesh, loaded.config.mesh.rules):
        if alone:
            console.print(prompts[0], end="")
        chunks = generator.generate(
            loaded.params,
            ids,
            max_tokens=max_tokens,
            sampling=how,
            seed=seed,
            chunk=STREAM_CHUNK if alone else None,
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
    continuations = iter(texts)
    for prompt, blank in zip(prompts, is_blank, strict=True):
        console.rule()
        console.print(prompt if blank else prompt + next(continuations))


def default_length(model: GPTConfig, prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens to generate if nobody says: 256, or what the context leaves after the longest prompt; at least 1."""
    return max(min(DEFAULT_TOKENS, model.max_length - max(map(len, prompts), default=0)), 1)


def _show(prompts: list[str], found: list[list[Hypothesis]], tokenizer: Tokenizer) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for prompt, ranked in zip(prompts, found, strict=True):
        if not ranked:
            console.rule()
            console.print(prompt)
        for hypothesis in ranked:
            if len(prompts) > 1 or len(ranked) > 1:
                console.rule(f"score {hypothesis.score:.3f}, log-probability {hypothesis.log_probability:.2f}")
            console.print(prompt + tokenizer.decode(hypothesis.tokens))


def _until(tokens: np.ndarray, end_of_text: int, ended: np.ndarray, row: int) -> np.ndarray:
    """The tokens before the end of the text; whether it ended is recorded in `ended`."""
    if ended[row]:
        return tokens[:0]
    ends = np.flatnonzero(tokens == end_of_text)
    ended[row] = ends.size > 0
    return tokens[: ends[0]] if ends.size else tokens
