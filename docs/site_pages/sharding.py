"""Drawings of sharding strategies: which part of the weights, their gradients, the optimiser's state and the activations each
device holds, by the strategy's own table (`train/parallel/mesh.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from train.parallel.mesh import MESH_AXES, MeshConfig, Rules

_SIDE, _GAP, _BOX, _TOP = 48, 10, 144, 20
_ROWS = {"weights": "rules", "gradients": "gradient_rules", "optimiser": "optimizer_rules"}
_WORDS = {"layers": "layers", "expert": "experts", "embed": "features", "mlp": "heads, mlp"}


def drawing(strategy: str, *sizes: str) -> str:
    """A figure as HTML.

    Args:
        strategy: one of `STRATEGIES`.
        sizes: of the mesh, such as `fsdp=2`; their product is the number of devices.
    """
    given = {name: int(size) for name, size in (one.split("=") for one in sizes)}
    config = MeshConfig(strategy=strategy, **given)
    shape = dict(zip(MESH_AXES, config.sizes(math.prod(given.values())), strict=True))
    devices = math.prod(shape.values())
    width = devices * (_BOX + _GAP)
    body = "".join(_device(config, shape, number) for number in range(devices))
    rows, columns = _axes(config.rules, shape)
    about = f"{strategy}, {' × '.join(f'{name} {size}' for name, size in shape.items() if size > 1)}"
    caption = f"{about}. Rows of a matrix are {_WORDS[rows]}, columns are {_WORDS[columns]}; of the batch, rows are sequences "
    caption += "and columns are positions. What a device holds is filled."
    return (
        f'<figure class="sharding" id="sharding-{strategy}">'
        f'<svg viewBox="0 0 {width} {_height()}" width="{width}" role="img" aria-label="{about}: what each device holds">'
        f"{body}</svg><figcaption>{caption}</figcaption></figure>"
    )


def _height() -> int:
    return _TOP + 2 * (_SIDE + 22) + 8


def _device(config: MeshConfig, shape: dict[str, int], number: int) -> str:
    left = number * (_BOX + _GAP)
    place, rest = {}, number
    for axis in reversed(MESH_AXES):
        rest, place[axis] = divmod(rest, shape[axis])
    parts = [
        f'<rect class="box" x="{left + 1}" y="1" width="{_BOX}" height="{_height() - 2}" rx="5"/>',
        f'<text class="title" x="{left + 10}" y="15">device {number}</text>',
    ]
    matrices = [(name, *_part(getattr(config, rules), shape, place)) for name, rules in _ROWS.items()]
    stream = dict(config.rules)
    batch = (_slice(stream["batch"], shape, place), _slice(stream["stream"], shape, place))
    for index, (name, rows, columns) in enumerate([*matrices, ("batch", *batch)]):
        x, y = left + 12 + index % 2 * (_SIDE + 20), _TOP + 4 + index // 2 * (_SIDE + 22)
        parts.append("".join(_matrix(x, y, name, rows, columns)))
    return "".join(parts)


def _axes(rules: Rules, shape: dict[str, int]) -> tuple[str, str]:
    """The logical axes that a drawn matrix has: the first that is sharded of those that can be its rows; and its columns."""
    table = dict(rules)
    rows = next((name for name in ("layers", "expert") if shape.get(str(table[name]), 1) > 1), "embed")
    return rows, "mlp"


def _part(
    rules: Rules, shape: dict[str, int], place: dict[str, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """From where to where a device holds rows and columns of a matrix, as fractions."""
    table, (rows, columns) = dict(rules), _axes(rules, shape)
    return _slice(table[rows], shape, place), _slice(table[columns], shape, place)


def _slice(axes: str | tuple[str, ...] | None, shape: dict[str, int], place: dict[str, int]) -> tuple[float, float]:
    names = (axes,) if isinstance(axes, str) else axes or ()
    index, parts = 0, 1
    for name in names:
        index, parts = index * shape[name] + place[name], parts * shape[name]
    return index / parts, 1 / parts


def _matrix(x: int, y: int, name: str, rows: tuple[float, float], columns: tuple[float, float]) -> Iterator[str]:
    yield f'<rect class="all" x="{x}" y="{y}" width="{_SIDE}" height="{_SIDE}"/>'
    size = f'width="{columns[1] * _SIDE:g}" height="{rows[1] * _SIDE:g}"'
    yield f'<rect class="held" x="{x + columns[0] * _SIDE:g}" y="{y + rows[0] * _SIDE:g}" {size}/>'
    yield f'<text x="{x}" y="{y + _SIDE + 12}">{name}</text>'
