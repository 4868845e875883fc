"""What every model shares: one way of initialising, and what a decoder hands on from position to position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from trainer.models.layers import initialise

Batch = Mapping[str, Tensor]


class Model(nn.Module):
    """Base of the models; the contract stands in the package's docstring."""

    objective: str | None = None
    """What it is trained for; a task that names another `objective` is refused. None: nothing is known of that."""
    max_positions: int | None = None
    packs_rows = False
    """Whether the samples of a packed row (with segment ids) are kept apart."""
    splits_positions = False
    """Whether `forward` goes on with `own_positions` of the embedded sequences."""

    def own_positions(self, x: Tensor) -> Tensor:
        """Of x [B,T,...] the positions this process computes: all; replaced where they are split over ranks."""
        return x

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Fill every parameter in place, in the order of `named_parameters()`.

        Values are drawn in fp32 on the generator's device and then copied, so they are the same in every precision and
        on every device.
        """
        for name, _ in self.named_parameters():
            self.reset_parameter(name, generator)

    def reset_parameter(self, name: str, generator: torch.Generator) -> None:
        """Fill the one parameter `name`; whoever holds shards gathers one at a time and calls this in order."""
        module_name, _, leaf = name.rpartition(".")
        initialise(self.get_submodule(module_name), leaf, generator)


class DecoderState(Protocol):
    """All that the next position needs to know about R rows; `decode_step` extends it in place."""

    first_ids: Tensor | None
    """[R] the ids to feed first, where the prompt tells them (decoder-only); None: begin with the start token."""

    def select(self, row_indices: Tensor) -> Self:
        """A new state with the rows `row_indices` [R'] int64, kept, reordered or repeated; this one stays as it was."""


class GeneratingModel(Protocol):
    """A model that `trainer.decoding` can drive."""

    max_positions: int | None

    def start_decoding(self, batch: Batch) -> DecoderState: ...

    def decode_step(self, state: DecoderState, token_ids: Tensor) -> Tensor: ...
