"""How the part of a parameter that a rank holds lies in the whole one, which is what checkpoints know."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.engine.base import Fragment


@dataclass(frozen=True, slots=True)
class Slice:
    """shape: of the whole parameter; rows: intervals (begin, end) of it, one after the other in the part, or all of
    them (None); columns: the interval of a matrix's columns, or all of them (None). One of the two is None."""

    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...] | None = None
    columns: tuple[int, int] | None = None


Slices = Mapping[str, Slice]
"""By the parameter's name; parameters that are not in it are whole."""


def of_whole(fragment: Fragment, slices: Slices) -> Iterator[Fragment]:
    """A fragment of a rank's part as fragments of the whole parameter, in views of the same tensor."""
    part = slices.get(fragment.parameter)
    if part is None:
        yield fragment
    elif part.columns is not None:
        yield replace(fragment, shape=part.shape, columns=part.columns)
    else:
        assert part.rows is not None, "a slice is of rows or of columns"
        row_size = math.prod(part.shape[1:])
        begin, end, place = fragment.start, fragment.start + fragment.tensor.numel(), 0
        for first, last in part.rows:
            size = (last - first) * row_size
            low, high = max(begin, place), min(end, place + size)
            if low < high:
                view = fragment.tensor[low - begin : high - begin]
                start = first * row_size + low - place
                yield replace(fragment, shape=part.shape, start=start, tensor=view)
            place += size
