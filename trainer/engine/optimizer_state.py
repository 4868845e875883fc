"""What the engines share in handling a torch optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy
import torch

from trainer.engine.base import Fragment


def passes(norm: float, max_norm: float) -> bool:
    """Whether a gradient of this norm may update the parameters."""
    return math.isfinite(norm) and norm <= max_norm


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
    for group, (_, _) in zip(optimizer.param_groups, saved_groups, strict=True):
        group["params"], group["lr"] = [], 0.0
    optimizer.param_groups[0]["params"] = missing
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
