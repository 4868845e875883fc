"""The contract between the loop and whatever holds the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from trainer.tasks import Batch, LossSums, Task

BuildModel = Callable[[], "torch.nn.Module"]
"""Builds the model on the current default device and dtype; called inside the engine's own context."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of one parameter's training state that this rank owns.

    parameter: name in the model; key: "master" (fp32 weights) or an optimizer state ("exp_avg" ...);
    start: where the piece begins in the flattened whole; shape: of the whole; tensor: a live flat view: reading it
    saves, writing into it loads. columns: the interval of a matrix's columns that the piece is of, None = all; `start`
    then counts in the matrix of these columns. saved: whether this rank is the one, of those that hold the piece, that
    saves it.
    """

    parameter: str
    key: str
    start: int
    shape: tuple[int, ...]
    tensor: torch.Tensor
    columns: tuple[int, int] | None = None
    saved: bool = True

    def fill(self, whole: torch.Tensor) -> None:
        """Copy the piece out of the `whole` parameter's flattened values."""
        if self.columns is not None:
            whole = whole.view(self.shape)[:, slice(*self.columns)].flatten()
        self.tensor.copy_(whole[self.start : self.start + self.tensor.numel()])


class Engine(Protocol):
    """Holds model and optimizer on this rank; every method is called by all ranks together."""

    module: torch.nn.Module
    """The model as built; decoding calls its methods."""

    model: torch.nn.Module
    """What tasks call: runs `forward` with the engine's hooks."""

    fragments_stay: bool
    """True when what `fragments` gives stays where it is, and as it is until the next `step`."""

    ranks_must_step_together: bool
    """True when `forward` is a collective (ZeRO-3): every rank must run the same number of forward passes."""

    @property
    def squares(self) -> Mapping[str, float]:
        """By parameter, what this rank tells of its gradient's squared norm in the last step that was to `measure`.

        Over all ranks they add up to all of it, times a factor that all have in common. {}: no gradient that is finite.
        """

    def forward_backward(self, task: Task, batch: Batch, scale: float, last: bool) -> LossSums:
        """Loss of one micro-batch and its gradient x `scale`, added to the gradients of this step.

        Gradients are *summed* over micro-batches and ranks; with scale = 1 / target tokens of the global batch the
        result is the gradient of the mean over its tokens. `last`: no micro-batch of this step follows (gradients may
        be reduced now).
        """

    def step(self, lr: float, max_norm: float = math.inf, measure: bool = False) -> float:
        """Clip, update with learning rate `lr`, clear the gradients; returns the global gradient norm before clipping.
        measure: also leave `squares`.

        There is no update where that norm is not finite or above `max_norm`: masters and optimizer states stay as they
        are.
        """

    @property
    def skipped_steps(self) -> int:
        """Steps without an update so far."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's pieces of the training state; over all ranks they cover all of it at least once.

        Optimizer states exist from the first call on, even before the first step. A piece that lives on a disk is in
        memory only until the next one is asked for.
        """

    def frozen(self) -> Iterator[Fragment]:
        """This rank's pieces of the parameters that are not trained, in the precision of the model; no checkpoint has
        them, and `after_load` follows whatever is written into them."""

    def scalars(self) -> dict[str, float]:
        """What else must be kept, equal on all ranks: the optimizer's own step count, the loss scale."""

    def after_load(self, scalars: Mapping[str, float]) -> None:
        """Make everything agree with the masters and states just written through `fragments`, and with `scalars`."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode: dropout off, no gradients; restores training mode on leaving."""
