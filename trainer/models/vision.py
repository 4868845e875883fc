"""A convolutional classifier for small images, in the manner of LeNet-5 (LeCun et al. 1998) with ReLUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.base import Model
from trainer.models.layers import dropout, matrix_size


class CNN(Model):
    """Blocks of two 3x3 convolutions and 2x2 max-pooling, then one hidden dense layer.

    image_size: (height, width); in_channels: of the image; channels: of each block; hidden_size: of the dense layer;
    dropout: before and after that layer.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        num_classes: int,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        hidden_size: int = 128,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.image_shape = (in_channels, *image_size)
        self.dropout = dropout
        height, width = (side >> len(channels) for side in image_size)
        if min(height, width) < 1:
            raise ConfigError(
                f"model.image_size={list(image_size)} is too small for {len(channels)} poolings"
                f" (model.channels={list(channels)}); each halves it. Use fewer blocks."
            )
        self.convolutions = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)])
            for before, after in pairwise([in_channels, *channels])
        )
        self.hidden = nn.Linear(channels[-1] * height * width, hidden_size)
        self.head = nn.Linear(hidden_size, num_classes)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """inputs [B,...] float, in_channels x height x width numbers each -> logits [B,num_classes]."""
        x = batch["inputs"].reshape(-1, *self.image_shape).to(self.head.weight.dtype)
        for block in self.convolutions:
            for convolution in block:  # type: ignore[attr-defined]
                x = F.relu(convolution(x))
            x = F.max_pool2d(x, 2)
        x = dropout(x.flatten(1), self.dropout, self.training)
        x = dropout(F.relu(self.hidden(x)), self.dropout, self.training)
        logits: Tensor = self.head(x)
        return logits

    def flops_per_sample(self) -> float:
        """Forward and backward: 6 x the multiply-adds of convolutions and matrices."""
        _, height, width = self.image_shape
        total = matrix_size(self)
        for level, block in enumerate(self.convolutions):
            pixels = (height >> level) * (width >> level)
            total += sum(9 * layer.in_channels * layer.out_channels * pixels for layer in block)  # type: ignore[attr-defined]
        return 6.0 * total
