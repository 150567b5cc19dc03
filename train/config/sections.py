"""Sections of a run's config that do not affect what it computes: evaluation, checkpoints, logging and samples."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from transformer.errors import Config, require
from transformer.resume import OnResume


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Config):
    """When the held-out text is evaluated."""

    on_resume: ClassVar[OnResume] = OnResume.FREE

    every: int = 500
    """Steps between evaluations; 0: only at the end."""
    batches: int | None = 20
    """Size of an evaluation during training, in training batches: always the same examples, drawn from all sources and classes;
    null: all of the held-out text. The last evaluation always takes all of it."""
    batch_size: int | None = None
    """Examples that are evaluated at once; null: as many as a microbatch has, which need less memory than a training step."""
    translations: int = 500
    """seq2seq: number of held-out pairs, evenly spaced, that are translated for BLEU and chrF at the end; 0: none."""
    patience: int | None = None
    """Stop early after this many evaluations in a row without a better value of checkpoint.best; null: run all steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "every", self.every >= 0, "allowed: 0 or more")
        require(self, "batches", self.batches is None or self.batches >= 1, "allowed: 1 or more, or null")
        require(self, "batch_size", self.batch_size is None or self.batch_size >= 1, "allowed: 1 or more, or null")
        require(self, "translations", self.translations >= 0, "allowed: 0 or more")
        holds = self.patience is None or (self.patience >= 1 and self.every > 0)
        require(self, "patience", holds, "allowed: 1 or more, with evaluation.every above 0; or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """When checkpoints are written, and which ones are kept."""

    on_resume: ClassVar[OnResume] = OnResume.FREE

    every: int = 500
    """Steps between checkpoints; 0: only at the end and on interruption."""
    every_minutes: float | None = None
    """Minutes after which a checkpoint is written too; null: only by steps."""
    keep: int = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    keep_every: int = 0
    """Checkpoints of steps that this number divides are kept for good; 0: none."""
    best: str = "loss"
    """The held-out score that decides which checkpoint is best: the loss, or a metric of the objective (a wrong name lists
    them). Higher is better, except for loss and mse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "every", self.every >= 0, "allowed: 0 or more")
        minutes = self.every_minutes
        require(self, "every_minutes", minutes is None or minutes > 0, "allowed: above 0, or null")
        require(self, "keep", self.keep >= 1, "allowed: 1 or more")
        require(self, "keep_every", self.keep_every >= 0, "allowed: 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(Config):
    """Where metrics go, in addition to the terminal and metrics.jsonl."""

    on_resume: ClassVar[OnResume] = OnResume.FREE

    every: int = 10
    """Steps between two recorded values."""
    attention: int | None = None
    """Steps between two records of what each layer's heads look at (entropy, weight of the token before and of the first one), on
    one small batch of held-out text, next to the fast kernels; null: never."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Where metrics are also recorded: TensorBoard's events in the run's folder, Weights & Biases, MLflow, Trackio; each but the
    first needs the extra of its name."""
    project: str | None = None
    """The project, or experiment, of Weights & Biases, MLflow or Trackio; null: the run's name."""
    examples: bool = False
    """Also write the ids of every step's examples, a line for each step, to examples/PROCESS.jsonl in the run's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "every", self.every >= 1, "allowed: 1 or more")
        require(self, "trackers", len(set(self.trackers)) == len(self.trackers), "allowed: each once")
        require(self, "attention", self.attention is None or self.attention >= 1, "allowed: 1 or more, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    """Sample texts that the model writes during training."""

    on_resume: ClassVar[OnResume] = OnResume.FREE

    every: int = 1000
    """Steps between samples; 0: only at the end."""
    prompt: str = "\n"
    """Prompt of the sample."""
    max_tokens: int = 128
    """Length of the sample, in tokens; 0: no samples."""
    temperature: float = 0.8
    """Sampling temperature; 0: the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens whose probabilities sum to this (nucleus sampling)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "every", self.every >= 0, "allowed: 0 or more")
        require(self, "max_tokens", self.max_tokens >= 0, "allowed: 0 or more")
        require(self, "temperature", self.temperature >= 0, "allowed: 0 or more")
        require(self, "top_p", 0 < self.top_p <= 1, "allowed: above 0, at most 1")
