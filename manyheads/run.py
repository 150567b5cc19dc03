"""A trained model in Python: loads a run, an import, or a Hugging Face folder, and uses it.

S source position, T target position, D embed, L layers, N heads.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from flax import nnx

from train.config import RunConfig, parse
from train.config import load as load_config
from train.data.sources.records import Document
from train.data.tokenization.tokenizer import Tokenizer
from train.files import cache_dir
from train.finetune.base import find_base
from train.huggingface.import_checkpoint import files_digest, import_checkpoint
from train.inference.attend import maps_of, tokens_of
from train.inference.embed import Embedder
from train.inference.generate import default_length, sampling_of
from train.inference.inside import Inside
from train.inference.predict import as_task_run, predictions, with_threshold
from train.inference.translate import alignment
from train.objectives.tasks.task import Prediction
from train.parallel.mesh import use_mesh
from train.remote import local_run
from train.run.loop import train as train_run
from train.run.run_files import LoadedRun, load_run
from train.translation import TextTranslator
from transformer.errors import UserError
from transformer.functional import graphdef_of
from transformer.generation.beam import BeamSearch
from transformer.generation.generate import Generator, until_end
from transformer.interpret.capture import AttentionMaps
from transformer.interpret.interventions import Ablation, Attribution, HeadStatistics, Importance, Lens, Patching
from transformer.models.bert import BertConfig
from transformer.models.families import make_model
from transformer.models.gpt import GPTConfig
from transformer.types import Float


def train(config: RunConfig | str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Run:
    """Train, or resume a stopped run, and return the run.

    Args:
        config: a config, its fields as plain data, or the path of a YAML file.
        overrides: as on the command line, such as `["--steps=500", "--model.num-layers=8"]`; for a path or plain data.

    Raises:
        UserError: as in `manyheads train`.
    """
    if isinstance(config, str | Path):
        config = load_config(config, overrides, find_base=find_base)
    elif not isinstance(config, RunConfig):
        config = parse(dict(config), "the config", overrides, find_base=find_base)
    train_run(config)
    return load(config.directory)


def load(folder: str | Path, step: str | int = "best") -> Run:
    """Load a run, an import, or a folder with a Hugging Face checkpoint, with its parameters on the available devices.

    The folder may be at an address such as `s3://bucket/runs/one`.

    Args:
        step: of a run: `best` by its scores (the latest if none was evaluated), `latest`, or a number.

    Raises:
        UserError: no such folder or checkpoint.
    """
    folder = local_run(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run, an import, or a Hugging Face checkpoint")
    if (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir():
        folder = _imported(folder)
    return Run(folder, load_run(folder, str(step)))


def _imported(folder: Path) -> Path:
    """The import of a Hugging Face folder, cached as long as the folder's files are unchanged."""
    place = cache_dir() / "imports" / files_digest(folder)
    return place if place.is_dir() else import_checkpoint(str(folder), place, verify=False)


class Run:
    """A trained model with its config and tokenizer.

    Attributes:
        directory: its folder.
        config: of the run; `config.model` is the model's.
        tokenizer, target_tokenizer: of the input, and of the target; they differ only for pairs with two vocabularies.
        params: the model's parameters, as `nnx.State`.
        labels: the names of its classes or tags, in the order of their numbers.
        step: the step of the checkpoint.
    """

    def __init__(self, directory: Path, loaded: LoadedRun) -> None:
        self.directory = directory
        self._loaded = loaded
        self._embedders: dict[tuple[Any, ...], Embedder] = {}

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, step={self.step}, family={self.config.model.family!r})"

    @property
    def config(self) -> RunConfig:
        return self._loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def target_tokenizer(self) -> Tokenizer:
        return self._loaded.target_tokenizer

    @property
    def params(self) -> nnx.State:
        return self._loaded.params

    @property
    def labels(self) -> tuple[str, ...]:
        return self._loaded.labels

    @property
    def step(self) -> int:
        return self._loaded.step

    @functools.cached_property
    def model(self) -> nnx.Module:
        """The model as a module, with these parameters."""
        return nnx.merge(graphdef_of(functools.partial(make_model, self.config.model)), self.params)

    @overload
    def generate(
        self, prompts: str, *, max_tokens: int | None = None, seed: int = 0, beams: int | None = None,
        special: bool = False, **options: Any,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: Sequence[str], *, max_tokens: int | None = None, seed: int = 0, beams: int | None = None,
        special: bool = False, **options: Any,
    ) -> list[str]: ...  # fmt: skip

    def generate(
        self, prompts: str | Sequence[str], *, max_tokens: int | None = None, seed: int = 0, beams: int | None = None,
        special: bool = False, **options: Any,
    ) -> str | list[str]:  # fmt: skip
        """The continuation of a prompt, or of each of several.

        Args:
            max_tokens: of each continuation; by default an import's own, or 256, or what the context leaves.
            seed: random seed of the sampling.
            beams: beam search with this number of beams, instead of sampling.
            special: special tokens that a prompt spells out are those tokens; by default they are text.
            options: of `Sampling` (temperature, top_k, top_p, min_p, repetition_penalty), an import's own by default; or with
                beams of `BeamSearch`.

        Raises:
            UserError: the model is not a language model, or a prompt does not fit it.
        """
        model = self.config.model
        if not isinstance(model, GPTConfig):
            raise self._cannot("generate", "a language model (gpt)")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.tokenizer.prompt(text, special=special) for text in texts]
        if max_tokens is None:
            max_tokens = default_length(model, ids, self.tokenizer)
        with self._on_mesh():
            if beams is not None:
                search = BeamSearch(beams=beams, **options)
                found = self._generator.search(self.params, ids, max_tokens=max_tokens, search=search)
                written = [list(ranked[0].tokens) for ranked in found]
            else:
                chunks = self._generator.generate(
                    self.params, ids, max_tokens=max_tokens, sampling=sampling_of(self.tokenizer, options), seed=seed
                )
                written = until_end(chunks, self.tokenizer.ends)
        continuations = [self.tokenizer.continuation(own, new) for own, new in zip(ids, written, strict=True)]
        return continuations[0] if isinstance(prompts, str) else continuations

    @overload
    def translate(self, texts: str, **options: Any) -> str: ...

    @overload
    def translate(self, texts: Sequence[str], **options: Any) -> list[str]: ...

    def translate(self, texts: str | Sequence[str], **options: Any) -> str | list[str]:
        """The best translation of a text, or of each of several.

        Args:
            options: of `BeamSearch` (beams, length_penalty, coverage_penalty).

        Raises:
            UserError: the model was not trained on pairs, or a text does not fit it.
        """
        with self._on_mesh():
            given = [texts] if isinstance(texts, str) else list(texts)
            found = self._translator.translate(self.params, given, BeamSearch(**options))
        return found[0] if isinstance(texts, str) else found

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        pooling: Any = None,
        normalize: bool | None = None,
        prompt_name: str | None = None,
    ) -> Float[np.ndarray, "*texts D"]:
        """The vector of a text, or the vectors of several, in float32.

        Args:
            pooling: `cls`, `max`, `mean`, `mean_sqrt_len`, `weighted_mean` or `last`; the model's own by default.
            normalize: whether the last step scales the vectors to length 1; as the model does by default.
            prompt_name: which of the model's prompts to put before each text; its default one, or none, by default.

        Raises:
            UserError: the model is not an encoder, or has no such prompt.
        """
        if not isinstance(self.config.model, BertConfig):
            raise self._cannot("embed", "an encoder (bert)")
        if (kind := (pooling, normalize, prompt_name)) not in self._embedders:
            self._embedders[kind] = Embedder(
                self.config.model, self.tokenizer, pooling=pooling, normalize=normalize, prompt_name=prompt_name
            )  # fmt: skip
        with self._on_mesh():
            vectors = self._embedders[kind](self.params, [texts] if isinstance(texts, str) else list(texts))
        return vectors[0] if isinstance(texts, str) else vectors

    def predict(
        self, documents: Sequence[str | tuple[str, str] | Document], *, threshold: float | None = None
    ) -> list[Prediction]:
        """The model's prediction for each document: its label and scores.

        Args:
            documents: texts; pairs of texts, for a model of pairs; or documents with words or choices.
            threshold: of multi-label classification: the probability from which on a class is predicted; the run's by default.

        Raises:
            UserError: the model was not fine-tuned on a task, or expects other documents.
        """
        loaded, task, source = as_task_run(self._loaded, str(self.directory))
        made = [_document(document, number) for number, document in enumerate(documents)]
        for document in made:
            if (document.target is not None or bool(document.choices)) != source.gives_pairs:
                wanted = "pairs of texts" if source.gives_pairs else "single texts"
                raise UserError(f"document {document.id}: this model takes {wanted}")
        return predictions(loaded, with_threshold(task, threshold), made, "documents")

    def attention(
        self, text: str, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
    ) -> AttentionMaps:
        """The attention weights of a text, which a notebook displays; for a translator, those between a text and its translation.

        Args:
            layers, heads: numbers from 0; all of them by default.

        Raises:
            UserError: a layer or head that does not exist, or a text that does not fit.
        """
        with self._on_mesh():
            if not self.config.objective.translates:
                tokens = tokens_of(self._loaded, text, str(self.directory))
                return maps_of(self._loaded, tokens, layers, heads)
            best = self._translator.hypotheses(self.params, [text], BeamSearch())[0]
            source = self._translator.tokens_of(text)
            return alignment(self._loaded, source, list(best[0].tokens) if best else [])

    def ablate(
        self, texts: str | Sequence[str], heads: Collection[tuple[Any, ...]], how: str = "zero", *, target: str = ""
    ) -> Ablation:
        """The model's loss and scores without some of its heads.

        In all methods that look inside, the answer of a language model is the token after a text; of a masked model the token at
        its one `[MASK]`; of a classifier the class; and of an encoder-decoder the token after `target`.

        Args:
            heads: as (layer, head), from 0; of an encoder-decoder as (part, layer, head), with part `encoder.attention`,
                `decoder.attention` or `decoder.cross`.
            how: what replaces their outputs: zeros (`zero`), or their means over the texts' tokens (`mean`).
            target: the beginning of what an encoder-decoder writes.

        Raises:
            UserError: a head that does not exist, a text that does not fit, or a model without blocks of attention (recurrent).
        """
        return self._inside.ablate(texts, heads, how, target=target)

    def head_importance(self, texts: str | Sequence[str], how: str = "zero", **options: Any) -> Importance:
        """What the ablation of each head alone does, as a table [layers, heads] for each part.

        Args:
            how: as for `ablate`.
            options: `answer` and `instead`, one token or class each: measure the fall of their logits' difference; by default the
                rise of the loss, or for a model that predicts no token of the texts the fall of its answer's log-probability. And
                `target`.

        Raises:
            UserError: as `ablate`, or an answer that is not one token or class.
        """
        return self._inside.importance(texts, how, **options)

    def patch(self, text: str, corrupted: str, **options: Any) -> Patching:
        """How much of a text's answer each value of its run brings back in a corrupted text: 0 as corrupted, 1 as clean.

        Args:
            corrupted: a text of as many tokens, with another answer.
            options: `answer` and `instead`, by default the likeliest answers of the two texts; and `target`.

        Raises:
            UserError: texts of different lengths, or that give both answers the same logit difference.
        """
        return self._inside.patch(text, corrupted, **options)

    def lens(self, text: str, *, top: int = 5, answer: str | None = None, target: str = "") -> Lens:
        """The `top` likeliest answers after each layer, and the probability and rank of the next token, or of the `answer`.

        Raises:
            UserError: as `ablate`.
        """
        return self._inside.lens(text, top=top, answer=answer, target=target)

    def attribute(self, text: str, **options: Any) -> Attribution:
        """What the embedding, each head and each feed-forward layer add to the logit of `answer` minus that of `instead`.

        Args:
            options: `answer` and `instead`, by default the two likeliest; and `target`.

        Raises:
            UserError: a model whose logits are not a sum of parts, such as a post-norm one.
        """
        return self._inside.attribute(text, **options)

    def head_statistics(self, texts: str | Sequence[str], *, target: str = "") -> dict[str, HeadStatistics]:
        """Entropy, weight of the token before and of the first one, and mean distance of each head over many texts, by part.

        Raises:
            UserError: as `ablate`, or attention whose weights are not distributions.
        """
        return self._inside.statistics(texts, target=target)

    def induction_scores(self, length: int = 32) -> Float[np.ndarray, "L N"]:
        """How much each head of a language model continues a random sequence of `length` tokens when it is repeated.

        Raises:
            UserError: not a language model (gpt).
        """
        return self._inside.induction(length)

    @functools.cached_property
    def _inside(self) -> Inside:
        return Inside(self._loaded, str(self.directory))

    @functools.cached_property
    def _generator(self) -> Generator:
        model = self.config.model
        assert isinstance(model, GPTConfig)
        return Generator(model, end_of_text=self.tokenizer.ends, num_tokens=self.tokenizer.vocab_size)

    @functools.cached_property
    def _translator(self) -> TextTranslator:
        if not self.config.objective.translates:
            raise self._cannot("translate", "a model trained on pairs of texts")
        return TextTranslator(self.config, self.tokenizer, self.target_tokenizer)

    def _on_mesh(self) -> Any:
        return use_mesh(self._loaded.mesh, self.config.mesh.rules)

    def _cannot(self, what: str, wanted: str) -> UserError:
        model, objective = self.config.model.family, self.config.objective.kind
        return UserError(
            f"{self.directory}: {what} needs {wanted}; this is a model of family {model}, objective {objective}"
        )


def _document(given: str | tuple[str, str] | Document, number: int) -> Document:
    if isinstance(given, Document):
        return given
    if isinstance(given, str):
        return Document(str(number), given)
    text, target = given
    return Document(str(number), text, target)
