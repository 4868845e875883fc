"""What attention remembers while text is generated position by position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROWTH = 32
"""Positions by which a cache grows when it is full."""


class KeyValueCache:
    """Keys and values of all layers in one tensor [L, 2, R, H, capacity, head_dim], so that beams move in one copy."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.length = 0
        self.buffer: Tensor | None = None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [R, H, n, head_dim] behind the `length` positions known; all of that layer's so far.

        `length` itself moves on by `advance`, once all layers have written.
        """
        end = self.length + keys.shape[2]
        if self.buffer is None or self.buffer.shape[4] < end:
            self._grow(keys, end)
        assert self.buffer is not None
        self.buffer[layer, 0, :, :, self.length : end] = keys
        self.buffer[layer, 1, :, :, self.length : end] = values
        return self.buffer[layer, 0, :, :, :end], self.buffer[layer, 1, :, :, :end]

    def _grow(self, like: Tensor, end: int) -> None:
        rows, heads, _, head_dim = like.shape
        capacity = -(-end // GROWTH) * GROWTH
        grown = like.new_empty(self.num_layers, 2, rows, heads, capacity, head_dim)
        if self.buffer is not None:
            grown[..., : self.length, :] = self.buffer[..., : self.length, :]
        self.buffer = grown

    def advance(self, positions: int) -> None:
        """All layers have written `positions` positions."""
        self.length += positions

    def select(self, row_indices: Tensor) -> KeyValueCache:
        """A copy with the rows `row_indices` [R']."""
        selected = KeyValueCache(self.num_layers)
        selected.length = self.length
        if self.buffer is not None:
            selected.buffer = self.buffer.index_select(2, row_indices)
        return selected


@dataclass
class Memory:
    """The encoder's side of cross-attention for N sources; each serves `rows_per_source` consecutive rows.

    keys_values: for each layer (keys, values), each [N, H, S, head_dim]; bias: [N, 1, 1, S] added to scores, or None.
    Beams of one sentence share its memory: they are the queries of one attention call, and moving among them copies
    nothing.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    bias: Tensor | None
    num_sources: int
    rows_per_source: int = 1

    def select(self, row_indices: Tensor) -> Memory:
        """See `DecoderState.select`; rows that do not fall into equal groups by source get a memory each."""
        sources = row_indices // self.rows_per_source
        kept, counts = torch.unique_consecutive(sources, return_counts=True)
        group = int(counts[0])
        if not bool((counts == group).all()):
            kept, group = sources, 1
        everything = torch.arange(self.num_sources, device=kept.device)
        if torch.equal(kept, everything):
            return Memory(self.keys_values, self.bias, self.num_sources, group)
        return Memory(
            [(keys[kept], values[kept]) for keys, values in self.keys_values],
            None if self.bias is None else self.bias[kept],
            len(kept),
            group,
        )


@dataclass
class AttentionState:
    """`DecoderState` of the Transformers.

    first_ids: see `DecoderState`; memory: encoder-decoder only; padding_bias: [R, 1, 1, P] for prompts that differ in
    length (they end together, padded on the left); padding: [R] how many of the P positions are padding.
    """

    cache: KeyValueCache
    first_ids: Tensor | None = None
    memory: Memory | None = None
    padding_bias: Tensor | None = None
    padding: Tensor | None = None

    def select(self, row_indices: Tensor) -> AttentionState:
        """See `DecoderState.select`."""
        return AttentionState(
            cache=self.cache.select(row_indices),
            first_ids=None if self.first_ids is None else self.first_ids[row_indices],
            memory=None if self.memory is None else self.memory.select(row_indices),
            padding_bias=None if self.padding_bias is None else self.padding_bias[row_indices],
            padding=None if self.padding is None else self.padding[row_indices],
        )
