"""What the engines share in handling a torch optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy
import torch

from trainer.engine.base import Fragment


def passes(norm: float, max_norm: float) -> bool:
    """Whether a gradient of this norm may update the parameters."""
    return math.isfinite(norm) and norm <= max_norm


def squares_of(pieces: Sequence[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """By parameter the sum of squares of its pieces of the gradient; one transfer from the device for all."""
    squares: dict[str, float] = {}
    if pieces:
        norms = torch.stack(torch._foreach_norm([piece for _, piece in pieces]))
        for (name, _), square in zip(pieces, norms.double().square().tolist(), strict=True):
            squares[name] = squares.get(name, 0.0) + square
    return squares


def materialise_state(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> None:
    """Let the optimizer create its state for `parameters` now instead of at its first step.

    A step with learning rate 0 on gradients of zero leaves the parameters as they are; the counters it advances are set
    by `load_scalars` afterwards.
    """
    missing = [parameter for parameter in parameters if parameter not in optimizer.state]
    if not missing:
        return
    saved_groups = [(group["params"], group["lr"]) for group in optimizer.param_groups]
    saved_grads = [parameter.grad for parameter in missing]
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"], group["lr"] = [], 0.0
    for parameter in missing:  # ZeRO-3 puts a sub-group of parameters into a group when it steps
        groups.get(parameter, optimizer.param_groups[0])["params"].append(parameter)
    for parameter in missing:
        parameter.grad = _zeros_like(parameter)
    optimizer.step()
    for parameter, grad in zip(missing, saved_grads, strict=True):
        parameter.grad = grad
        set_step(optimizer, parameter, 0.0)
    for group, (params, lr) in zip(optimizer.param_groups, saved_groups, strict=True):
        group["params"], group["lr"] = params, lr


def _zeros_like(parameter: torch.Tensor) -> torch.Tensor:
    """Zeros to be read only: on a CPU, pages of them take no memory until they are written to."""
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return torch.zeros_like(parameter)
    return torch.from_numpy(numpy.zeros(tuple(parameter.shape), dtype=numpy.float32))


def get_step(optimizer: torch.optim.Optimizer) -> float:
    """The optimizer's own count of updates (bias correction depends on it); 0 where it keeps none."""
    for state in optimizer.state.values():
        if "step" in state:
            return float(state["step"])
    return 0.0


def set_step(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, step: float) -> None:
    """Set the count of updates of one parameter, keeping its type (tensor or number)."""
    state = optimizer.state[parameter]
    if "step" in state:
        if isinstance(state["step"], torch.Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = type(state["step"])(step)


def tensor_states(state: Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    """The states worth saving: tensors other than the step count."""
    for key, value in sorted(state.items()):
        if key != "step" and isinstance(value, torch.Tensor):
            yield key, value


def frozen_whole(model: torch.nn.Module) -> Iterator[Fragment]:
    """The parameters that are not trained, where every rank has them whole."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield Fragment(name, "frozen", 0, tuple(parameter.shape), parameter.data.view(-1), saved=False)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; training mode again afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
