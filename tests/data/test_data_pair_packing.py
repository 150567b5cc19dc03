"""Packing of pairs into rows: full on both sides, and pair by pair as the method defines it."""

from __future__ import annotations

import numpy as np
import pytest

from train.data.examples import pair_packing
from train.data.examples.pair_packing import fit_pairs


def test_packing_fills_rows_on_both_sides() -> None:
    random = np.random.default_rng(0)
    source = random.integers(5, 40, 3000)
    target = np.clip((source * random.normal(1.1, 0.2, 3000)).astype(int), 3, 60)
    index = fit_pairs(source, target, 232, 256)
    assert sorted(index[:, 0]) == list(range(3000))
    filled = [np.bincount(index[:, 1], sizes[index[:, 0]]) for sizes in (source, target)]
    assert filled[0].max() <= 232 and filled[1].max() <= 256
    assert filled[0].mean() / 232 > 0.95 and filled[1].mean() / 256 > 0.95
    assert np.all(np.diff(index[:, 1]) >= 0)


def greedily(source: np.ndarray, target: np.ndarray, rooms: tuple[int, int]) -> list[list[int]]:
    """The rows that are filled one pair at a time, each with the best of all that are left."""
    left, rows = sorted(range(len(source)), key=lambda pair: (source[pair], target[pair])), []
    while left:
        room, rows = np.array(rooms), [*rows, []]
        while fitting := [pair for pair in left if source[pair] <= room[0] and target[pair] <= room[1]]:
            rest = (room - np.stack([source[fitting], target[fitting]], axis=1)) / rooms
            pair = fitting[int(np.square(rest).sum(axis=1).argmin())]
            rows[-1].append(pair)
            left.remove(pair)
            room = room - [source[pair], target[pair]]
    return rows


@pytest.mark.parametrize("rooms", [(20, 30), (7, 120), (64, 16)])
def test_packing_takes_the_best_pair_each_time(rooms: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_packing, "_WINDOW", 100)
    monkeypatch.setattr(pair_packing, "_MOST_WINDOWS", 2)
    random = np.random.default_rng(rooms[0])
    source, target = (random.integers(1, room + 1, 450) for room in rooms)
    index = fit_pairs(source, target, *rooms)
    expected = []
    for begin in range(0, 450, 100):
        window = slice(begin, begin + 100)
        expected += [sorted(pair + begin for pair in row) for row in greedily(source[window], target[window], rooms)]
    found = np.split(index[:, 0], np.flatnonzero(np.diff(index[:, 1])) + 1)
    assert [row.tolist() for row in found] == expected
    assert fit_pairs(source[:0], target[:0], *rooms).shape == (0, 2)
