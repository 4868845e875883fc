"""Residual networks (He et al. 2015, "Deep Residual Learning for Image Recognition") with group normalisation.

Norms are GroupNorm (Wu & He 2018) in place of the paper's batch normalisation: that takes its mean and variance over
the images that one rank passes forward at once, so loss and gradients would change with the number of ranks and
micro-batches, and running averages would have to be carried beside the weights. Statistics of groups of channels are an
image's own; the curve is the same however the batch is split. Parameters are as many as with batch normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.base import Model
from trainer.models.layers import matrix_size

BlockKind = Literal["basic", "bottleneck"]

_EXPANSION = {"basic": 1, "bottleneck": 4}
"""Channels that a block gives for one of its inner ones (table 1)."""


class Convolution(nn.Module):
    """Convolution without bias, then GroupNorm."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(groups, after)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, ceil(H / stride), ceil(W / stride)]."""
        out: Tensor = self.norm(self.convolution(x))
        return out


class Block(nn.Module):
    """relu(x + convolutions(x)): two of 3x3 ("basic"), or 1x1, 3x3, 1x1 ("bottleneck", figure 5).

    A block that halves the image does so in its first 3x3 convolution; where shapes differ, x passes a 1x1 convolution
    (option B of section 3.3).
    """

    def __init__(self, kind: BlockKind, before: int, inner: int, stride: int, groups: int) -> None:
        super().__init__()
        after = inner * _EXPANSION[kind]
        if kind == "basic":
            shapes = [(before, inner, 3, stride), (inner, after, 3, 1)]
        else:
            shapes = [(before, inner, 1, 1), (inner, inner, 3, stride), (inner, after, 1, 1)]
        self.convolutions = nn.ModuleList(Convolution(*shape, groups) for shape in shapes)
        self.shortcut = Convolution(before, after, 1, stride, groups) if stride > 1 or before != after else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, ceil(H / stride), ceil(W / stride)]."""
        y = x
        for index, convolution in enumerate(self.convolutions):
            y = convolution(F.relu(y) if index else y)
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(Model):
    """An image classifier: a stem, stages of residual blocks, the mean over the pixels, a linear map.

    image_size: (height, width); in_channels: of the image; block: kind of the blocks; layers: blocks of each stage;
    every stage after the first halves the image; channels: inner ones of each stage (None: 64, 128, 256, ... as in
    table 1); stem: "large" is 7x7 with stride 2 and 3x3 max-pooling with stride 2 (for images of 224 pixels), "small" a
    3x3 convolution (section 4.2, for images of 32); norm_groups: of every GroupNorm. ResNet-18 is block="basic",
    layers=[2, 2, 2, 2]; ResNet-50 block="bottleneck", layers=[3, 4, 6, 3].
    """

    def __init__(
        self,
        image_size: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        block: BlockKind = "basic",
        layers: Sequence[int] = (2, 2, 2, 2),
        channels: Sequence[int] | None = None,
        stem: Literal["large", "small"] = "large",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        inner = [64 * 2**stage for stage in range(len(layers))] if channels is None else list(channels)
        _check(layers, inner, norm_groups)
        self.image_shape = (in_channels, *image_size)
        self.large_stem = stem == "large"
        self.stem = Convolution(in_channels, inner[0], 7 if self.large_stem else 3, 1 + self.large_stem, norm_groups)
        self.blocks = nn.ModuleList()
        before = inner[0]
        for stage, (count, width) in enumerate(zip(layers, inner, strict=True)):
            for index in range(count):
                stride = 2 if stage and not index else 1
                self.blocks.append(Block(block, before, width, stride, norm_groups))
                before = width * _EXPANSION[block]
        self.head = nn.Linear(before, num_classes)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """inputs [B,...] float, in_channels x height x width numbers each -> logits [B,num_classes]."""
        x = batch["inputs"].reshape(-1, *self.image_shape).to(self.head.weight.dtype)
        x = F.relu(self.stem(x))
        if self.large_stem:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits

    def flops_per_sample(self) -> float:
        """Forward and backward: 6 x the multiply-adds of convolutions and the head."""
        size = self.image_shape[1:]
        total, size = _multiply_adds(self.stem, size)
        size = _halved(size) if self.large_stem else size
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.shortcut is not None:
                total += _multiply_adds(block.shortcut, size)[0]
            for convolution in block.convolutions:
                assert isinstance(convolution, Convolution)
                more, size = _multiply_adds(convolution, size)
                total += more
        return 6.0 * (total + matrix_size(self))


def _halved(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-side // 2) for side in size)


def _multiply_adds(module: Convolution, size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Of a convolution of an image of `size` (height, width), and the size of what it gives."""
    convolution = module.convolution
    height, width = _halved(size) if convolution.stride[0] == 2 else tuple(size)
    kernel = convolution.kernel_size[0] * convolution.kernel_size[1]
    return kernel * convolution.in_channels * convolution.out_channels * height * width, (height, width)


def _check(layers: Sequence[int], channels: Sequence[int], norm_groups: int) -> None:
    problems = []
    if not layers or min(layers) < 1:
        problems.append(f"model.layers={list(layers)}: every stage has at least one block.")
    if len(channels) != len(layers):
        problems.append(
            f"model.channels={list(channels)} is for {len(channels)} stages, model.layers={list(layers)} for"
            f" {len(layers)}; give one number for each stage, or null."
        )
    if norm_groups < 1 or any(width % norm_groups for width in channels):
        problems.append(
            f"model.norm_groups={norm_groups} does not divide the channels of every stage, {list(channels)};"
            " choose a divisor of all."
        )
    if problems:
        raise ConfigError(*problems)
