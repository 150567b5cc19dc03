"""Evaluation on held-out text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from train.config import RunConfig
from train.data.evaluation import evaluation_batches
from train.data.loader import prefetch_to_device
from train.data.prepared.store import Prepared
from train.loss import Batch, LossSums
from train.objectives import Task
from train.objectives.tasks.documents import TaskDocuments
from train.objectives.tasks.task import Prediction
from train.parallel.mesh import shard_batch
from train.program.program import Program
from train.translation import Quality, TextTranslator, spread

T = TypeVar("T")

_UNDER_WAY = 2
"""Number of batches in flight: the sums of a batch are read this many batches later."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """A model's scores on held-out text."""

    loss: float
    """Negative log-likelihood in nats per token, or per row; for regression the mean squared error."""
    perplexity: float | None
    """Perplexity per token; None for classes of rows."""
    bits_per_byte: float | None
    """Bits per byte of UTF-8 text, comparable across tokenizers and with file compressors; None if bytes are unknown."""
    tokens: int
    """Number of predictions: tokens, or rows."""
    accuracy: float | None = None
    """The fraction of rows, or words, that are classified correctly; None for tokens."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The objective's metrics, by name."""
    sources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The loss on each source by its name, if there are several."""

    def __str__(self) -> str:
        """The available scores, as text."""
        parts = {
            "perplexity": (self.perplexity, ".2f"), "bits per byte": (self.bits_per_byte, ".4f"),
            "accuracy": (self.metrics.get("accuracy", self.accuracy), ".2%"),
        }  # fmt: skip
        known = "".join(f"  {name} {value:{form}}" for name, (value, form) in parts.items() if value is not None)
        own = "".join(f"  {name} {value:.4f}" for name, value in self.metrics.items() if name != "accuracy")
        return f"loss {self.loss:.4f}{known}{own}"

    def values(self) -> dict[str, float | None]:
        """All scores by name."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("metrics", "sources")}
        return own | {**self.metrics} | {f"loss of {name}": value for name, value in self.sources.items()}


def evaluate(step: Callable[[nnx.State, Batch], T], params: nnx.State, batches: Iterable[Batch]) -> list[T]:
    """Run `step`, made by `make_eval_step`, over all batches; its outputs for each, on the host."""
    return list(outputs_of(step, params, batches))


def outputs_of(step: Callable[[nnx.State, Batch], T], params: nnx.State, batches: Iterable[Batch]) -> Iterator[T]:
    """The same one after the other, without keeping them."""
    waiting: deque[T] = deque()
    for batch in batches:
        waiting.append(step(params, batch))
        # Reading each batch at once would wait for it. More than a few in flight gain nothing, and on virtual devices, which
        # share the threads of one processor, they can wait for each other until the collectives time out.
        if len(waiting) > _UNDER_WAY:
            yield jax.device_get(waiting.popleft())
    while waiting:
        yield jax.device_get(waiting.popleft())


def scores_of(parts: Sequence[LossSums], bytes_per_token: float | None) -> Scores:
    """The mean over tokens, or rows, not over batches.

    Args:
        bytes_per_token: of the whole held-out text.
    """
    # Python floats, so that the sums add up in float64.
    weight = sum(float(part.weight) for part in parts)
    loss = sum(float(part.nll) for part in parts) / max(weight, 1.0)
    bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    correct = [float(part.correct) for part in parts if part.correct is not None]
    if correct:
        return Scores(loss, None, None, int(weight), sum(correct) / max(weight, 1.0))
    if names := [*parts[0].also] if parts else []:
        means = {name: sum(float(part.also[name]) for part in parts) / max(weight, 1.0) for name in names}
        return Scores(loss, None, None, int(weight), metrics=means)
    return Scores(loss, math.exp(min(loss, 700.0)), bits, int(weight))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    scores: Scores
    selection: dict[str, float]
    """Loss and metrics on the batches by which all evaluations are compared, however many batches this one used."""
    predictions: Sequence[Prediction]
    """The predictions for the documents of a task; empty for other objectives."""
    quality: Quality | None
    """The quality of translations, if checkpoints are compared by it."""


class Evaluator:
    """The held-out text of a run, to evaluate repeatedly.

    Args:
        translator: for a run on pairs of texts, in one process.
    """

    def __init__(
        self, config: RunConfig, prepared: Prepared, program: Program, translator: TextTranslator | None
    ) -> None:
        self.config, self._prepared, self._program, self._translator = config, prepared, program, translator
        objective = config.objective
        self.task = (
            TaskDocuments.held_out(objective, prepared, config.sequence_length) if isinstance(objective, Task) else None
        )
        self._baseline = objective.baseline(prepared.validation)
        self._bytes = prepared.meta.bytes_per_token("validation") if objective.predicts_all_text else None

    def evaluate(
        self, params: nnx.State, batches: int | None, stopped: Callable[[], bool]
    ) -> Evaluation | tuple[int, int]:
        """Evaluate the first `batches` batches (None: all); if `stopped` interrupts, return how many of how many were done."""
        config = self.config
        host = evaluation_batches(
            self._prepared,
            config.data,
            batch_size=config.evaluation_batch_size,
            length=config.sequence_length,
            objective=config.objective,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            max_batches=batches,
        )
        device = prefetch_to_device(iter(host), self._to_device)
        found = evaluate(self._program.eval_step, params, itertools.takewhile(lambda _: not stopped(), device))
        if len(found) < len(host):
            return len(found), len(host)
        few = slice(config.evaluation_batches)
        if self.task is None:
            quality = self._quality(params)
            sums = [sums for sums, _ in found]
            scores, selected = (scores_of(part, self._bytes) for part in (sums, sums[few]))
            scores = dataclasses.replace(scores, sources=self._by_source(sums, host.sources))
            return Evaluation(scores, _selection(selected) | _metrics_of(quality), (), quality)
        scores, predictions = self._scores_of_task(found)
        scores = dataclasses.replace(scores, sources=self._by_source([sums for sums, _ in found], host.sources))
        selected = scores if len(found[few]) == len(found) else self._scores_of_task(found[few])[0]
        return Evaluation(scores, _selection(selected), predictions, None)

    def say(self, scores: Scores) -> str:
        """The scores as text."""
        own = "".join(f"\n    {name}: loss {loss:.4f}" for name, loss in scores.sources.items())
        accuracy = scores.metrics.get("accuracy")
        sure = ""
        if accuracy is not None and self.config.objective.unit == "row":
            low, high = wilson(accuracy, scores.tokens)
            sure = f"; accuracy of {scores.tokens:,} rows, 95% interval {low:.1%} to {high:.1%}"
        return f"held-out {scores}{self._baseline}{sure}{own}"

    def _by_source(self, sums: Sequence[LossSums], sources: Sequence[int]) -> dict[str, float]:
        """The loss on each source of which there are batches; empty for a single source."""
        names = [array.name for array in self._prepared.validation]
        if len(names) < 2:
            return {}
        parts = {
            number: [one for one, of in zip(sums, sources, strict=False) if of == number]
            for number in range(len(names))
        }
        # Two sources may have one name.
        titles = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
        return {titles[number]: scores_of(own, None).loss for number, own in parts.items() if own}

    def quality(self, params: nnx.State) -> Quality | None:
        """The quality of translations of the config's number of held-out pairs."""
        if self._translator is None or not (count := self.config.evaluation.translations):
            return None
        return self._translator.quality(self._program.plain(params), spread(self._prepared.validation_pairs(), count))

    def _quality(self, params: nnx.State) -> Quality | None:
        return self.quality(params) if self.config.checkpoint.best in _metrics_of(Quality(0, 0, 0)) else None

    def _scores_of_task(self, found: Sequence[tuple[LossSums, Any]]) -> tuple[Scores, list[Prediction]]:
        assert self.task is not None
        predictions = self.task.predictions([outputs for _, outputs in found])
        # Perplexity is for tokens only.
        scores = dataclasses.replace(scores_of([sums for sums, _ in found], None), perplexity=None)
        return dataclasses.replace(scores, metrics=self.task.metrics(predictions)), predictions

    def _to_device(self, batch: dict[str, np.ndarray]) -> Batch:
        batch = batch | {"example": batch["example"].astype(np.int32)}
        if self.task is None:
            del batch["example"]
        return shard_batch(batch, self._program.batch_sharding)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a probability, of which a `share` of `count` independent draws was seen (Wilson 1927)."""
    z = 1.959964
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


def _selection(scores: Scores) -> dict[str, float]:
    own = {} if scores.accuracy is None else {"accuracy": scores.accuracy}
    return {"loss": scores.loss} | own | {**scores.metrics}


def _metrics_of(quality: Quality | None) -> dict[str, float]:
    return {} if quality is None else {"bleu": quality.bleu, "chrf": quality.chrf}
