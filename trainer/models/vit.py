"""The Vision Transformer (Dosovitskiy et al. 2021): an image as a sequence of patches, read by an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.base import Model
from trainer.models.encoder_layer import EncoderLayer
from trainer.models.layers import LayerNorm, PositionEmbedding, Projection, dropout, matrix_size


class PatchEmbedding(nn.Module):
    """A linear map of every patch, which is a convolution whose stride is its size (section 3.1, equation 1)."""

    def __init__(self, in_channels: int, d_model: int, patch_size: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(d_model))
        self.patch_size = patch_size
        self.row_stds = ((d_model, std),)

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_channels, height, width] -> [B, patches, d_model], row by row from the top left."""
        batch, channels, height, width = images.shape
        side = self.patch_size
        tiles = images.view(batch, channels, height // side, side, width // side, side)
        patches = tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side**2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ViT(Model):
    """An image classifier: patches and a class token with learned positions, pre-norm layers, a linear map of the
    class token.

    image_size: (height, width), multiples of patch_size; in_channels: of the image; d_model, num_heads, d_ff,
    num_layers: the shape; dropout: of embeddings and sub-layer outputs; attention_dropout: of attention weights;
    norm_eps: of LayerNorm; init_std: of all matrices, positions and the class token.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        patch_size: int = 16,
        d_model: int = 768,
        num_heads: int = 12,
        d_ff: int = 3072,
        num_layers: int = 12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        norm_eps: float = 1e-12,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        _check(image_size, patch_size, d_model, num_heads)
        height, width = image_size
        self.image_shape = (in_channels, height, width)
        self.dropout = dropout
        self.num_positions = 1 + (height // patch_size) * (width // patch_size)
        self.patches = PatchEmbedding(in_channels, d_model, patch_size, init_std)
        self.class_token = PositionEmbedding(1, d_model, init_std)
        self.positions = PositionEmbedding(self.num_positions, d_model, init_std)
        self.layers = nn.ModuleList(
            EncoderLayer(
                d_model,
                num_heads,
                d_ff,
                pre_norm=True,
                std=init_std,
                norm_eps=norm_eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = LayerNorm(d_model, eps=norm_eps)
        self.head = Projection(d_model, [(num_classes, init_std)], bias=True)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """inputs [B,...] float, in_channels x height x width numbers each -> logits [B,num_classes]."""
        images = batch["inputs"].reshape(-1, *self.image_shape).to(self.norm.weight.dtype)
        x: Tensor = self.patches(images)
        x = torch.cat((self.class_token(0, 1).expand(len(x), -1, -1), x), dim=1)
        x = dropout(x + self.positions(0, self.num_positions), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits

    def flops_per_sample(self) -> float:
        """Forward and backward: 6 x matrix parameters x positions (Kaplan et al. 2020), attention (PaLM, app. B)."""
        channels, height, width = self.image_shape
        d_model = self.head.in_features
        scores = len(self.layers) * d_model * self.num_positions**2
        once = channels * height * width * d_model + self.head.in_features * self.head.out_features
        return 6.0 * (matrix_size(self.layers) * self.num_positions + once) + 12.0 * scores


def _check(image_size: Sequence[int], patch_size: int, d_model: int, num_heads: int) -> None:
    problems = []
    if patch_size < 1 or any(side < 1 or side % patch_size for side in image_size):
        problems.append(
            f"model.image_size={list(image_size)} does not divide into patches of model.patch_size={patch_size}; change"
            " one of them."
        )
    if d_model % num_heads:
        problems.append(f"model.d_model={d_model} does not divide by model.num_heads={num_heads}; change one of them.")
    if problems:
        raise ConfigError(*problems)
