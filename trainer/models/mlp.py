"""The multi-layer perceptron: affine maps with ReLUs between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.base import Model
from trainer.models.layers import dropout, matrix_size


class MLP(Model):
    """A dense classifier: inputs [B,...] of `input_size` numbers each -> logits [B,num_classes].

    hidden_sizes: units of each hidden layer; dropout: of the hidden activations.
    """

    def __init__(
        self, input_size: int, num_classes: int, hidden_sizes: Sequence[int] = (128,), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        sizes = [input_size, *hidden_sizes]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """inputs [B,...] float -> logits [B,num_classes] in the parameters' dtype."""
        x = batch["inputs"].flatten(1).to(self.head.weight.dtype)
        for layer in self.hidden:
            x = dropout(F.relu(layer(x)), self.dropout, self.training)
        logits: Tensor = self.head(x)
        return logits

    def flops_per_sample(self) -> float:
        """Forward and backward: 6 x matrix parameters."""
        return 6.0 * matrix_size(self)
