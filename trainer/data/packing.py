"""Packing: samples of different lengths share rows of a fixed size, with little room left over."""

from __future__ import annotations

import math
from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

_TARGET_FILL = 0.985
"""How full the rows that pairs are dealt to would be, were everything to fit at once."""


def pack(lengths: NDArray[np.int64], row_lengths: tuple[int, ...]) -> list[list[int]]:
    """Rows as lists of sample indices, every sample in one row; a few microseconds a sample.

    lengths: int64 [n, sides], what a sample takes on each side of a row (two for source and target); row_lengths: what
    a row holds on each side, which no sample exceeds.
    """
    assert (lengths <= np.asarray(row_lengths)).all(), "a sample is longer than a row"
    if len(row_lengths) == 1:
        return _best_fit(lengths[:, 0], row_lengths[0])
    return _deal(lengths / np.asarray(row_lengths, np.float64))


def _best_fit(lengths: NDArray[np.int64], row_length: int) -> list[list[int]]:
    """Best-fit decreasing (Johnson et al. 1974): the longest first, each into the row it leaves with the least room."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            rows[row].append(index)
        else:
            room, row = row_length, len(rows)
            rows.append([index])
        insort(open_rows, (room - length, row))
    return rows


def _deal(shares: NDArray[np.float64]) -> list[list[int]]:
    """Rows for samples with several sides; shares: float64 [n, sides], parts of a row.

    As many rows as the samples about fill are dealt to, the longest samples first, one to each row in a round: the
    longest to the roomiest (LPT, Graham 1969), every other round the most lopsided to the row most lopsided the other
    way. What does not fit in its round is placed by best fit at the end.
    """
    num_rows = math.ceil(shares.sum(axis=0).max() / _TARGET_FILL)
    room = np.ones((num_rows, shares.shape[1]))
    row_of = np.full(len(shares), -1)
    order = np.argsort(-shares.max(axis=1, initial=0.0), kind="stable")
    for begin in range(0, len(order), max(1, num_rows)):
        samples = order[begin : begin + num_rows]
        if begin // num_rows % 2 and len(samples) == num_rows:
            samples = samples[np.argsort(shares[samples, 0] - shares[samples, -1], kind="stable")]
            rows = np.argsort(room[:, 0] - room[:, -1], kind="stable")
        else:
            rows = np.argsort(-room.min(axis=1), kind="stable")[: len(samples)]
        fits = (shares[samples] <= room[rows] + 1e-9).all(axis=1)
        row_of[samples[fits]] = rows[fits]
        room[rows[fits]] -= shares[samples[fits]]
    return _place_remaining(shares, order[row_of[order] < 0], room, row_of)


def _place_remaining(
    shares: NDArray[np.float64], remaining: NDArray[np.intp], room: NDArray[np.float64], row_of: NDArray[np.intp]
) -> list[list[int]]:
    """Best fit for the samples `remaining`, in new rows where they must; then all rows."""
    num_rows = len(room)
    room = np.concatenate((room, np.ones((len(remaining), room.shape[1]))))
    for index in remaining.tolist():
        left = (room[: num_rows + 1] - shares[index]).min(axis=1)
        row = int(np.where(left > -1e-9, left, np.inf).argmin())
        num_rows += row == num_rows
        room[row] -= shares[index]
        row_of[index] = row
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for index, row in enumerate(row_of.tolist()):
        rows[row].append(index)
    return [row for row in rows if row]
