"""What keeps the samples of packed rows apart: a bias, blocks on a GPU, and on a CPU lines of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def masked_score(dtype: torch.dtype) -> float:
    """What is added to the score of a position that must not be seen.

    Finite, so that a row with nothing to see averages over everything instead of giving NaN; half of the lowest number,
    so that adding a score cannot overflow.
    """
    return torch.finfo(dtype).min / 2


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, K] bool (True = real token) -> [B, 1, 1, K] to add to scores; made once, used by every layer."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, masked_score(dtype))[:, None, None, :]


def segment_bias(queries: Tensor, keys: Tensor, dtype: torch.dtype, causal: bool = False) -> Tensor:
    """Segment ids [B, Q] and [B, K] int64 -> [B, 1, Q, K] to add to scores: zero within a segment, else `masked_score`.

    Padding (0) sees only padding. With `causal`, Q = K and keys after the query are masked too.
    """
    hidden = queries[:, :, None] != keys[:, None, :]
    if causal:
        hidden |= torch.ones(hidden.shape[1:], dtype=torch.bool, device=hidden.device).triu(1)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill_(hidden, masked_score(dtype))[:, None]


LONG = 512
"""Positions of a row from which on, on a CPU, lines of their own win: with shorter rows the lines' sizes, which differ
from step to step, tear the heap more than the pairs that are left out would have cost (docs/performance-log.md)."""


class PackedMask:
    """What keeps the samples of packed rows apart, and the future unseen, for FlexAttention (Dong et al. 2024).

    segments [B, T] as for `segment_bias`, whose causal bias it stands for: its blocks of 128 x 128 pairs, of which most
    are skipped, replace [B, 1, T, T] numbers.
    """

    def __init__(self, segments: Tensor) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (segments[row, query] == segments[row, key]) & (key <= query)

        batch, length = segments.shape
        self.sees = sees
        self.blocks = create_block_mask(sees, batch, None, length, length, device=str(segments.device))
        self._segments = segments
        self._bias: Tensor | None = None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The numbers, made once, for where FlexAttention does not go."""
        if self._bias is None or self._bias.dtype != dtype:
            self._bias = segment_bias(self._segments, self._segments, dtype, causal=True)
        return self._bias


@dataclass(frozen=True, slots=True)
class _Runs:
    """Where the segments of rows [B, T] lie: `starts` in the flattened rows, `lengths`, and `names`, which a segment of
    the queries shares with that of the keys."""

    starts: Tensor
    lengths: Tensor
    names: Tensor

    @staticmethod
    def of(segments: Tensor, num_names: int) -> _Runs:
        batch, length = segments.shape
        begins = torch.ones_like(segments, dtype=torch.bool)
        torch.ne(segments[:, 1:], segments[:, :-1], out=begins[:, 1:])
        starts = begins.view(-1).nonzero().view(-1)
        lengths = torch.diff(starts, append=starts.new_tensor([batch * length]))
        return _Runs(starts, lengths, starts // length * num_names + segments.reshape(-1)[starts])

    def at(self, places: Tensor) -> _Runs:
        return _Runs(self.starts[places], self.lengths[places], self.names[places])


class Moves:
    """Rows [N, F] into slots [M, F] and back: `there` says which row goes into a slot, and slots without one are zero;
    rows without a slot come back as zero."""

    def __init__(self, starts: Tensor, lengths: Tensor, widths: list[int], num_rows: int) -> None:
        """Of segments (starts, lengths [S]), each in a line of so many slots (widths, S)."""
        slots_of = torch.tensor(widths, dtype=torch.int64)
        lines = torch.repeat_interleave(torch.arange(len(widths)), slots_of)
        first_slots = slots_of.cumsum(0) - slots_of
        offsets = torch.arange(len(lines)) - first_slots[lines]
        filled = offsets < lengths[lines]
        self.there = torch.where(filled, starts[lines] + offsets, 0)
        self.empty_slots = (~filled).nonzero().view(-1)
        self.back = torch.full((num_rows,), -1)
        slots = filled.nonzero().view(-1)
        self.back[self.there[slots]] = slots
        self.empty_rows = (self.back < 0).nonzero().view(-1)
        self.back[self.empty_rows] = 0

    def to_slots(self, rows: Tensor) -> Tensor:
        """[N, F] -> [M, F]."""
        out: Tensor = _Move.apply(rows, self.there, self.empty_slots, self.back, self.empty_rows)  # type: ignore[no-untyped-call]
        return out

    def to_rows(self, slots: Tensor) -> Tensor:
        """[M, F] -> [N, F]."""
        out: Tensor = _Move.apply(slots, self.back, self.empty_rows, self.there, self.empty_slots)  # type: ignore[no-untyped-call]
        return out


class _Move(torch.autograd.Function):
    """Both ways are a selection of rows, where autograd would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *way: Tensor) -> Tensor:
        ctx.way = way
        return _selected(x, *way[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _selected(grads[0], *ctx.way[2:]), None, None, None, None


def _selected(x: Tensor, places: Tensor, empty: Tensor) -> Tensor:
    chosen = x.index_select(0, places)
    return chosen.index_fill_(0, empty, 0.0) if len(empty) else chosen


@dataclass(frozen=True, slots=True)
class Grid:
    """Segments of similar lengths, a line each: `lines` x `queries` slots of queries, and so of keys; grids follow each
    other. bias [lines, 1, 1, keys] hides keys that are not there, where causality does not."""

    lines: int
    queries: int
    keys: int
    bias: Tensor | None


class SegmentGrids:
    """The segments of packed rows as lines of their own, so that no attention is computed between two samples.

    queries [B, Q], keys [B, K]: segment ids as for `segment_bias`, each in one piece a row. `causal`: Q = K. Padding
    sees nothing, and its output is zero.
    """

    FILLED = 0.8
    """Of a line: shorter segments begin another grid, if this one has `SLOTS`."""
    SLOTS = 1024

    def __init__(self, queries: Tensor, keys: Tensor, dtype: torch.dtype, causal: bool) -> None:
        self.causal = causal
        num_names = int(max(queries.max(), keys.max())) + 1
        asking, asked = _Runs.of(queries, num_names), _Runs.of(keys, num_names)
        named = torch.full((len(queries) * num_names,), -1)
        named[asked.names] = torch.arange(len(asked.names))
        asking = asking.at(((asking.names % num_names > 0) & (named[asking.names] >= 0)).nonzero().view(-1))
        order = asking.lengths.argsort(descending=True, stable=True)
        asking = asking.at(order)
        asked = asked.at(named[asking.names])
        sizes = self._sizes(asking.lengths.tolist())
        query_widths, key_widths, self.grids = [], [], []
        first = 0
        for lines in sizes:
            key_lengths = asked.lengths[first : first + lines]
            width, key_width = int(asking.lengths[first]), int(key_lengths.max())
            bias = None if causal else padding_bias(torch.arange(key_width) < key_lengths[:, None], dtype)
            self.grids.append(Grid(lines, width, key_width, bias))
            query_widths += [width] * lines
            key_widths += [key_width] * lines
            first += lines
        self.queries = Moves(asking.starts, asking.lengths, query_widths, queries.numel())
        self.keys = self.queries if keys is queries else Moves(asked.starts, asked.lengths, key_widths, keys.numel())

    def _sizes(self, lengths: list[int]) -> list[int]:
        """How many segments each grid has; `lengths` fall."""
        sizes: list[int] = []
        first = 0
        for at, length in enumerate(lengths):
            if length < self.FILLED * lengths[first] and (at - first) * lengths[first] >= self.SLOTS:
                sizes.append(at - first)
                first = at
        return [*sizes, len(lengths) - first] if lengths else []


Bias = Tensor | PackedMask | SegmentGrids


def packed_mask(queries: Tensor, keys: Tensor, dtype: torch.dtype, causal: bool = False) -> Bias:
    """What hides other samples, and with `causal` the future, in packed rows of segment ids [B, Q] and [B, K].

    On a GPU blocks, if causal; on a CPU lines of their own, if rows are long; else a bias: also where the whole model
    is compiled, where ids are not known (fake tensors), and where all is padding.
    """
    known = type(queries) is Tensor and not torch.compiler.is_compiling()
    if known and causal and queries.device.type == "cuda":
        return PackedMask(queries)
    if known and queries.device.type == "cpu" and keys.shape[1] > LONG:
        segments = SegmentGrids(queries, keys, dtype, causal)
        return segments if segments.grids else segment_bias(queries, keys, dtype, causal)
    return segment_bias(queries, keys, dtype, causal)
