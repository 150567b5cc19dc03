"""The models to compare, each scaled to the same number of parameters.

A model's architecture is in its config, `configs/history/NAME.yaml`; its sizes are solved for: one width determines the
others, and a second one uses up the rest of the budget.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.stage import CONFIGS, load
from train.config import RunConfig
from transformer.errors import UserError, nearest
from transformer.models.encoder_decoder import VaswaniConfig
from transformer.models.families import ModelConfig, count_parameters
from transformer.models.recurrent_config import RecurrentConfig

TOLERANCE = 0.03
"""Largest deviation of a model's parameters from the budget, as a fraction of it."""
_LARGEST = 1 << 13
_PROBED = (8, 32, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of the comparison."""

    name: str
    title: str
    """Its name in the report."""
    paper: str

    @functools.cached_property
    def config(self) -> RunConfig:
        """Its file."""
        return load(CONFIGS / "history" / f"{self.name.replace('-', '_')}.yaml")

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the schedule."""
        return self.config.optimizer.learning_rate

    @property
    def step(self) -> int:
        """The first width is a multiple of this."""
        model = self.config.model
        return 2 if isinstance(model, RecurrentConfig) else 2 * model.attention.num_heads

    def sized(self, width: int, fine: int | None, sizes: dict[str, Any]) -> ModelConfig:
        """Its model with other widths and sizes; parameters grow with both widths.

        Args:
            fine: the second width; by default the one that goes with the first.
            sizes: vocab_size, source_vocab_size and max_length.
        """
        model = self.config.model
        if isinstance(model, RecurrentConfig):
            fine = max(width // 2, 1) if fine is None else fine
            return dataclasses.replace(model, hidden_dim=width, embed_dim=fine, encoder_dim=width // 2, **sizes)
        assert isinstance(model, VaswaniConfig)
        mlp = dataclasses.replace(model.mlp, dim=4 * width if fine is None else fine)
        # Both sides share one embedding if they share a vocabulary.
        shared = {"source_vocab_size": None} if sizes["source_vocab_size"] == sizes["vocab_size"] else {}
        return dataclasses.replace(model, embed_dim=width, mlp=mlp, **sizes | shared)


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(name="none", title="No attention", paper="Cho et al. 2014"),
        Entry(name="bahdanau", title="Bahdanau (additive)", paper="Bahdanau et al. 2014"),
        Entry(name="luong-dot", title="Luong, dot", paper="Luong et al. 2015"),
        Entry(name="luong-general", title="Luong, general", paper="Luong et al. 2015"),
        Entry(name="luong-concat", title="Luong, concat", paper="Luong et al. 2015"),
        Entry(name="luong-local-p", title="Luong, local-p", paper="Luong et al. 2015"),
        Entry(name="hard", title="Hard", paper="Xu et al. 2015; Jang et al. 2016"),
        Entry(name="linear", title="Linear", paper="Katharopoulos et al. 2020"),
        Entry(name="delta", title="Delta rule", paper="Schlag et al. 2021"),
        Entry(name="transformer", title="Transformer", paper="Vaswani et al. 2017"),
    )
}


def chosen(names: Sequence[str] | None) -> tuple[str, ...]:
    """The models of these names, each once and in the order of history; all of them for None.

    Raises:
        UserError: an unknown name, or no name.
    """
    for name in names or ():
        if name not in ENTRIES:
            raise UserError(f"--models: got {name!r}; allowed: {', '.join(ENTRIES)}.{nearest(name, ENTRIES)}")
    if names is not None and not names:
        raise UserError(f"--models: none is named; allowed: {', '.join(ENTRIES)}")
    return tuple(name for name in ENTRIES if names is None or name in names)


@functools.cache
def solve(name: str, budget: int, *, source_vocab_size: int, vocab_size: int, max_length: int) -> ModelConfig:
    """The config of a model whose number of parameters is nearest the budget.

    Raises:
        UserError: no size of this model comes within `TOLERANCE` of it.
    """
    entry = ENTRIES[name]
    sizes = {"source_vocab_size": source_vocab_size, "vocab_size": vocab_size, "max_length": max_length}

    def config(width: int, fine: int | None = None) -> ModelConfig:
        return entry.sized(width, fine, sizes)

    width = entry.step * _nearest(lambda size: count_parameters(config(entry.step * size)) - budget)
    fine = _nearest(lambda size: count_parameters(config(width, size)) - budget)
    found = config(width, fine)
    count = count_parameters(found)
    if abs(count - budget) > TOLERANCE * budget:
        raise UserError(
            f"--parameters: got {budget:,}; the nearest size of {name} has {count:,} with vocabularies of "
            f"{source_vocab_size:,} and {vocab_size:,} tokens; increase it"
        )
    return found


def _nearest(excess: Callable[[int], int]) -> int:
    """The size, 1 or more, at which an increasing, nearly quadratic function is closest to 0."""
    # Each call builds a model's shapes; three of them bracket the solution.
    curve = np.polyfit(_PROBED, [excess(size) for size in _PROBED], 2)
    low = 1 + int(np.abs(np.polyval(curve, np.arange(1, _LARGEST))).argmin())
    while low > 1 and excess(low) > 0:
        low -= 1
    while low < _LARGEST and excess(low + 1) <= 0:
        low += 1
    return min((low, low + 1), key=lambda size: abs(excess(size)))
