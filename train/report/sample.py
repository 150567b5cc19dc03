"""Samples during training: a text that the model generates, its answers in dialogues, or sentences that it translates."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

from flax import nnx

from train.config import RunConfig
from train.data.prepared.store import Prepared
from train.data.sources.dialogues import last_answer
from train.data.sources.records import MARKED
from train.data.tokenization.chat import Chat
from train.data.tokenization.template_limits import Unusable
from train.translation import TextTranslator, spread
from transformer.generation.generate import Generator, until_end
from transformer.generation.sampling import Sampling
from transformer.models.gpt import GPTConfig

Sampler = Callable[[nnx.State], str]
"""Makes a sample text from parameters."""

_SENTENCES = 3
_DIALOGUES = 3
_LOOKED_AT = 20
"""The most held-out dialogues of which some are answered."""


def make_sampler(config: RunConfig, prepared: Prepared, translator: TextTranslator | None) -> Sampler | None:
    """The sampler for the model and its objective; None if they have none."""
    if not config.sample.max_tokens:
        return None
    if isinstance(config.model, GPTConfig) and prepared.meta.label_kind in MARKED:
        return _answers(config, config.model, prepared)
    if isinstance(config.model, GPTConfig):
        return _writer(config, config.model, prepared)
    return None if translator is None else _translations(translator, prepared)


def _writer(config: RunConfig, model: GPTConfig, prepared: Prepared) -> Sampler:
    sample, tokenizer = config.sample, prepared.tokenizer
    generator = Generator(model, end_of_text=tokenizer.ends, num_tokens=tokenizer.vocab_size)
    prompt = tokenizer.prompt(sample.prompt) or [tokenizer.end_of_text]
    # A long prompt keeps its end, with room for at least one token.
    prompt = prompt[-(model.max_length - 1) :]
    room = model.max_length - len(prompt)

    def write(params: nnx.State) -> str:
        chunks = generator.generate(
            params,
            [prompt],
            max_tokens=max(min(sample.max_tokens, room), 1),
            sampling=Sampling(temperature=sample.temperature, top_p=sample.top_p),
            seed=config.seed,
        )
        return sample.prompt + tokenizer.continuation(prompt, until_end(chunks, tokenizer.ends)[0])

    return write


def _answers(config: RunConfig, model: GPTConfig, prepared: Prepared) -> Sampler | None:
    """Answers to the last question of each of a few held-out dialogues; None if there are none, or the template refuses them."""
    sample, chat = config.sample, Chat(prepared.tokenizer)
    generator = Generator(model, end_of_text=chat.ends, num_tokens=prepared.tokenizer.vocab_size)
    asked = []
    held_out = itertools.islice((one for array in prepared.validation for one in prepared.held_out(array)), _LOOKED_AT)
    for document in held_out:
        if (last := last_answer(document)) is None:
            continue
        before, reference = last
        with contextlib.suppress(Unusable):
            prompt = chat.prompt(before, document.tools)
            if len(prompt) < model.max_length:
                asked.append((prompt, before[-1]["content"], reference))
    asked = asked[:_DIALOGUES]
    if not asked:
        return None
    prompts = [prompt for prompt, _, _ in asked]
    room = model.max_length - max(map(len, prompts))

    def answer(params: nnx.State) -> str:
        chunks = generator.generate(
            params, prompts, max_tokens=min(sample.max_tokens, room), seed=config.seed,
            sampling=Sampling(temperature=sample.temperature, top_p=sample.top_p),
        )  # fmt: skip
        found = zip(asked, until_end(chunks, chat.ends), strict=True)
        lines = (
            f"user       {question}\nreference  {reference}\nmodel      {prepared.tokenizer.continuation(prompt, new)}"
            for (prompt, question, reference), new in found
        )
        return "\n\n".join(lines)

    return answer


def _translations(translator: TextTranslator, prepared: Prepared) -> Sampler:
    pairs = spread([pair for pair in prepared.validation_pairs() if translator.fits(pair[0])], _SENTENCES)

    def translate(params: nnx.State) -> str:
        found = translator.translate(params, [source for source, _ in pairs])
        lines = (
            f"source     {source}\nreference  {target}\nmodel      {text}"
            for (source, target), text in zip(pairs, found, strict=True)
        )
        return "\n\n".join(lines)

    return translate
