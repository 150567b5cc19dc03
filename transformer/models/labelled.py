"""What the configs of heads that score classes have in common."""

from __future__ import annotations

import dataclasses

from transformer.errors import Config, require

_USUAL = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledHeadConfig(Config):
    """A head with a number of classes."""

    num_labels: int | None = None
    """Number of classes; null: that of the training data (2 until it is read)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "num_labels", self.num_labels is None or self.num_labels >= 1, "allowed: 1 or more, or null")

    @property
    def classes(self) -> int:
        """`num_labels` with its default filled in."""
        return _USUAL if self.num_labels is None else self.num_labels
