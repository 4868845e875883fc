"""Residual networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.build import build
from trainer.composition import compose
from trainer.config import to_config
from trainer.errors import ConfigError
from trainer.models.resnet import ResNet


def resnet(**options):
    small = {"image_size": (8, 8), "num_classes": 3, "layers": [1, 1], "channels": [4, 8], "norm_groups": 2}
    model = ResNet(**{**small, "in_channels": 1, "stem": "small", **options})
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("stem", ["small", "large"])
@pytest.mark.parametrize("size", [(8, 8), (9, 5)])
def test_images_of_any_size_give_logits_and_flops_are_those_of_pytorch(block, stem, size):
    model = resnet(block=block, stem=stem, image_size=size)
    with FlopCounterMode(display=False) as counter:
        logits = model({"inputs": torch.rand(2, 1, *size)})
    assert logits.shape == (2, 3)
    assert model.flops_per_sample() == 3 * counter.get_total_flops() / 2


def test_flat_images_in_bf16():
    model, images = resnet().bfloat16(), torch.rand(2, 1, 8, 8)
    logits = model({"inputs": images.flatten(1)})
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, model({"inputs": images}))


def test_an_image_counts_the_same_whatever_it_shares_a_batch_with():
    model, images = resnet(), torch.randn(6, 1, 8, 8)
    whole = model.train()({"inputs": images})
    torch.testing.assert_close(torch.cat([model({"inputs": part}) for part in images.split(2)]), whole)


def test_it_learns_to_tell_horizontal_from_vertical_lines():
    model = resnet(num_classes=2)
    images = torch.zeros(16, 1, 8, 8)
    for index in range(8):
        images[index, 0, index], images[8 + index, 0, :, index] = 1, 1
    labels = torch.arange(16) // 8
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model({"inputs": images}), labels).backward()
        optimizer.step()
    assert torch.equal(model({"inputs": images}).argmax(1), labels)


def test_initial_weights():
    model = resnet(channels=[32, 64], in_channels=3)
    inner = model.blocks[1].convolutions[1]
    assert math.isclose(inner.convolution.weight.std().item(), math.sqrt(2 / (64 * 9)), rel_tol=0.03)
    assert (inner.norm.weight == 1).all() and (inner.norm.bias == 0).all()
    assert (model.head.bias == 0).all()


@pytest.mark.parametrize(("preset", "count"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_presets_have_the_parameters_of_the_paper_s_networks(preset, count):
    words = [f"model={preset}", "task=image_classification", "tokenizer=none", "data=digits", "task.num_classes=1000"]
    with torch.device("meta"):
        model = build(to_config(compose([*words, "name=x", "steps=1", "batch.global_size=1"])).model, "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == count  # as torchvision has them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, r"model\.layers=\[\]"),
        ({"layers": [1, 0]}, r"model\.layers=\[1, 0\]"),
        ({"channels": [4]}, r"model\.channels=\[4\] is for 1 stages"),
        ({"norm_groups": 3}, r"model\.norm_groups=3 does not divide"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        resnet(**options)
