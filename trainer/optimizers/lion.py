"""Lion: the sign of a momentum (Chen et al. 2023, "Symbolic discovery of optimization algorithms")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

_BLOCK = 2**20
"""Elements that are updated at once: the sign needs memory of its own, which should not be that of a whole shard."""


class Lion(torch.optim.Optimizer):
    """p <- (1 - lr weight_decay) p - lr sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (algorithm 2 there).

    One state, the momentum "exp_avg". All of it is done element by element, so any shard of a parameter may be updated
    by itself. Every element moves by lr: use a third to a tenth of AdamW's, and as much more weight decay.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: Sequence[float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        """Raises ValueError for `betas` outside [0, 1)."""
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={list(betas)} should be two numbers from 0 to below 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; `closure` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        flats = (tensor.view(-1) for tensor in (parameter, gradient, state["exp_avg"]))
        for p, g, m in zip(*(torch.split(flat, _BLOCK) for flat in flats), strict=True):
            direction = torch.lerp(g, m, beta1).sign_()
            p.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
            m.lerp_(g, 1.0 - beta2)
