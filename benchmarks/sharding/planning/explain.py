"""Why one layout of a plan is better than another, part by part: as figures and as sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.sharding.planning.legend import times_of
from benchmarks.sharding.planning.objective import TIE
from benchmarks.units import duration
from transformer.errors import UserError
from transformer.interpret.capture import readable

MEMORY = ("parameters", "gradients", "optimizer", "activations", "gathered")
"""Parts of the memory, by formula."""


def explained(result: dict[str, Any], first: int, second: int) -> dict[str, Any]:
    """The difference of two layouts by their numbers in the ranking: sentences, and a table of parts.

    Raises:
        UserError: there is no such number, or they are the same.
    """
    good = [row for row in result["layouts"] if row["fits"]]
    for number in (first, second):
        if not 1 <= number <= len(good):
            raise UserError(f"--explain: got {number}; allowed: the numbers of layouts that fit, 1 to {len(good)}")
    if first == second:
        raise UserError(f"--explain: got {first} twice; allowed: the numbers of two layouts, 1 to {len(good)}")
    # Of two numbers of a ranking the smaller one is the better.
    first, second = sorted((first, second))
    a, b = good[first - 1], good[second - 1]
    one, other = times_of(a), times_of(b)
    times = [(name, one[name], other[name]) for name in ("matmul", "memory-bound", "exposed", "bubble")]
    times = [part for part in times if part[0] != "bubble" or max(part[1:]) > 0]
    links = {name: (of(a, name), of(b, name)) for name, of in _links(a, b)}
    memory = [(name, a["estimate"][name], b["estimate"][name]) for name in MEMORY]
    lines = [_verdict(first, second, a, b, result["objective"]), *_of_time(times, links), *_of_memory(a, b, memory)]
    rows = [["step", duration(a["seconds"]), duration(b["seconds"]), _signed(b["seconds"] - a["seconds"], duration)]]
    rows += [[_TITLES[name], duration(x), duration(y), _signed(y - x, duration)] for name, x, y in times]
    rows += [
        [f"communication, {name}", duration(x), duration(y), _signed(y - x, duration)] for name, (x, y) in links.items()
    ]
    rows += [["memory", _bytes(a["memory"]), _bytes(b["memory"]), _signed(b["memory"] - a["memory"], _bytes)]]
    rows += [[f"{name}, by formula", _bytes(x), _bytes(y), _signed(y - x, _bytes)] for name, x, y in memory]
    stages = _stages(a, b)
    lines += _of_stages(first, stages)
    heads = ["part", f"layout {first}", f"layout {second}", "difference"]
    by_stage = [[name, duration(x), duration(y), _signed(y - x, duration)] for name, x, y in stages]
    return {"numbers": [first, second], "sentences": lines, "heads": heads, "rows": rows, "stages": by_stage}


_TITLES = {
    "matmul": "matrix products", "memory-bound": "memory-bound work", "exposed": "exposed communication",
    "bubble": "pipeline bubble",
}  # fmt: skip


def _verdict(first: int, second: int, a: dict[str, Any], b: dict[str, Any], objective: str) -> str:
    seconds, memory = (b[name] - a[name] for name in ("seconds", "memory"))
    names = f"{first} ({a['layout']}) is ahead of {second} ({b['layout']})"
    if a["compiled"] and not b["compiled"]:
        return f"{names} because it is compiled and {second} is not."
    if objective == "memory":
        return f"{names} because it needs {_bytes(abs(memory))} {'less' if memory > 0 else 'more'} memory a device."
    if abs(seconds) <= TIE * a["seconds"]:
        reason = f"their times are within {TIE:.0%} of each other, and it needs {_bytes(abs(memory))} less memory"
        return f"{names}: {reason}." if memory > 0 else f"{names}: their times are within {TIE:.0%} of each other."
    return f"{names} because its step takes {duration(abs(seconds))} ({abs(seconds) / b['seconds']:.1%}) less."


def _of_time(times: list[tuple[str, float, float]], links: dict[str, tuple[float, float]]) -> list[str]:
    lines = []
    for name, x, y in times:
        ahead = "as long" if _same(x, y) else f"{duration(abs(y - x))} {'less' if x < y else 'more'}"
        line = f"{_TITLES[name].capitalize()}: {duration(x)} and {duration(y)}, {ahead}"
        if name == "exposed" and links:
            parts = ", ".join(f"{link} {duration(one)} and {duration(other)}" for link, (one, other) in links.items())
            line += f"; all communication, overlapped or not: {parts}"
        lines.append(f"{line}.")
    return lines


def _of_memory(a: dict[str, Any], b: dict[str, Any], parts: list[tuple[str, float, float]]) -> list[str]:
    difference = b["memory"] - a["memory"]
    ahead = (
        "as much"
        if _same(a["memory"], b["memory"])
        else f"{_bytes(abs(difference))} {'less' if difference > 0 else 'more'}"
    )
    by_kind = ", ".join(f"{name} {_bytes(x)} and {_bytes(y)}" for name, x, y in parts if x or y)
    return [f"Memory: {_bytes(a['memory'])} and {_bytes(b['memory'])} a device, {ahead}; by formula: {by_kind}."]


def _stages(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Seconds of each stage of two compiled steps, those first in which the first is most ahead."""
    steps = [(row["compiled"] or {}).get("timeline") for row in (a, b)]
    if not all(steps):
        return []
    one, other = ({name: sum(parts.values()) for name, parts in step["stages"].items()} for step in steps if step)
    found = [(name, one.get(name, 0.0), other.get(name, 0.0)) for name in dict.fromkeys([*one, *other])]
    return sorted(found, key=lambda stage: stage[1] - stage[2])


def _of_stages(first: int, stages: list[tuple[str, float, float]]) -> list[str]:
    if not stages:
        return []
    ahead = [f"{name} by {duration(y - x)}" for name, x, y in stages if y > x and not _same(x, y)][:3]
    behind = [f"{name} by {duration(x - y)}" for name, x, y in reversed(stages) if x > y and not _same(x, y)][:3]
    lines = [f"By stage, layout {first} is ahead in {', '.join(ahead)}."] if ahead else []
    return [*lines, f"By stage, it is behind in {', '.join(behind)}."] if behind else lines


def _links(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any], str], float]]]:
    """Kinds of link of two compiled layouts, or axes of two estimated ones, and how to read the seconds of each."""
    if all((row["compiled"] or {}).get("prediction") for row in (a, b)):
        names = [*a["compiled"]["prediction"]["links"], *b["compiled"]["prediction"]["links"]]
        return [
            (name, lambda row, link: row["compiled"]["prediction"]["links"].get(link, 0.0))
            for name in dict.fromkeys(names)
        ]
    names = [*a["estimate"]["axes"], *b["estimate"]["axes"]]
    return [(name, lambda row, axis: row["estimate"]["axes"].get(axis, 0.0)) for name in dict.fromkeys(names)]


def _same(x: float, y: float) -> bool:
    return abs(x - y) <= TIE * max(abs(x), abs(y))


def _bytes(count: float) -> str:
    return readable(int(count))


def _signed(difference: float, text: Callable[[float], str]) -> str:
    return f"{'+' if difference > 0 else '−' if difference < 0 else ''}{text(abs(difference))}"
