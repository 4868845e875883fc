"""The Vision Transformer; that it is transformers' is shown in tests/formats/test_vit.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.errors import ConfigError
from trainer.models.vit import ViT


def vit(**options):
    small = {"image_size": (8, 12), "num_classes": 3, "in_channels": 1, "patch_size": 4}
    model = ViT(**{**small, "d_model": 16, "num_heads": 2, "d_ff": 24, "num_layers": 2, **options})
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_flat_or_square_give_the_same_logits(dtype):
    model, images = vit().to(dtype).eval(), torch.rand(3, 1, 8, 12)
    logits = model({"inputs": images})
    assert logits.shape == (3, 3) and logits.dtype == dtype
    torch.testing.assert_close(model({"inputs": images.flatten(1)}), logits)


def test_patches_are_a_convolution_of_their_size():
    patches, images = vit(in_channels=3).patches, torch.rand(2, 3, 8, 12)
    torch.nn.init.normal_(patches.bias)
    expected = torch.nn.functional.conv2d(images, patches.weight, patches.bias, stride=4)
    torch.testing.assert_close(patches(images), expected.flatten(2).transpose(1, 2))


def test_dropout_is_for_training_alone():
    model, batch = vit(dropout=0.5), {"inputs": torch.rand(3, 1, 8, 12)}
    assert not torch.equal(model.train()(batch), model(batch))
    assert torch.equal(model.eval()(batch), model(batch))


def test_flops_are_those_of_pytorch():
    model = vit()
    with FlopCounterMode(display=False) as counter:
        model({"inputs": torch.rand(2, 1, 8, 12)})
    attention = 2 * 2 * 16 * 7**2 * 2  # layers x (scores and sums) x d_model x positions^2, multiply and add
    counted = counter.get_total_flops() / 2
    assert model.flops_per_sample() in (3 * counted, 3 * (counted + attention))  # fused kernels may go uncounted


def test_initial_weights():
    model = vit(d_model=64, init_std=0.05)
    layer = model.layers[0]
    for weight in (model.patches.weight, model.positions.weight, model.class_token.weight, layer.attention.qkv.weight):
        assert math.isclose(weight.std().item(), 0.05, rel_tol=0.2)
    assert math.isclose(layer.feed_forward.w_out.weight.std().item(), 0.05, rel_tol=0.05)
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 1 + 2 * 6 + 2 and not any(map(torch.count_nonzero, biases))
    assert (model.norm.weight == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (8, 9)}, r"model\.image_size=\[8, 9\] does not divide into patches of model\.patch_size=4"),
        ({"num_heads": 3}, r"model\.d_model=16 does not divide by model\.num_heads=3"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        vit(**options)
