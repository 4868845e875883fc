"""AdamW whose steps are relative to the size of each parameter (nanoT5, Nawrot 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

_LEAST_RMS = 1e-3  # of parameters that begin at zero (Shazeer & Stern 2018, section 8)


class AdamWScale(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with the learning rate of a parameter multiplied by its root mean square.

    That is Adafactor's relative step (Shazeer & Stern 2018, section 8) with AdamW's moments, as nanoT5 trains T5 with
    lr 2e-2. A parameter is scaled as a whole, so a shard of it cannot be updated by itself.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-2,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """Raises ValueError for `betas` outside [0, 1)."""
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={list(betas)} should be two numbers from 0 to below 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; `closure` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0.0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1.0
        mean = state["exp_avg"].lerp_(parameter.grad, 1.0 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1.0 - beta2)
        rms = (torch.linalg.vector_norm(parameter) / math.sqrt(parameter.numel())).clamp_(min=_LEAST_RMS)
        divisor = square.sqrt().mul_((1.0 - beta2 ** state["step"]) ** -0.5).add_(group["eps"])
        update = (mean / divisor).mul_(rms / (1.0 - beta1 ** state["step"]))
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
