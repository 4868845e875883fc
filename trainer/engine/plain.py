"""PyTorch alone: every rank holds the whole training state; gradients are summed over the ranks.

Mixed precision is what DeepSpeed does: parameters, activations and gradients in bf16, masters and optimizer states in
fp32. All parameters live in one flat buffer, and so do masters and summed gradients: casting, reducing and measuring
the norm are each one operation, whatever the number of layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from trainer import distributed, sections
from trainer.engine.base import Fragment
from trainer.engine.compiled import compile_module
from trainer.engine.optimizer_state import (
    evaluation_mode,
    frozen_whole,
    get_step,
    materialise_state,
    passes,
    set_step,
    squares_of,
    tensor_states,
)
from trainer.optim import set_learning_rate
from trainer.parallel.layout import Layout
from trainer.parallel.slices import Slices, of_whole
from trainer.tasks import Batch, LossSums, Task

BuildOptimizer = Callable[[Iterable[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer]

_ALIGNMENT = 64  # elements; every parameter begins on a cache line, as in its own allocation


class PlainEngine:
    """See `trainer.engine.base.Engine`. `module` must be in fp32; it is converted to `dtype` here."""

    fragments_stay = True
    ranks_must_step_together = False

    def __init__(
        self,
        module: torch.nn.Module,
        build_optimizer: BuildOptimizer,
        dtype: torch.dtype,
        clip_norm: float | None,
        compiled: bool = False,
        layout: Layout | None = None,
        slices: Slices | None = None,
    ) -> None:
        """layout, slices: where the model is split over ranks (see `trainer.parallel`)."""
        self._layout = layout or Layout(distributed.rank(), distributed.world_size())
        self._slices = slices or {}
        self._clip_norm = clip_norm
        self.skipped_steps = 0
        self.squares: Mapping[str, float] = {}
        self._names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._offsets = _offsets(parameters)
        self._masters_flat = self._flat_copy(parameters, torch.float32)
        module.to(distributed.device(), dtype)
        self._working_flat = self._masters_flat if dtype == torch.float32 else self._masters_flat.to(dtype)
        for parameter, view in zip(parameters, self._views(self._working_flat, parameters), strict=True):
            parameter.data = view
        self._masters = [torch.nn.Parameter(view) for view in self._views(self._masters_flat, parameters)]
        self._sum_flat = torch.zeros_like(self._masters_flat)
        self._sums = self._views(self._sum_flat, parameters)
        self._parameters = parameters
        for master, view in zip(self._masters, self._sums, strict=True):
            master.grad = view
        if dtype == torch.float32:
            for parameter, view in zip(parameters, self._sums, strict=True):
                parameter.grad = view
        self.module = module
        if compiled:
            compile_module(module)
        self.model: torch.nn.Module = module
        self._optimizer = build_optimizer(zip(self._names, self._masters, strict=True))

    def _flat_copy(self, parameters: list[torch.nn.Parameter], dtype: torch.dtype) -> torch.Tensor:
        flat = torch.zeros(self._offsets[-1], dtype=dtype, device=distributed.device())
        for parameter, view in zip(parameters, self._views(flat, parameters), strict=True):
            view.copy_(parameter.detach())
        return flat

    def _views(self, flat: torch.Tensor, like: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        return [
            flat[start : start + parameter.numel()].view(parameter.shape)
            for start, parameter in zip(self._offsets, like, strict=False)
        ]

    def forward_backward(self, task: Task, batch: Batch, scale: float, last: bool) -> LossSums:
        """See the contract. In bf16 the micro-batches are summed in fp32."""
        sums = task.loss(self.model, batch)
        sections.enter("backward")
        (sums.objective * scale).backward()  # type: ignore[no-untyped-call]
        if self._working_flat is not self._masters_flat:
            used = [
                (total, p.grad) for total, p in zip(self._sums, self._parameters, strict=True) if p.grad is not None
            ]
            torch._foreach_add_([total for total, _ in used], [gradient for _, gradient in used])
            for parameter in self._parameters:
                parameter.grad = None
        if last and self._layout.shards > 1:
            sections.enter("reduce")
            dist.all_reduce(self._sum_flat, group=self._layout.shard_group)
        return sums

    def step(self, lr: float, max_norm: float = math.inf, measure: bool = False) -> float:
        """See the contract."""
        norm = self._norm()
        if measure:
            self.squares = squares_of(self._own_sums()) if math.isfinite(norm) else {}
        if passes(norm, max_norm):
            self._update(lr, norm)
        else:
            self.skipped_steps += 1
        self._sum_flat.zero_()
        return norm

    def _norm(self) -> float:
        """Of the whole gradient: of matrices that are split, every rank's part; of the others, one."""
        if self._layout.tensor == 1:
            return float(torch.linalg.vector_norm(self._sum_flat))
        squares = torch.zeros(2, dtype=torch.float64)
        for name, gradient in zip(self._names, self._sums, strict=True):
            squares[int(name in self._slices)] += torch.linalg.vector_norm(gradient).double().square().cpu()
        everywhere = squares.clone()
        dist.all_reduce(everywhere, group=self._layout.tensor_group)
        return float((squares[0] + everywhere[1]).sqrt())

    def _own_sums(self) -> list[tuple[str, torch.Tensor]]:
        """(parameter, gradient) of those that this rank speaks for; ranks with the same take turns."""
        return [
            (name, gradient)
            for turn, (name, gradient) in enumerate(zip(self._names, self._sums, strict=True))
            if turn % self._layout.shards == self._layout.shard_rank and self._layout.saves(name in self._slices)
        ]

    def _update(self, lr: float, norm: float) -> None:
        if self._clip_norm is not None and norm > self._clip_norm:
            self._sum_flat.mul_(self._clip_norm / norm)
        set_learning_rate(self._optimizer, lr)
        self._optimizer.step()
        if self._working_flat is not self._masters_flat:
            self._working_flat.copy_(self._masters_flat)

    def fragments(self) -> Iterator[Fragment]:
        """See the contract: everything, on every rank; they take turns in saving it."""
        materialise_state(self._optimizer, list(self._masters))
        turn = itertools.count()
        for name, master in zip(self._names, self._masters, strict=True):
            for key, state in (("master", master.detach()), *tensor_states(self._optimizer.state[master])):
                own = next(turn) % self._layout.shards == self._layout.shard_rank and self._layout.saves(
                    name in self._slices
                )
                yield from of_whole(Fragment(name, key, 0, tuple(state.shape), state.view(-1), saved=own), self._slices)

    def frozen(self) -> Iterator[Fragment]:
        """See the contract."""
        return frozen_whole(self.module)

    def scalars(self) -> dict[str, float]:
        """See the contract."""
        return {"step": get_step(self._optimizer)}

    def after_load(self, scalars: Mapping[str, float]) -> None:
        """See the contract."""
        for master in self._masters:
            set_step(self._optimizer, master, scalars["step"])
        if self._working_flat is not self._masters_flat:
            self._working_flat.copy_(self._masters_flat)

    def evaluating(self) -> AbstractContextManager[None]:
        """See the contract."""
        return evaluation_mode(self.module)


def _offsets(parameters: list[torch.nn.Parameter]) -> list[int]:
    """Where each parameter begins in the flat buffer, and last its length."""
    offsets = [0]
    for parameter in parameters:
        offsets.append(offsets[-1] + -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT)
    return offsets
