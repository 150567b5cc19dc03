"""Two ways in which a dialogue goes on, of which the first is preferred: a row for each.

Axes: B examples asked for at once, T positions, N examples there are. Every example holds

    tokens            [B, T] int32    the dialogue with the preferred answer
    targets           [B, T] int32    the token after each input
    said              [B, T] int32    1 where the target belongs to the answer, else 0
    segments          [B, T] int32    1 at tokens, 0 at padding
    positions         [B, T] int32    0, 1, ...; 0 at padding
    other_...                         the same of the dialogue with the rejected answer
    reference         [B, 2] float32  the log-probability of both answers by the reference model; NaN if it is not known
    weights           [B, 1] float32  1: the pair is one prediction

What both dialogues begin with has the same probability in both, and is no part of the answers: only its context.
"""

from __future__ import annotations

import numpy as np

from train.data.examples.draws import Draws
from train.data.examples.pack import Examples
from train.data.examples.rows import TooLong, one_each
from train.data.prepared.store import TokenArray
from train.data.tokenization.tokenise import REJECTED, SAID
from train.progress import say_once
from transformer.errors import UserError


class Preferences(Examples):
    """The pairs of an array, in its order; those of which a dialogue is too long are left out, or lose their ends."""

    documents: np.ndarray
    """[N] int64: which document of the array each example is."""

    def __init__(self, array: TokenArray, length: int, too_long: TooLong, *, shown: bool = False) -> None:
        """`shown` says how many are too long. Raises `UserError` if none is left."""
        super().__init__(array, length)
        assert array.labels is not None
        self._marks = np.asarray(array.labels)
        starts, sizes = np.asarray(array.offsets)[:-1], np.diff(array.offsets) - 1
        is_rejected, is_said = (self._marks & REJECTED) > 0, (self._marks & SAID) > 0
        rejected = _counted(is_rejected, starts, sizes)
        # The last token of a dialogue is only predicted.
        both = np.stack([sizes - rejected, rejected], axis=1) - 1
        count, drops = int(np.sum(both.max(axis=1, initial=0) > length)), too_long == "drop"
        if count and shown:
            say_once(
                f"{array.name}: {count} of {len(sizes)} pairs have a dialogue longer than {length + 1} tokens: "
                f"{'left out' if drops else 'cut'}"
            )
        first = np.stack([starts, starts + sizes - rejected], axis=1)
        taken = np.clip(both, 0, length)
        answered = [_counted(is_said, first[:, side] + 1, taken[:, side]) for side in range(2)]
        kept = (answered[0] > 0) | (answered[1] > 0)
        if drops:
            kept &= both.max(axis=1, initial=0) <= length
        self.documents = np.flatnonzero(kept)
        if not len(self.documents):
            raise UserError(
                f"{array.name}: none of {len(sizes)} pairs fits a row of {length + 1} tokens; make length larger, or set "
                "objective.too_long: truncate"
            )
        self._starts, self._sizes = first[kept], taken[kept]
        unknown = np.full((len(self.documents), 2), np.nan, np.float32)
        self._reference = unknown if array.reference is None else array.reference
        assert len(self._reference) == len(self.documents)

    def __len__(self) -> int:
        return len(self.documents)

    def gather(self, indices: np.ndarray, draws: Draws | None = None) -> dict[str, np.ndarray]:
        places = np.arange(self.length)
        batch: dict[str, np.ndarray] = {}
        for side, prefix in enumerate(("", "other_")):
            starts, sizes = self._starts[indices, side][:, None], self._sizes[indices, side][:, None]
            inside = places < sizes
            source = np.where(inside, starts + places, 0)
            arrays = {
                "tokens": self._tokens[source], "targets": self._tokens[source + 1], "said": self._marks[source + 1] & SAID,
                "segments": np.ones_like(source), "positions": np.broadcast_to(places, source.shape),
            }  # fmt: skip
            batch |= {prefix + name: np.where(inside, one, 0).astype(np.int32) for name, one in arrays.items()}
        return batch | {"reference": self._reference[indices], "weights": one_each(len(indices))}

    @property
    def efficiency(self) -> float:
        return int(self._sizes.sum()) / max(1, 2 * len(self) * self.length)


def _counted(marks: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How many of `marks` are set in stretches of them."""
    before = np.concatenate([[0], np.cumsum(marks, dtype=np.int64)])
    return before[starts + sizes] - before[starts]
