"""The convolutional classifier."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.errors import ConfigError
from trainer.models.vision import CNN


def build(**options):
    model = CNN(**{"image_size": (8, 8), "num_classes": 10, "channels": [4, 6], "hidden_size": 16, **options})
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_flat_or_square_give_the_same_logits(dtype):
    model, images = build().to(dtype).eval(), torch.rand(3, 8, 8)
    logits = model({"inputs": images})
    assert logits.shape == (3, 10) and logits.dtype == dtype
    torch.testing.assert_close(model({"inputs": images.flatten(1)}), logits)


def test_it_learns_to_tell_horizontal_from_vertical_lines():
    model = build(num_classes=2, dropout=0.0)
    images = torch.zeros(16, 8, 8)
    for index in range(8):
        images[index, index], images[8 + index, :, index] = 1, 1
    labels = torch.arange(16) // 8
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model({"inputs": images}), labels).backward()
        optimizer.step()
    assert torch.equal(model({"inputs": images}).argmax(1), labels)


def test_initial_deviations_keep_the_variance_through_relus():
    model = build(channels=[32, 64])
    assert math.isclose(model.convolutions[1][0].weight.std().item(), math.sqrt(2 / (32 * 9)), rel_tol=0.03)
    assert (model.convolutions[1][0].bias == 0).all()


def test_flops_count_the_pixels_of_every_convolution():
    convolutions = 9 * (1 * 4 + 4 * 4) * 64 + 9 * (4 * 6 + 6 * 6) * 16
    assert build().flops_per_sample() == 6 * (convolutions + 6 * 4 * 16 + 16 * 10)


def test_images_too_small_for_the_poolings_are_refused():
    with pytest.raises(ConfigError, match=r"image_size=\[8, 8\].*channels=\[1, 2, 3, 4\]"):
        build(channels=[1, 2, 3, 4])
