"""Samples during training: a text that the model generates, or sentences that it translates."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx

from train.config import RunConfig
from train.data.prepared.store import Prepared
from train.translation import TextTranslator, spread
from transformer.generation.generate import Generator, until_end
from transformer.generation.sampling import Sampling
from transformer.models.gpt import GPTConfig

Sampler = Callable[[nnx.State], str]
"""Makes a sample text from parameters."""

_SENTENCES = 3


def make_sampler(config: RunConfig, prepared: Prepared, translator: TextTranslator | None) -> Sampler | None:
    """The sampler for the model and its objective; None if they have none."""
    if not config.sample.max_tokens:
        return None
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
