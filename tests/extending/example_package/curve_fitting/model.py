"""A model: a polynomial, whose coefficients are learnt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.models.base import Model


class Polynomial(Model):
    """`x` [B] float -> [B], a polynomial of `degree` in x."""

    objective = "regression"  # tasks with another one are refused

    def __init__(self, degree: int) -> None:
        super().__init__()
        if degree < 1:
            raise ValueError(f"degree={degree} is no polynomial in x")
        self.degree = degree
        self.coefficients = nn.Linear(degree + 1, 1, bias=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B] in the parameters' dtype."""
        powers = torch.stack([batch["x"] ** power for power in range(self.degree + 1)], dim=-1)
        fitted: Tensor = self.coefficients(powers.to(self.coefficients.weight.dtype)).squeeze(-1)
        return fitted

    def flops_per_sample(self) -> float:
        """Forward and backward of the one product."""
        return 6.0 * (self.degree + 1)
