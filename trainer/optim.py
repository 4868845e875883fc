"""Optimizers: which parameters decay, and what each optimizer is asked to do.

The optimizer itself is a part (of `torch.optim`, of `trainer.optimizers`, or any allowed class); this module only
groups the parameters. Learning rates come from the schedule at every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trainer.build import build
from trainer.errors import ConfigError


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay, vectors (biases, norms) do not. Empty groups are left out; parameters come
    with their names.

    Matrix or vector is decided by the *declared* shape: under ZeRO-3 the local tensor is empty, `ds_shape` tells.
    """
    decayed: list[tuple[str, torch.nn.Parameter]] = []
    plain: list[tuple[str, torch.nn.Parameter]] = []
    for name, parameter in named:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else plain).append((name, parameter))
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(part: Mapping[str, Any], named: Iterable[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """The configured optimizer over `named` parameters (masters, in mixed precision).

    Raises ConfigError for a part that is not an optimizer.
    """
    groups = parameter_groups(named, float(part.get("weight_decay", 0.0)))
    optimizer = build(part, "optimizer", params=groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer._target_={part['_target_']} is no torch.optim.Optimizer; choose one that is.")
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
