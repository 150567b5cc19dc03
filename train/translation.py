"""Translates with a model of pairs, and scores translations against references."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from flax import nnx

from train.config import RunConfig
from train.data.tokenization.tokenizer import Tokenizer
from transformer.errors import UserError, shown
from transformer.generation.beam import BeamSearch, Hypothesis
from transformer.generation.translator import Translator
from transformer.models.encoder_decoder import EncoderDecoderConfig
from transformer.models.families import make_model


@dataclasses.dataclass(frozen=True)
class Quality:
    """Scores of translations against references, by sacrebleu's defaults."""

    bleu: float
    """Papineni et al. 2002, 0 to 100; 13a tokens, case kept."""
    chrf: float
    """Popović 2015, chrF2, 0 to 100."""
    pairs: int


class TextTranslator:
    """A translator between texts, compiled once; the parameters are given at each call."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, target_tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer, self.target_tokenizer = config, tokenizer, target_tokenizer
        num_tokens = target_tokenizer.vocab_size
        if isinstance(config.model, EncoderDecoderConfig):
            num_tokens = min(num_tokens, config.model.written_tokens)
        self._translator = Translator(
            functools.partial(make_model, config.model),
            start_token=target_tokenizer.end_of_text,
            end_of_text=tuple(end for end in target_tokenizer.ends if end < num_tokens),
            num_tokens=num_tokens,
        )

    def tokens_of(self, text: str, name: str = "the text") -> list[int]:
        """The token ids of a source, which `name` names in errors. Raises `UserError` if it is empty or too long."""
        ids = [*self.tokenizer.encode(text).tolist(), self.tokenizer.end_of_text]
        if len(ids) == 1:
            raise UserError(f"there is nothing to translate: {name} has no tokens")
        if len(ids) > (longest := self.config.model.max_length):
            raise UserError(
                f"{name} has {len(ids)} tokens, and the model's context is {longest}; shorten {shown(text)}"
            )
        return ids

    def hypotheses(
        self, params: nnx.State, texts: Sequence[str], search: BeamSearch | None = None
    ) -> list[list[Hypothesis]]:
        """The best translations of each text, as tokens with their scores; none of a text without tokens, such as a blank line.

        Raises `UserError` for a text that is too long, and if no text has tokens.
        """
        ids = {
            number: self.tokens_of(text, f"text {number}" if len(texts) > 1 else "the text")
            for number, text in enumerate(texts, start=1) if len(self.tokenizer.encode(text))
        }  # fmt: skip
        if texts and not ids:
            self.tokens_of("")
        found = dict(zip(ids, self._translator.translate(params, list(ids.values()), search=search), strict=True))
        return [found.get(number, []) for number in range(1, len(texts) + 1)]

    def translate(self, params: nnx.State, texts: Sequence[str], search: BeamSearch | None = None) -> list[str]:
        """The best translation of each text; an empty text where there is none."""
        found = self.hypotheses(params, texts, search)
        return [self.target_tokenizer.decode(best[0].tokens) if best else "" for best in found]

    def quality(self, params: nnx.State, pairs: Sequence[tuple[str, str]], search: BeamSearch | None = None) -> Quality:
        """Scores of the translations of the pairs' sources against their targets; a source that is too long gives empty text."""
        fitting = [pair for pair in pairs if self.fits(pair[0])]
        found = iter(self.translate(params, [source for source, _ in fitting], search))
        return score([next(found) if self.fits(source) else "" for source, _ in pairs], [target for _, target in pairs])

    def fits(self, text: str) -> bool:
        """Whether the model can read a text."""
        return 0 < len(self.tokenizer.encode(text)) < self.config.model.max_length


def spread(pairs: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """At most `count` pairs, evenly spaced, in order."""
    places = dict.fromkeys(index * len(pairs) // count for index in range(count))
    return [pairs[place] for place in places] if pairs else []


def score(translations: Sequence[str], references: Sequence[str]) -> Quality:
    """BLEU and chrF of a corpus, by sacrebleu (Post 2018)."""
    import sacrebleu

    references = [list(references)]  # type: ignore[list-item]
    bleu = sacrebleu.corpus_bleu(list(translations), references)
    chrf = sacrebleu.corpus_chrf(list(translations), references)
    return Quality(round(bleu.score, 2), round(chrf.score, 2), len(translations))
