"""What the arrays of a compiled training step are for: by what they are computed from, in which pass, and who reads them."""

from __future__ import annotations

import dataclasses

from train.program.hlo import Instruction, op_name, pass_of, scopes_of

KINDS = (
    "parameters", "optimiser state", "other arguments", "copies of parameters", "activations", "gradients", "temporaries",
)  # fmt: skip
_BACK = {"backward", "recomputed"}


@dataclasses.dataclass(eq=False)
class Array:
    """An array in memory."""

    bytes: float
    argument: str | None = None
    """Which of `KINDS` it is, if it is an argument of the step."""
    written: set[str | None] = dataclasses.field(default_factory=set)
    """Phases of the instructions that write it, as of `phase_of`."""
    last_written: str | None = None
    reads: list[tuple[str | None, bool, list[Array]]] = dataclasses.field(default_factory=list)
    """Of each instruction that reads it: its phase, whether its results hold numbers of the array, and the results."""
    merged: Array | None = None
    """The array in whose memory it is."""

    @property
    def place(self) -> Array:
        """The array in whose memory it is, after all merging."""
        found = self
        while found.merged is not None:
            found = found.merged
        return found


def phase_of(instruction: Instruction) -> str | None:
    """Forward, recomputed, backward or optimiser; None for an instruction whose origin the compiler does not name."""
    if "/" not in op_name(instruction):
        return None
    return "optimiser" if "optimizer" in scopes_of(instruction) else pass_of(instruction)


def kinds_of(arrays: list[Array]) -> dict[int, str]:
    """Which of `KINDS` each array is, by its `id`.

    - copies of parameters: computed from parameters alone, such as those in another type or gathered from other devices
    - activations: computed from the batch in the forward pass, and read in the backward pass
    - gradients: of the backward pass, read by the optimiser, or only moved and added on the way to it; and what it makes of them
    - temporaries: all others
    """
    reads: dict[int, list[tuple[str | None, bool, list[Array]]]] = {id(one): [] for one in arrays}
    places = {id(one): one for one in arrays if one.merged is None}
    for one in arrays:
        reads[id(one.place)] += [(phase, kept, [each.place for each in made]) for phase, kept, made in one.reads]
    sources = {name: _reached(reads, [one for one in arrays if one.argument == name]) for name in KINDS[:3]}
    batch, weights, state = sources["other arguments"], sources["parameters"], sources["optimiser state"]
    gradients = {
        key
        for key, one in places.items()
        if key in batch and ("optimiser" in one.written or any(phase == "optimiser" for phase, _, _ in reads[key]))
    }
    back = [key for key, one in places.items() if key in batch and "backward" in one.written]
    # Accumulated over microbatches: read, but not in the backward pass.
    gradients |= {key for key in back if reads[key] and not any(phase in _BACK for phase, _, _ in reads[key])}
    # What is only moved and added on the way to a gradient. Results come after what they are computed from: the last come first.
    found = -1
    while found != len(gradients):
        found = len(gradients)
        for key in reversed(places):
            moved = all(kept and made and all(id(each) in gradients for each in made) for _, kept, made in reads[key])
            if key in batch and reads[key] and moved:
                gradients.add(key)
    kinds = {}
    for key, one in places.items():
        if one.argument is not None:
            kinds[key] = one.argument
        elif key in weights and key not in batch | state:
            kinds[key] = "copies of parameters"
        elif key in gradients:
            kinds[key] = "gradients"
        elif key in batch and not one.written & {"backward", "optimiser", "recomputed"}:
            kept_for_later = any(phase in _BACK for phase, _, _ in reads[key])
            kinds[key] = "activations" if kept_for_later else "temporaries"
        else:
            kinds[key] = "temporaries"
    return {id(one): kinds[id(one.place)] for one in arrays}


def _reached(reads: dict[int, list[tuple[str | None, bool, list[Array]]]], start: list[Array]) -> set[int]:
    """The arrays that are computed from some, by `id`."""
    found = {id(one) for one in start}
    open_ones = list(found)
    while open_ones:
        for _, _, made in reads[open_ones.pop()]:
            new = {id(each) for each in made} - found
            found |= new
            open_ones += new
    return found
