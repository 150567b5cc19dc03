"""The base class of objectives: each is one object that is its own config.

Axes: B rows of a batch, T positions.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from train.data.examples.buckets import Buckets
from train.data.examples.pack import Examples, Packing
from train.data.prepared.label_arrays import MARKED
from train.data.prepared.prepare import DataConfig
from train.data.prepared.store import Prepared, TokenArray
from train.data.sources.records import LabelKind
from train.data.tokenization.tokenizer import Tokenizer
from train.loss import DEFAULT_LOSS, Batch, LossConfig, LossSums
from train.parallel.mesh import MeshConfig
from transformer.errors import Config, ConfigError, UserError, require
from transformer.models.bert import BertConfig
from transformer.models.families import ModelConfig
from transformer.resume import OnResume
from transformer.types import Keys

Outputs = dict[str, jax.Array]
"""[B, ...], by name."""

BatchShapes = dict[str, jax.ShapeDtypeStruct]
"""The arrays of a batch, by name, without the numbers of the examples."""


@dataclass(frozen=True, kw_only=True)
class Objective(Config, abc.ABC):
    """A training objective.

    A subclass is a config whose fields are the objective's settings, with everything that depends on it. The class
    variables say what it supports; the methods make examples, describe batches and compute losses.
    """

    on_resume: ClassVar[OnResume] = OnResume.ASK

    kind: str
    """Kind of objective."""

    families: ClassVar[tuple[str, ...]]
    """The model families that it supports."""
    heads: ClassVar[tuple[str, ...]] = ()
    """Kinds of head of a `bert` model that it trains; empty: any."""
    takes_pairs: ClassVar[bool | None] = False
    """Whether it takes pairs of texts (True), single texts (False), or either (None)."""
    label_kind: ClassVar[LabelKind | None] = None
    """The kind of labels that its documents must have."""
    packings: ClassVar[tuple[Packing, ...]] = ("chunk", "documents")
    """The values of `data.packing` that it supports."""
    packs: ClassVar[bool] = True
    """Whether packing `documents` puts several documents into a row; else each has a row of its own."""
    least_length: ClassVar[int] = 1
    """The fewest tokens of a sequence."""
    loss_settings: ClassVar[tuple[str, ...]] = ("z_loss", "label_smoothing")
    """The fields of `LossConfig` that apply to it."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """The metrics by which the best checkpoint may be chosen, in addition to the loss."""
    lower_is_better: ClassVar[tuple[str, ...]] = ("loss",)
    """Those of the loss and the metrics for which lower is better."""
    unit: ClassVar[str] = "tok"
    """The name of one prediction, in messages."""
    compares_rows: ClassVar[bool] = False
    """Whether the loss compares the rows of a batch with each other, so that it depends on the size of the batch."""
    needs_reference: ClassVar[bool] = False
    """Whether it compares with what the weights that the run begins with say of its data."""
    predicts_all_text: ClassVar[bool] = False
    """Whether every token of the text is predicted once, from those before it, so that bits per byte are meaningful."""
    translates: ClassVar[bool] = False
    """Whether its models translate texts."""
    own_target_tokenizer: ClassVar[bool] = False
    """Whether the target side of pairs may have a vocabulary of its own."""
    use: ClassVar[tuple[str, str] | None] = None
    """What a trained model is for, and the command, with `{}` for the run: `("write", "manyheads generate {}")`."""

    # ── what it supports ─────────────────────────────────────────────────────────────────────────────────────────────

    def check_model(self, model: ModelConfig) -> None:
        """Raise a `ConfigError` unless the model can be trained on it."""
        if model.family not in self.families:
            suited = sorted(one.kind_name() for one in objectives() if model.family in one.families)
            allowed = f"allowed with a model of family {model.family!r}: {', '.join(suited)}"
            raise ConfigError(type(self), "kind", self.kind, allowed)
        if self.heads and isinstance(model, BertConfig):
            needed = " or ".join(map(repr, self.heads))
            require(
                model.head, "kind", model.head.kind in self.heads, f"allowed with objective {self.kind!r}: {needed}"
            )

    def check_mesh(self, mesh: MeshConfig) -> None:
        """Raise a `ConfigError` unless the objective can be trained in this way."""

    def check_loss(self, loss: LossConfig) -> None:
        """Raise a `ConfigError` for a setting that does not apply to this objective."""
        for name in ("z_loss", "label_smoothing"):
            holds = name in self.loss_settings or not getattr(loss, name)
            require(loss, name, holds, f"not for objective {self.kind}; allowed: 0")

    def check_data(self, prepared: Prepared, length: int) -> None:
        """Raise a `UserError` unless the data suits it, with sequences of `length` tokens to predict."""
        kind = self.kind
        if self.takes_pairs and not prepared.pairs:
            raise UserError(
                f"objective.kind: {kind!r} needs pairs, but the sources give single texts; set their target_field"
            )
        if self.takes_pairs is False and prepared.pairs:
            paired = " or ".join(sorted(one.kind_name() for one in objectives() if one.takes_pairs))
            raise UserError(
                f"objective.kind: {kind!r} is for single texts, but the sources give pairs; set it to {paired}"
            )
        if not self.own_target_tokenizer and prepared.own_target_tokenizer is not None:
            raise UserError(f"data.target_tokenizer: one encoder reads both sides of a {kind} pair; set it to null")
        self._check_documents(prepared)
        if length < self.least_length:
            raise UserError(f"length: got {length}; {kind} needs at least {self.least_length} tokens")
        self._check_lengths(length)
        if missing := [name for name in self.special_tokens if prepared.tokenizer.special(name) is None]:
            names = ", ".join(f'"{name}"' for name in self.special_tokens)
            raise UserError(
                f"objective.kind: {kind!r} needs {', '.join(missing)}, which the vocabulary lacks; set "
                f"data.tokenizer.special_tokens: [{names}]"
            )
        self._check_text(prepared, length)

    def check_classes(self, prepared: Prepared, model: ModelConfig) -> None:
        """Raise a `UserError` unless the model has the same number of classes as the data."""

    def _check_documents(self, prepared: Prepared) -> None:
        """Raise a `UserError` for documents of the wrong kind."""
        if (given := prepared.meta.label_kind) in MARKED and given != self.label_kind:
            what = "dialogues" if given == "turns" else "preferences"
            suited = " or ".join(repr(one.kind_name()) for one in objectives() if one.label_kind == given)
            raise UserError(
                f"objective.kind: {self.kind!r} is for texts, but the sources hold {what}; set it to {suited}"
            )
        if any(array.others > 1 for array in prepared.train):
            raise UserError(f"objective.kind: {self.kind!r} is not for texts with choices; set it to 'choice'")

    def _check_lengths(self, length: int) -> None:
        """Raise a `UserError` for a length that is too short for the settings."""

    def _check_text(self, prepared: Prepared, length: int) -> None:
        """Raise a `UserError` for an unsuitable vocabulary, or too little text."""

    # ── tokens and examples ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens that it puts into sequences, except sentinels."""
        return ()

    def largest_inserted(self, tokenizer: Tokenizer) -> int:
        """The largest token id that it may put into sequences; 0 if it puts in none."""
        return max((tokenizer.special(name) or 0 for name in self.special_tokens), default=0)

    def num_labels(self, prepared: Prepared) -> int:
        """The number of classes of a head that leaves it to the data."""
        return len(prepared.meta.labels)

    def with_data(self, prepared: Prepared) -> Self:
        """The objective with every setting that depends on the training data filled in."""
        return self

    def examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        """The examples of an array.

        Args:
            length: tokens of a row.
            training: leave out what does not fill a row, instead of padding it.
            shown: print how many documents are too long.

        Raises:
            UserError: the objective does not support the packing, or there is less text than one example.
        """
        self._check_packing(packing)
        made = self._examples(array, tokenizer, packing, length, training=training, shown=shown)
        if training and not len(made):
            raise UserError(
                f"{array.name}: {len(array.tokens) - 1} tokens are fewer than {self.kind} needs for one sequence; add "
                "text or make the sequences shorter"
            )
        return made

    @abc.abstractmethod
    def _examples(
        self, array: TokenArray, tokenizer: Tokenizer, packing: Packing, length: int, *, training: bool, shown: bool
    ) -> Examples:
        """`examples` with one of `packings`."""

    def buckets(self, array: TokenArray, length: int, batch_size: int, seed: int, *, shown: bool) -> Buckets:
        """The batches of an array with packing `pad`. Raises `UserError` for an objective that has none."""
        self._check_packing("pad")
        raise NotImplementedError

    def _check_packing(self, packing: Packing) -> None:
        if packing not in self.packings:
            reasons: dict[tuple[Packing, ...], str] = {
                ("chunk",): "is for running text",
                ("documents",): "keeps dialogues apart" if self.packs else "takes one document per row",
            }  # fmt: skip
            reason = reasons.get(self.packings, "does not support it")
            allowed = " or ".join(repr(one) for one in self.packings)
            raise UserError(f"data.packing: got {packing!r}; {self.kind} {reason}: set it to {allowed}")

    # ── batches and the loss ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    def rows_per_example(self) -> int:
        """How many rows the model reads for each example of a batch."""
        return 1

    @abc.abstractmethod
    def batch(self, rows: int, length: int, data: DataConfig) -> BatchShapes:
        """The arrays of a batch of `rows` examples of `length` tokens, padding included; with packing `pad` the widest."""

    def model_batch(self, rows: int, model: ModelConfig) -> BatchShapes:
        """The arrays of a batch whose shapes depend on the model, in addition to those of `batch`."""
        return {}

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch, config: LossConfig, *, key: Keys | None = None) -> LossSums:
        """What a training step minimises.

        Args:
            batch: the arrays of `batch`.
            key: turns dropout on.
        """

    def evaluate(self, model: Any, batch: Batch, config: LossConfig = DEFAULT_LOSS) -> tuple[LossSums, Outputs]:
        """The loss without dropout, smoothing, z-loss or class weights; and for each row the outputs for its predictions."""
        return self.loss(model, batch, config.plain()), {}

    def tokens_per_prediction(self, prepared: Prepared, tokens_per_example: int) -> float:
        """How many tokens the model reads for each prediction.

        Args:
            tokens_per_example: of all rows of an example, padding included.
        """
        return 1.0

    # ── for display ──────────────────────────────────────────────────────────────────────────────────────────────────

    def baseline(self, validation: Sequence[TokenArray]) -> str:
        """The score of a constant guess on the held-out documents, as text; empty if unknown."""
        return ""

    def report(self, prepared: Prepared, bits_per_byte: float | None) -> list[str]:
        """Lines to print at the end of a run."""
        return []

    def next_step(self, run: Any) -> str:
        """What to do with a trained model in the folder `run`."""
        if self.use is None:
            return f"it is in {run}"
        purpose, command = self.use
        return f"to {purpose}: {command.format(run)}"

    @classmethod
    def kind_name(cls) -> str:
        """The value of `kind`; empty for a base class."""
        default = cls.__dataclass_fields__["kind"].default
        return "" if default is MISSING else default


def objectives(base: type[Objective] = Objective) -> Iterator[type[Objective]]:
    """Every objective, in the order in which they were defined."""
    for one in base.__subclasses__():
        if one.kind_name():
            yield one
        yield from objectives(one)


def row_shapes(rows: int, length: int, names: Sequence[str], *, prefix: str = "") -> BatchShapes:
    """Arrays [rows, length] of int32."""
    return {f"{prefix}{name}": jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}


def weight_shape(rows: int, width: int = 1) -> BatchShapes:
    """`weights` [rows, width] of float32."""
    return {"weights": jax.ShapeDtypeStruct((rows, width), jnp.float32)}


def label_shape(*shape: int, dtype: Any = np.int32) -> BatchShapes:
    """`labels`."""
    return {"labels": jax.ShapeDtypeStruct(shape, dtype)}


def places_of(batch: Batch, prefix: str = "") -> dict[str, Any]:
    """Where tokens belong, as a model's arguments: their positions, their documents, and the documents' sizes; None where the
    batch does not have it."""
    names = {"positions_BT": "positions", "segments_BT": "segments", "lengths_BM": "lengths"}
    return {argument: batch.get(f"{prefix}{name}") for argument, name in names.items()}
