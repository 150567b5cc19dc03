"""Packing of pairs into rows by the sizes of both sides, with the norm-based greedy of Panigrahy et al. 2011.

Axes: N pairs, W windows that are packed at the same time, S source sizes, T target sizes.
"""

from __future__ import annotations

import numpy as np

_WINDOW = 1 << 14  # pairs that are packed together: bounds the time that packing takes
_TABLE_BYTES = 1 << 25  # the largest table of all windows that are packed at the same time
_MOST_WINDOWS = 128


def fit_pairs(source: np.ndarray, target: np.ndarray, source_room: int, target_room: int) -> np.ndarray:
    """Pack pairs of these sizes [N] into rows: [N, 2] int64, for each pair its number and its row, sorted by row.

    Each row is filled greedily with the pair that minimises the sum of squares of the room left on both sides, each relative to
    its room, until none fits. It prefers large pairs, and those whose longer side is the one with more room. Every size must be
    at most the room of its side.
    """
    per_window = 2 * (int(source.max(initial=0)) + 1) * (target_room + 1)
    together = min(_MOST_WINDOWS, max(1, _TABLE_BYTES // per_window)) * _WINDOW
    parts = []
    count = 0
    for begin in range(0, len(source), together):
        sizes = np.stack([source[begin : begin + together], target[begin : begin + together]], axis=1)
        windows = [sizes[first : first + _WINDOW] for first in range(0, len(sizes), _WINDOW)]
        for number, rows in enumerate(_fit(windows, source_room, target_room)):
            order = np.argsort(rows, kind="stable")
            parts.append(np.stack([order + begin + number * _WINDOW, rows[order] + count], axis=1))
            count += int(rows.max()) + 1
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def _fit(windows: list[np.ndarray], source_room: int, target_room: int) -> list[np.ndarray]:
    """A row for each pair of each window [P, 2], all windows in lockstep.

    Sizes are small integers, and pairs of the same sizes are interchangeable. Of the pairs with one source size the best is that
    with the largest target that fits, so that a choice is among source sizes only.
    """
    most = max(int(sizes[:, 0].max()) for sizes in windows)
    W, S, T = len(windows), most + 1, target_room + 1
    left_over = np.zeros((W, T, S), np.int16)
    for number, sizes in enumerate(windows):
        np.add.at(left_over[number], (sizes[:, 1], sizes[:, 0]), 1)
    # gap[w, t, s]: what the largest target that fits leaves of a room t, of the pairs with source size s that are still left.
    none = target_room + 1  # the gap if no such pair fits
    places: np.ndarray = np.arange(T, dtype=np.int16 if none < 1 << 15 else np.int32)
    largest = np.maximum.accumulate(np.where(left_over > 0, places[:, None], places.dtype.type(-1)), axis=1)
    gap = np.where(largest < 0, places.dtype.type(none), places[:, None] - largest)
    del largest
    target_cost = np.append(_costs(target_room), np.inf)  # [gap]
    # [room left, source size], a view: its rows overlap.
    falling = np.concatenate([_costs(source_room)[::-1], np.full(S - 1, np.inf)])
    source_cost = np.lib.stride_tricks.sliding_window_view(falling, S)[::-1]

    each = np.arange(W)
    source_left, target_left = np.full(W, source_room), np.full(W, target_room)
    waiting, row = np.array([len(sizes) for sizes in windows]), np.zeros(W, np.int64)
    picks: list[tuple[np.ndarray, ...]] = []  # window, source size, target size, row
    while waiting.any():
        gap_WS = gap[each, target_left]
        cost_WS = source_cost[source_left] + target_cost.take(gap_WS)
        chosen = cost_WS.argmin(axis=1)
        fits = np.isfinite(cost_WS[each, chosen])
        w, s = each[fits], chosen[fits]
        t = target_left[w] - gap_WS[w, s]
        picks.append((w, s, t, row[w]))
        source_left[w] -= s
        target_left[w] -= t
        waiting[w] -= 1
        row[~fits] += 1
        source_left[~fits], target_left[~fits] = source_room, target_room
        left_over[w, t, s] -= 1
        gone = left_over[w, t, s] == 0
        w, s, t = w[gone], s[gone], t[gone, None]
        # Where this size was the largest, it is now the next smaller one.
        before = gap[w, np.maximum(t[:, 0] - 1, 0), s][:, None]
        gaps = gap[w, :, s]
        following = np.where((t > 0) & (before < none), before + (places - t + 1), none).astype(gap.dtype)
        gap[w, :, s] = np.where(gaps == places - t, following, gaps)
    return _rows_of_pairs(windows, *(np.concatenate(part) for part in zip(*picks, strict=True)))


def _costs(room: int) -> np.ndarray:
    """The square of the relative room left, for each that there can be, 0 to `room`."""
    return np.square(np.arange(room + 1) / room)


def _rows_of_pairs(
    windows: list[np.ndarray], window: np.ndarray, source: np.ndarray, target: np.ndarray, row: np.ndarray
) -> list[np.ndarray]:
    """The row of each pair: pairs of the same sizes are taken in their order."""
    found = []
    for number, sizes in enumerate(windows):
        own = window == number
        taken = np.lexsort((target[own], source[own]))
        rows = np.empty(len(sizes), np.int64)
        rows[np.lexsort((sizes[:, 1], sizes[:, 0]))] = row[own][taken]
        found.append(rows)
    return found
