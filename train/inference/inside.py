"""A run's model to look into and to change, by texts: what `transformer.interpret.interventions` does with token ids."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from flax import nnx

from train.data.tokenization.tokenizer import MASK
from train.inference.attend import tokens_of
from train.inference.labels import labels
from train.parallel.mesh import use_mesh
from train.run.run_files import LoadedRun
from transformer.errors import UserError, check_text, shown
from transformer.functional import graphdef_of
from transformer.interpret.interventions import (
    Ablation,
    Attribution,
    HeadStatistics,
    Importance,
    Inputs,
    Lens,
    Patching,
    Subject,
    ablate,
    attribute,
    encoder_inputs,
    head_importance,
    head_statistics,
    induction_scores,
    logit_lens,
    next_token_inputs,
    pair_inputs,
    patch,
)
from transformer.models.bert import BertConfig
from transformer.models.encoder_decoder import EncoderDecoderConfig
from transformer.models.families import make_model


class Inside:
    """The model of a loaded run as a `Subject`.

    A language model (gpt) is asked for the token after a text; a masked model (bert) for the token at its one `[MASK]`; a
    classifier for the class; an encoder-decoder for the token after `target`, the beginning of what it writes for the text.

    Args:
        name: the run, in messages.

    Raises:
        UserError: a model without blocks of attention, or without scores of tokens or classes.
    """

    def __init__(self, loaded: LoadedRun, name: str) -> None:
        self._loaded, self._name = loaded, name
        graphdef = graphdef_of(functools.partial(make_model, loaded.config.model))
        self.subject = Subject(nnx.merge(graphdef, loaded.params))

    def ablate(
        self, texts: str | Sequence[str], heads: Collection[tuple[Any, ...]], how: str = "zero", *, target: str = ""
    ) -> Ablation:
        """`interventions.ablate`. Raises `UserError`."""
        with self.on_mesh():
            return ablate(self.subject, self.inputs(texts, target), heads, how)

    def importance(
        self, texts: str | Sequence[str], how: str = "zero", *, answer: str | None = None, instead: str | None = None,
        target: str = "",
    ) -> Importance:  # fmt: skip
        """`interventions.head_importance`. Raises `UserError`."""
        options = self._answers(answer, instead)
        with self.on_mesh():
            return head_importance(self.subject, self.inputs(texts, target), how, **options)

    def patch(
        self, text: str, corrupted: str, *, answer: str | None = None, instead: str | None = None, target: str = ""
    ) -> Patching:
        """`interventions.patch`. Raises `UserError`."""
        options = self._answers(answer, instead)
        clean, other = self.inputs(text, target), self.inputs(corrupted, target)
        with self.on_mesh():
            return patch(self.subject, clean, other, **options)

    def lens(self, text: str, *, top: int = 5, answer: str | None = None, target: str = "") -> Lens:
        """`interventions.logit_lens`. Raises `UserError`."""
        if top < 1:
            raise UserError(f"top: got {top}; allowed: 1 or more")
        option = self._answers(answer, None)["answer"]
        with self.on_mesh():
            return logit_lens(self.subject, self.inputs(text, target), top=top, answer=option)

    def attribute(
        self, text: str, *, answer: str | None = None, instead: str | None = None, target: str = ""
    ) -> Attribution:
        """`interventions.attribute`. Raises `UserError`."""
        options = self._answers(answer, instead)
        with self.on_mesh():
            return attribute(self.subject, self.inputs(text, target), **options)

    def statistics(self, texts: str | Sequence[str], *, target: str = "") -> dict[str, HeadStatistics]:
        """`interventions.head_statistics`. Raises `UserError`."""
        with self.on_mesh():
            return head_statistics(self.subject, self.inputs(texts, target))

    def induction(self, length: int = 32) -> np.ndarray:
        """`interventions.induction_scores`. Raises `UserError`."""
        with self.on_mesh():
            return induction_scores(self.subject, length)

    def inputs(self, texts: str | Sequence[str], target: str = "") -> Inputs:
        """The tokens of one or several texts. Raises `UserError` for a text that does not fit."""
        given = [texts] if isinstance(texts, str) else list(texts)
        if not given:
            raise UserError("texts: got none; give at least one")
        loaded, model = self._loaded, self._loaded.config.model
        if isinstance(model, EncoderDecoderConfig):
            return self._pairs(given, target)
        if target:
            raise UserError(f"target: only an encoder-decoder has one; this is a model of family {model.family}")
        masked = isinstance(model, BertConfig) and not self.subject.scores_rows
        ids = [tokens_of(loaded, text, self._name, special=masked) for text in given]
        if not isinstance(model, BertConfig):
            return next_token_inputs(ids)
        return encoder_inputs(ids, [self._masked_place(one) if masked else 0 for one in ids])

    def labels(self, inputs: Inputs) -> dict[str, list[str]]:
        """The tokens of the first row as text, by the prefix of the stack that reads them."""
        loaded = self._loaded
        decoded = labels(loaded.target_tokenizer, np.asarray(inputs.tokens_BT)[0])
        if inputs.source_BS is None:
            return {"": labels(loaded.tokenizer, np.asarray(inputs.tokens_BT)[0])}
        return {"encoder.": labels(loaded.tokenizer, np.asarray(inputs.source_BS)[0]), "decoder.": decoded}

    def answer_label(self, number: int) -> str:
        """The text of a token, or the name of a class."""
        if self.subject.scores_rows:
            names = self._loaded.labels
            return names[number] if number < len(names) else str(number)
        if number >= self._loaded.target_tokenizer.vocab_size:
            return f"token {number}"
        return labels(self._loaded.target_tokenizer, np.array([number]))[0]

    def answer_number(self, name: str, text: str) -> int:
        """The token that an answer consists of, or the number of a class.

        Raises:
            UserError: an answer of no or several tokens, or a class that the model does not have.
        """
        check_text(name, text)
        if self.subject.scores_rows:
            names = self._loaded.labels
            if text not in names:
                raise UserError(f"{name}: got {shown(text)}; the classes are {', '.join(names)}")
            return names.index(text)
        tokenizer = self._loaded.target_tokenizer
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            parts = " ".join(map(shown, labels(tokenizer, ids)))
            raise UserError(
                f"{name}: {shown(text)} is {len(ids)} tokens{f' ({parts})' if parts else ''}; give one token, with the space "
                "before it if it has one"
            )
        return int(ids[0])

    def _answers(self, answer: str | None, instead: str | None) -> dict[str, int | None]:
        given = {"answer": answer, "instead": instead}
        return {name: None if text is None else self.answer_number(name, text) for name, text in given.items()}

    def _masked_place(self, ids: np.ndarray) -> int:
        found = np.flatnonzero(ids == self._loaded.tokenizer.special(MASK))
        if len(found) != 1:
            raise UserError(
                f"text: it has {len(found)} {MASK}; a masked model answers at one: write {MASK} for that token"
            )
        return int(found[0])

    def _pairs(self, texts: Sequence[str], target: str) -> Inputs:
        loaded, most = self._loaded, self._loaded.config.model.max_length
        end, own = loaded.tokenizer.end_of_text, loaded.target_tokenizer
        sources = []
        for text in texts:
            check_text("text", text)
            ids = loaded.tokenizer.encode(text).tolist()
            if not ids:
                raise UserError("text: this run's tokenizer gives no tokens for it")
            sources.append([*ids, end])
        written = own.encode(target).tolist()
        for name, size in (("text", max(map(len, sources))), ("target", len(written) + 1)):
            if size > most:
                raise UserError(
                    f"{name}: its {size:,} tokens exceed the model's context of {most:,}; give a shorter one"
                )
        return pair_inputs(sources, [written] * len(sources), own.end_of_text, own.end_of_text)

    def on_mesh(self) -> Any:
        """The context in which the subject's programs run."""
        return use_mesh(self._loaded.mesh, self._loaded.config.mesh.rules)
