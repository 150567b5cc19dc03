"""A device's profile: what its operations take by kind and size, measured by `manyheads-bench calibrate`.

A small JSON file. The user's own, in the cache folder, comes before those that ship with the package.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.files import cache_dir, writing
from transformer.errors import UserError

SHIPPED = Path(__file__).parent / "profiles"
ELEMENTWISE, REDUCTION, COPY, TRANSPOSE, SCATTER = "elementwise", "reduction", "copy", "transpose", "scatter"
KINDS = (ELEMENTWISE, REDUCTION, COPY, TRANSPOSE, SCATTER)
"""Of operations that are not matrix products."""
_NEAREST = 4

Curve = tuple[tuple[float, float], ...]
"""(bytes, bytes per second), the smallest first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A measured matrix product, or several of one shape."""

    dtype: str
    batch: int
    """Number of products of one operation; 1 for a single one."""
    smallest: int
    """The smallest of rows, columns and the contracted dim."""
    flops: float
    """Of all of them together."""
    rate: float
    """FLOP/s."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wire:
    """A measured collective: seconds = latency + bytes that a device sends / bandwidth."""

    kind: str
    devices: int
    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes per second that a device sends, counted as in `train.program.hlo.Collective.sent`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What operations take on one kind of device."""

    kind: str
    """The name of the chip among targets, or cpu."""
    device: str
    """The device's own name."""
    source: str
    """How the figures were obtained."""
    date: str
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    products: tuple[Product, ...]
    curves: Mapping[str, Curve]
    """Kind of operation (`KINDS`) → its bandwidth over the bytes that it reads and writes."""
    gap: float = 0.0
    """Seconds that each executed operation takes in addition."""
    transcendental: float = 0.0
    """Seconds for each number that an exponential, logarithm, tanh or the like computes, in addition to its bytes."""
    arithmetic: float = 0.0
    """The same for each sum, product, comparison and the like."""
    fresh: float = 0.0
    """Bytes per second at which a program's temporary memory is first touched in each step; 0 where it is kept."""
    attention: float = 0.0
    """FLOP/s of the library's fused attention kernels; 0: as other products."""
    wires: tuple[Wire, ...] = ()
    product_efficiency: float = 1.0
    """Fraction of these rates that products reach within a step: 1 until `plan --validate` fits it."""
    memory_efficiency: float = 1.0
    """The same for all other operations."""
    others: float = 0.0
    """Part of the processors' time that other processes took while it was measured."""
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The largest relative errors of predictions by this profile, `time` and `memory`, each step left out of the fit; empty where
    none were measured."""
    devices_share: bool = False
    """Whether all devices together have no more than one of them, as virtual ones of one CPU."""

    @property
    def title(self) -> str:
        """The profile in words, for reports."""
        return f"the profile of {self.device} of {self.date[:10]} ({self.source})"

    def rate(self, dtype: str, flops: float, smallest: int, batch: int) -> float | None:
        """FLOP/s of a matrix product: the mean over the nearest measured ones, in the logarithms of FLOPs and smallest dim.

        Weights fall with the square of the distance (Shepard 1968). Single and batched products do not mix, nor types.

        Returns:
            None if no product of this type was measured.
        """
        known = [one for one in self.products if one.dtype == dtype]
        known = [one for one in known if (one.batch > 1) == (batch > 1)] or known
        if not known:
            return None
        where = (math.log2(max(flops, 1.0)), math.log2(max(smallest, 1)))
        far = [
            ((where[0] - math.log2(one.flops)) / 2) ** 2 + (where[1] - math.log2(one.smallest)) ** 2 for one in known
        ]
        near = sorted(zip(far, known, strict=True), key=lambda pair: pair[0])[:_NEAREST]
        if near[0][0] < 1e-9:
            return near[0][1].rate
        weights = [1 / distance for distance, _ in near]
        logs = [math.log(one.rate) for _, one in near]
        return math.exp(sum(weight * log for weight, log in zip(weights, logs, strict=True)) / math.fsum(weights))

    def bandwidth(self, kind: str, size: float) -> float:
        """Bytes per second of an operation that reads and writes `size` bytes; constant beyond the measured sizes."""
        return interpolated(self.curves.get(kind) or self.curves[ELEMENTWISE], size)

    def wire(self, kind: str, devices: int) -> Wire | None:
        """The measured collective of a kind, over the nearest number of devices; None if it was not measured."""
        same = [one for one in self.wires if one.kind == kind] or [
            one for one in self.wires if one.kind == "all-reduce"
        ]
        return min(same, key=lambda one: abs(math.log2(one.devices / devices)), default=None)

    def efficiencies(self, dtype: str, peak: float, bandwidth: float) -> tuple[float | None, float]:
        """Fractions of published peaks (FLOP/s, bytes per second) that the fastest products of a type, and large passes, reach.

        Returns:
            None in the first's place if no product of this type was measured.
        """
        best = max((one.rate for one in self.products if one.dtype == dtype), default=None)
        products = None if best is None else best * self.product_efficiency / peak
        return products, self.curves[ELEMENTWISE][-1][1] * self.memory_efficiency / bandwidth

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Profile:
        """Restore it from the output of `dataclasses.asdict` and JSON.

        Raises:
            KeyError, TypeError, ValueError: it is not a profile.
        """
        curves = {name: tuple((float(a), float(b)) for a, b in points) for name, points in data["curves"].items()}
        products = tuple(Product(**one) for one in data["products"])
        profile = cls(
            **{**data, "curves": curves, "products": products, "wires": tuple(Wire(**one) for one in data["wires"])}
        )
        sizes = [*(value for points in curves.values() for point in points for value in point)]
        sizes += [value for one in products for value in (one.flops, one.rate, one.smallest)]
        sizes += [one.bandwidth for one in profile.wires]
        if ELEMENTWISE not in curves or not all(curves.values()) or not all(0 < one < math.inf for one in sizes):
            raise ValueError("not a profile")
        return profile


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at `x`, linear in its logarithm between points that are sorted by it, and constant outside of them."""
    index = bisect.bisect([point[0] for point in points], x)
    if index in (0, len(points)):
        return points[max(index - 1, 0)][1]
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)


def read(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        UserError: it cannot be read, or is not a profile.
    """
    try:
        return Profile.from_data(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path}: not a profile of a device; delete the file, and make it anew with manyheads-bench calibrate"
        ) from None


def own_path(kind: str) -> Path:
    """The file of the user's own profile of a kind of device."""
    return cache_dir() / "profiles" / f"{kind}.json"


def profile_of(kind: str) -> Profile | None:
    """The profile of a kind of device: the user's own, else the one that ships with the package, else None.

    Raises:
        UserError: the file is damaged.
    """
    return next((read(path) for path in (own_path(kind), SHIPPED / f"{kind}.json") if path.exists()), None)
