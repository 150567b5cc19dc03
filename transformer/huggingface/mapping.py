"""Tables that map the parameters of a checkpoint to ours, used in both directions.

A `TensorRule` names a tensor on both sides, its `Layout` defines how the two are arranged. One rule is for all layers: theirs are
numbered, ours have a leading L; and for all experts of a mixture. L layers, E experts, D embed, N heads, H head_dim, I in, O out.
"""

from __future__ import annotations

import abc
import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from transformer.errors import UserError

BLOCKS = "layers.blocks"
ATTENTION, FEED_FORWARD = f"{BLOCKS}.attention", f"{BLOCKS}.feed_forward"
QKV = tuple(f"{ATTENTION}.{name}" for name in ("query", "key", "value"))
"""Paths of the parts of our blocks."""

Shape = tuple[int, ...]
Path = tuple[Any, ...]
"""The path of one of our parameters, as in `nnx.to_flat_state`."""


class Layout(abc.ABC):
    """How one of their tensors holds one or several of ours, each of a single layer."""

    @abc.abstractmethod
    def shape(self, ours: Sequence[Shape]) -> Shape:
        """The shape of their tensor."""

    @abc.abstractmethod
    def take(self, theirs: np.ndarray, ours: Sequence[Shape], which: int) -> np.ndarray:
        """Our parameter number `which`; a view where it can be."""

    @abc.abstractmethod
    def give(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor."""


@dataclasses.dataclass(frozen=True)
class Matrix(Layout):
    """The kernel of a linear layer; several are concatenated along the outputs.

    Args:
        num_in: number of our kernel's dims that are inputs.
        transposed: theirs is [O, I], as torch has it; else [I, O].
    """

    num_in: int = 1
    transposed: bool = True

    def shape(self, ours: Sequence[Shape]) -> Shape:
        rows = math.prod(ours[0][: self.num_in])
        columns = sum(math.prod(shape[self.num_in :]) for shape in ours)
        return (columns, rows) if self.transposed else (rows, columns)

    def take(self, theirs: np.ndarray, ours: Sequence[Shape], which: int) -> np.ndarray:
        first, last = _span([math.prod(shape[self.num_in :]) for shape in ours], which)
        matrix = theirs.T if self.transposed else theirs
        return matrix[:, first:last].reshape(ours[which])

    def give(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        rows = math.prod(ours[0].shape[: self.num_in])
        matrix = np.concatenate([one.reshape(rows, -1) for one in ours], axis=1)
        return matrix.T if self.transposed else matrix


@dataclasses.dataclass(frozen=True)
class Vector(Layout):
    """A vector, such as a bias, whatever dims ours has; several are concatenated."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return (sum(math.prod(shape) for shape in ours),)

    def take(self, theirs: np.ndarray, ours: Sequence[Shape], which: int) -> np.ndarray:
        first, last = _span([math.prod(shape) for shape in ours], which)
        return theirs[first:last].reshape(ours[which])

    def give(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([one.reshape(-1) for one in ours])


class ShiftedGain(Vector):
    """The gain of a norm, which theirs multiplies by 1 + weight."""

    def take(self, theirs: np.ndarray, ours: Sequence[Shape], which: int) -> np.ndarray:
        return super().take(theirs.astype(np.float32), ours, which) + 1

    def give(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return super().give(ours) - 1


@dataclasses.dataclass(frozen=True)
class ByHead(Layout):
    """Queries, keys and values of a head next to each other, head after head (GPT-NeoX): [N 3 H, D], or a bias [N 3 H]."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        *rows, N, H = ours[0]
        return (N * len(ours) * H, *rows)

    def take(self, theirs: np.ndarray, ours: Sequence[Shape], which: int) -> np.ndarray:
        *rows, N, H = ours[which]
        return np.moveaxis(theirs.reshape(N, len(ours), H, *rows)[:, which], (0, 1), (-2, -1))

    def give(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        parts = np.stack([np.moveaxis(one, (-2, -1), (0, 1)) for one in ours], axis=1)
        return parts.reshape(-1, *parts.shape[3:])


@dataclasses.dataclass(frozen=True)
class TableLayout(Layout):
    """The same on both sides; theirs may begin with rows that are never looked up (RoBERTa's positions)."""

    skipped: int = 0

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return (ours[0][0] + self.skipped, *ours[0][1:])

    def take(self, theirs: np.ndarray, ours: Sequence[Shape], which: int) -> np.ndarray:
        return theirs[self.skipped :]

    def give(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return np.pad(ours[0], [(self.skipped, 0), *[(0, 0)] * (ours[0].ndim - 1)])


@dataclasses.dataclass(frozen=True)
class Row(Layout):
    """A vector that is stored as a matrix with one row."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return (1, *ours[0])

    def take(self, theirs: np.ndarray, ours: Sequence[Shape], which: int) -> np.ndarray:
        return theirs[0]

    def give(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0][None]


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """The correspondence between a tensor of theirs and our parameters.

    Args:
        theirs: its name; `{}` is replaced by the number of a layer, and `{expert}` by that of an expert.
        ours: dotted paths of the parameters that it holds.
        first: the first layer that has such a tensor; in the layers before it, ours is `filler`, and has no effect.
        experts: the number of a mixture's experts, if each has such a tensor; ours has an E after its L.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout
    first: int = 0
    filler: float = 0.0
    experts: int = 0

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor per layer."""
        return "{}" in self.theirs

    @property
    def paths(self) -> list[Path]:
        """Paths of the parameters that it holds."""
        return [tuple(path.split(".")) for path in self.ours]

    def inner(self, shape: Shape) -> Shape:
        """The shape of the part of ours that one tensor holds."""
        return shape[int(self.stacked) + int(self.experts > 0) :]

    def names(self, num_layers: int) -> Iterator[str]:
        """The tensors, layer by layer and expert by expert."""
        for number in range(self.first, num_layers) if self.stacked else [0]:
            for expert in range(max(self.experts, 1)):
                yield self.theirs.format(number, expert=expert)


@dataclasses.dataclass(frozen=True)
class Tables:
    """All tensors of an architecture.

    Args:
        copies: their name → the name of the tensor that it repeats, for tied weights; the copy may be present or not.
        left_out: patterns of tensors that belong to other heads, or can be computed.
    """

    rules: tuple[TensorRule, ...]
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def linear(theirs: str, ours: str, *, use_bias: bool = True, num_in: int = 1, **options: Any) -> Iterator[TensorRule]:
    """A linear layer's weight, and its bias if it has one."""
    yield TensorRule(f"{theirs}.weight", (f"{ours}.kernel",), Matrix(num_in, **options))
    if use_bias:
        yield TensorRule(f"{theirs}.bias", (f"{ours}.bias",), Vector())


def norm(theirs: str, ours: str, *, use_bias: bool = True, first: int = 0) -> Iterator[TensorRule]:
    """A norm's gain, and its bias if it has one."""
    yield TensorRule(f"{theirs}.weight", (f"{ours}.scale",), Vector(), first, 1.0)
    if use_bias:
        yield TensorRule(f"{theirs}.bias", (f"{ours}.bias",), Vector(), first)


def table(theirs: str, ours: str, *, skipped: int = 0) -> TensorRule:
    """An embedding."""
    return TensorRule(f"{theirs}.weight", (f"{ours}.table",), TableLayout(skipped))


def fused(theirs: str, ours: Sequence[str], *, use_bias: bool, transposed: bool = True) -> Iterator[TensorRule]:
    """Several linear layers of one input, concatenated."""
    yield TensorRule(f"{theirs}.weight", tuple(f"{one}.kernel" for one in ours), Matrix(1, transposed))
    if use_bias:
        yield TensorRule(f"{theirs}.bias", tuple(f"{one}.bias" for one in ours), Vector())


def output_head(is_tied: bool, theirs: str, tied_to: str) -> tuple[list[TensorRule], dict[str, str]]:
    """The output projection's rules, or the tensor that it repeats: its name, and that of the embedding."""
    weight = f"{theirs}.weight"
    return ([], {weight: tied_to}) if is_tied else (list(linear(theirs, "head", use_bias=False)), {})


def check(tables: Tables, theirs: Mapping[str, np.ndarray], ours: Mapping[Path, Any], source: str) -> list[str]:
    """Raise a `UserError` that lists all disagreements: missing, unknown and misshapen tensors, parameters that no rule
    fills, and tied tensors that differ. Returns the names that are left out.

    Args:
        ours: our parameters' descriptions, with a shape.
    """
    needed = dict(wanted(tables, ours))
    wrong: list[str] = []
    for name, shape in needed.items():
        if name not in theirs:
            wrong.append(f"missing: {name} {list(shape)}")
        elif theirs[name].shape != shape:
            wrong.append(f"misshapen: {name} is {list(theirs[name].shape)}, by config.json {list(shape)}")
    for copy, original in tables.copies.items():
        if copy in theirs and original in theirs and not np.array_equal(theirs[copy], theirs[original]):
            wrong.append(f"contradicts: {copy} is another tensor than {original}, and config.json ties them")
    rest = [name for name in theirs if name not in needed and name not in tables.copies]
    left = [name for name in rest if any(fnmatch.fnmatchcase(name, pattern) for pattern in tables.left_out)]
    wrong += [f"unknown: {name} {list(theirs[name].shape)}" for name in rest if name not in left]
    covered = {path for rule in tables.rules for path in rule.paths}
    assert not (bare := ours.keys() - covered), f"no rule for {bare}"
    if wrong:
        shown = "\n  ".join(wrong[:_SHOWN]) + (f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
        raise UserError(f"{source}: {len(wrong)} tensors do not agree with its config.json:\n  {shown}")
    return left


_SHOWN = 40
"""Maximum number of tensors named in a message."""


def to_ours(tables: Tables, theirs: Mapping[str, np.ndarray], described: Mapping[Path, Any]) -> dict[Path, jax.Array]:
    """Our parameters, each shard read from the files by the device that holds it; at most one parameter is held whole.

    Args:
        described: shape, dtype and sharding of each.
    """
    found: dict[Path, jax.Array] = {}
    for rule in tables.rules:
        for which, path in enumerate(rule.paths):
            about = described[path]
            read = functools.partial(_read, rule, which, theirs, described)
            found[path] = jax.make_array_from_callback(about.shape, about.sharding, read)
    return found


def _read(
    rule: TensorRule, which: int, theirs: Mapping[str, np.ndarray], described: Mapping[Path, Any], index: Any
) -> np.ndarray:
    """A slice of our parameter number `which` of a rule."""
    shapes = [rule.inner(described[path].shape) for path in rule.paths]
    about = described[rule.paths[which]]

    def single(name: str, inner: tuple[slice, ...]) -> np.ndarray:
        return rule.layout.take(theirs[name], shapes, which)[inner].astype(about.dtype)

    def layer(number: int, inner: tuple[slice, ...]) -> np.ndarray:
        if not rule.experts:
            return single(rule.theirs.format(number), inner)
        experts = range(*inner[0].indices(rule.experts))
        return np.stack([single(rule.theirs.format(number, expert=expert), inner[1:]) for expert in experts])

    if not rule.stacked:
        return layer(0, index)
    filler = np.full(about.shape[1:], rule.filler, about.dtype)[index[1:]]
    layers = range(*index[0].indices(about.shape[0]))
    return np.stack([filler if number < rule.first else layer(number, index[1:]) for number in layers])


def described_theirs(tables: Tables, ours: Mapping[Path, Any], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Descriptions of what `to_theirs` returns, in its order."""
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in wanted(tables, ours)}


def to_theirs(tables: Tables, ours: Mapping[Path, Any], dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors from our parameters, one after the other."""
    for rule in tables.rules:
        held = [np.asarray(jax.device_get(ours[path])) for path in rule.paths]
        # Layers, and experts in them, in one dim.
        flat = [one[rule.first if rule.stacked else 0 :].reshape(-1, *rule.inner(one.shape)) for one in held]
        for place, name in enumerate(rule.names(held[0].shape[0])):
            yield name, rule.layout.give([one[place] for one in flat]).astype(dtype)


def wanted(tables: Tables, ours: Mapping[Path, Any]) -> Iterator[tuple[str, Shape]]:
    """Name and shape of each of their tensors."""
    for rule in tables.rules:
        shapes = [tuple(ours[path].shape) for path in rule.paths]
        shape = rule.layout.shape([rule.inner(one) for one in shapes])
        yield from ((name, shape) for name in rule.names(shapes[0][0]))


def _span(sizes: Sequence[int], which: int) -> tuple[int, int]:
    return sum(sizes[:which]), sum(sizes[: which + 1])
