"""`manyheads generate`: generates text with the model of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from train.data.tokenization.stream import StreamDecoder
from train.data.tokenization.tokenizer import Tokenizer
from train.parallel.mesh import use_mesh
from train.run.run_files import load_run
from transformer.errors import ConfigError, UserError, check_text
from transformer.generation.beam import BeamSearch, Hypothesis
from transformer.generation.ends import before_end
from transformer.generation.generate import Generator, until_end
from transformer.generation.sampling import Sampling
from transformer.models.gpt import GPTConfig

DEFAULT_TOKENS = 256
STREAM_CHUNK = 8
"""Tokens between two flushes of the text: frequent enough to read along, and rare enough not to slow the device."""
USUAL_SAMPLING = {"temperature": 0.8, "top_p": 0.95}
"""How the commands sample from a model that says nothing about it."""


def generate(
    run: Path, prompts: list[str], step: str, max_tokens: int | None, how: Mapping[str, Any] | BeamSearch, seed: int,
    *, special: bool = False,
) -> None:  # fmt: skip
    """Print a continuation of each prompt: streamed for one prompt, in turn for several; a beam search prints the best
    ones. A blank prompt among others, such as a blank line of a file, has an empty one.

    Args:
        max_tokens: of each continuation; by default an import's own, or 256, or what the model's context leaves.
        how: fields of `Sampling`, to sample with `seed`, the others being an import's own; or how to search.
        special: special tokens that a prompt spells out are those tokens, and not text.

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
    generator = Generator(model, end_of_text=tokenizer.ends, num_tokens=tokenizer.vocab_size)
    for prompt in prompts:
        check_text("prompt", prompt)
    is_blank = [not prompt.strip() for prompt in prompts]
    if all(is_blank):  # none is left out: the check below refuses what has no tokens
        is_blank = [False] * len(prompts)
    ids = [
        tokenizer.prompt(prompt, special=special) for prompt, blank in zip(prompts, is_blank, strict=True) if not blank
    ]
    if max_tokens is None:
        max_tokens = default_length(model, ids, tokenizer)
    # Numbered as they were given.
    checked = iter(ids)
    generator.check([[tokenizer.end_of_text] if blank else next(checked) for blank in is_blank], max_tokens)
    # For the lines between texts. The texts are printed as they are: rich would replace tabs, and the names of emoji.
    console = Console()
    with use_mesh(loaded.mesh, loaded.config.mesh.rules):
        if isinstance(how, BeamSearch):
            found = generator.search(loaded.params, ids, max_tokens=max_tokens, search=how)
            _show(console, prompts, is_blank, ids, found, tokenizer)
            return
        alone = len(prompts) == 1
        chunks = generator.generate(
            loaded.params, ids, max_tokens=max_tokens, sampling=sampling_of(tokenizer, how, USUAL_SAMPLING), seed=seed,
            chunk=STREAM_CHUNK if alone else None,
        )  # fmt: skip
        if not alone:
            written = zip(ids, until_end(chunks, tokenizer.ends), strict=True)
            texts = (tokenizer.continuation(own, new) for own, new in written)
            for prompt, blank in zip(prompts, is_blank, strict=True):
                console.rule()
                print(prompt if blank else prompt + next(texts))
            return
        print(prompts[0], end="")
        decoder = StreamDecoder(tokenizer, ids[0])
        for (row,) in chunks:
            print(decoder.push(before_end(row.tolist(), tokenizer.ends)), end="", flush=True)
        print(decoder.flush())


def sampling_of(tokenizer: Tokenizer, given: Mapping[str, Any], usual: Mapping[str, Any] | None = None) -> Sampling:
    """The given fields of `Sampling`; the others are an import's own, or else the `usual` ones.

    Raises:
        UserError: the import's own are not valid, or those given.
    """
    own = {name: value for name, value in tokenizer.conventions.sampling.items() if name not in given}
    try:
        Sampling(**own)
    except ConfigError as error:
        raise UserError(f"the imported generation_config.json: {error}") from None
    return Sampling(**{**(usual or {}), **own, **given})


def default_length(model: GPTConfig, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> int:
    """How many tokens to generate if nobody says: an import's own number, or 256, or what the context leaves after the longest
    prompt; at least 1."""
    wanted = tokenizer.conventions.max_new_tokens or DEFAULT_TOKENS
    return max(min(wanted, model.max_length - max(map(len, prompts), default=0)), 1)


def _show(
    console: Console,
    prompts: list[str],
    is_blank: list[bool],
    ids: list[list[int]],
    found: list[list[Hypothesis]],
    tokenizer: Tokenizer,
) -> None:
    results = zip(ids, found, strict=True)
    for prompt, blank in zip(prompts, is_blank, strict=True):
        own, ranked = ([], []) if blank else next(results)
        if not ranked:
            console.rule()
            print(prompt)
        for hypothesis in ranked:
            if len(prompts) > 1 or len(ranked) > 1:
                console.rule(f"score {hypothesis.score:.3f}, log-probability {hypothesis.log_probability:.2f}")
            print(prompt + tokenizer.continuation(own, hypothesis.tokens))
