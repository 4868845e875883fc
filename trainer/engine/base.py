"""The contract between the loop and whatever holds the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from trainer.tasks import Batch, LossSums, Task


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of one parameter's training state that this rank owns.

    parameter: name in the model; key: "master" (fp32 weights) or an optimizer state ("exp_avg", "step" ...);
    start: where the piece begins in the flattened parameter; shape: of the whole parameter;
    tensor: a live flat view: reading it saves, writing into it loads.
    """

    parameter: str
    key: str
    start: int
    shape: tuple[int, ...]
    tensor: torch.Tensor


class Engine(Protocol):
    """Holds model and optimizer on this rank; every method is called by all ranks together."""

    module: torch.nn.Module
    """The model as built; `forward` goes through `__call__` of `model`."""

    @property
    def model(self) -> torch.nn.Module:
        """What tasks call: runs `forward` with the engine's hooks."""

    def forward_backward(self, task: Task, batch: Batch, scale: float, last: bool) -> LossSums:
        """Loss of one micro-batch and its gradient x `scale`, added to the gradients of this step.

        `last`: no micro-batch of this step follows (gradients may be reduced now).
        """

    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr` (each group times its own factor), clear gradients; the global norm before clipping."""

    @property
    def skipped_steps(self) -> int:
        """Steps without an update so far, because a gradient overflowed in fp16."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's pieces of the training state; over all ranks they cover every parameter at least once."""

    def after_load(self) -> None:
        """Make the working parameters agree with the masters just written through `fragments`."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode: dropout off, no gradients; restores training mode on leaving."""

    @property
    def ranks_must_step_together(self) -> bool:
        """True when `forward` is a collective (ZeRO-3): every rank must run the same number of forward passes."""
