"""Everything that decides what a run computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.config.sections import CheckpointConfig, EvaluationConfig, LogConfig, SampleConfig
from train.data.prepared.prepare import DataConfig
from train.loss import LossConfig
from train.objectives import AnyObjective, Causal
from train.optimizer import OptimizerConfig
from train.parallel.mesh import MeshConfig
from train.remote import local_path
from train.stability import StabilityConfig
from transformer.errors import Config, require
from transformer.layers.adapter import AdapterConfig
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.models.families import ModelConfig
from transformer.models.gpt import GPTConfig
from transformer.resume import Ask, Free, Upwards

_STEPS, _MOST_EPOCHS = 1000, 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Everything that decides what a run computes."""

    name: Free[str]
    """Name of the run."""
    run_dir: Free[str | None] = None
    """Folder of the run, also at an address such as s3://bucket/runs/one; null: runs/NAME."""
    init_from: Ask[str | None] = None
    """What training begins from, with its model and tokenizer wherever the config does not name others: the folder or address of
    a run, a folder with a Hugging Face checkpoint, or its name on the hub. Parameters that it lacks are random; null: all are."""
    seed: Ask[int] = 0
    """Random seed of the initial weights, dropout and the order of the data."""
    steps: Upwards[int] = _STEPS
    """Optimiser steps."""
    epochs: Upwards[float | None] = None
    """Passes over all examples, in place of `steps`, which then follow from the data; null: as `steps` says."""
    batch_size: Ask[int] = 32
    """Sequences in a step, over all devices and microbatches."""
    length: Ask[int | None] = None
    """Tokens in a training sequence; null: model.max_length."""
    microbatches: Free[int] = 1
    """Number of parts that a step's batch is split into and computed in sequence (gradient accumulation)."""
    model: ModelConfig = GPTConfig()
    """The network; its `family` decides which fields there are."""
    adapter: AdapterConfig | None = None
    """Low-rank adapters, which are trained instead of the network's own parameters; null: none."""
    objective: AnyObjective = Causal()
    """The training objective; its `kind` decides which fields there are."""
    data: DataConfig = DataConfig()
    """The training text, and how it becomes sequences of tokens."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser and its learning-rate schedule."""
    loss: LossConfig = LossConfig()
    """Additional terms of the loss, and its chunks."""
    stability: StabilityConfig = StabilityConfig()
    """Which updates are skipped, and what follows."""
    mesh: MeshConfig = MeshConfig()
    """How the run is spread over devices."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out text."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints on disk."""
    log: LogConfig = LogConfig()
    """Logging of metrics."""
    sample: SampleConfig = SampleConfig()
    """Sample texts during training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.name.strip(". ") and not any(letter in self.name for letter in "/\\\0") and self.name.isprintable()
        require(self, "name", bool(plain), "allowed: text that can be the name of a folder, without a slash")
        for field in ("steps", "batch_size", "microbatches"):
            require(self, field, getattr(self, field) >= 1, "allowed: 1 or more")
        holds = self.epochs is None or 0 < self.epochs <= _MOST_EPOCHS
        require(self, "epochs", holds, f"allowed: above 0, up to {_MOST_EPOCHS:,}, or null")
        wanted = "with epochs the steps follow from the data; leave out one of the two"
        require(self, "steps", self.epochs is None or self.steps == _STEPS, wanted)
        require(self, "seed", 0 <= self.seed < 2**32, "allowed: 0 to 2**32 - 1")
        self.objective.check_model(self.model)
        self.objective.check_mesh(self.mesh)
        self.objective.check_loss(self.loss)
        known = ("loss", *self.objective.metrics)
        require(
            self.checkpoint, "best", self.checkpoint.best in known,
            f"allowed with objective {self.objective.kind}: {', '.join(known)}",
        )  # fmt: skip
        decay = self.optimizer.layer_decay
        require(
            self.optimizer, "layer_decay", decay is None or self.model.family in ("gpt", "bert"),
            f"layer_decay needs one stack of blocks (gpt, bert), and the model family is {self.model.family!r}; "
            "allowed: null",
        )  # fmt: skip
        shares = getattr(self.model, "distinct_layers", None) is not None
        alone = "its layers share parameters (model.distinct_layers); allowed: "
        require(self.optimizer, "layer_decay", decay is None or not shares, f"{alone}null")
        require(
            self.mesh, "strategy", self.mesh.strategy != "pipeline" or not shares, f"{alone}any strategy but pipeline"
        )
        holds = isinstance(getattr(self.model, "mlp", None), ExpertsConfig) or self.mesh.expert in (None, 1)
        require(self.mesh, "expert", holds, "the model has no experts (model.mlp.kind); allowed: 1 or null")
        longest = self.model.max_length
        require(
            self, "length", self.length is None or 1 <= self.length <= longest,
            f"allowed: 1 to model.max_length ({longest}), or null",
        )  # fmt: skip
        require(
            self,
            "microbatches",
            self.batch_size % self.microbatches == 0,
            f"allowed: a divisor of batch_size ({self.batch_size})",
        )
        whole = self.microbatches == 1 or not self.objective.compares_rows
        compared = f"objective {self.objective.kind} compares all rows of a batch with each other; allowed: 1"
        require(self, "microbatches", whole, compared)

    @property
    def sequence_length(self) -> int:
        """`length` with its default filled in."""
        return self.model.max_length if self.length is None else self.length

    @property
    def tokens_per_example(self) -> int:
        """Tokens of all rows that the model reads for one example, padding included."""
        return self.objective.rows_per_example * self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all rows of a batch, padding included."""
        return self.batch_size * self.tokens_per_example

    @property
    def evaluation_batch_size(self) -> int:
        """`evaluation.batch_size` with its default filled in."""
        # A loss that compares rows is another one in a smaller batch.
        usual = self.batch_size if self.objective.compares_rows else self.batch_size // self.microbatches
        return usual if self.evaluation.batch_size is None else self.evaluation.batch_size

    @property
    def evaluation_batches(self) -> int | None:
        """Batches of `evaluation_batch_size` in an evaluation during training; None: all."""
        batches = self.evaluation.batches
        return None if batches is None else -(-batches * self.batch_size // self.evaluation_batch_size)

    @property
    def directory(self) -> Path:
        """The run's folder on this machine: `run_dir` with its default filled in; where that is an address, its local copy."""
        return Path("runs", self.name) if self.run_dir is None else local_path(self.run_dir)
