"""ViT's logits, on random shapes and weights, both ways; and a checkpoint without a head."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from tests.formats.parity import both_ways, ours_of, scattered, theirs_of  # noqa: E402
from trainer.build import build  # noqa: E402
from trainer.composition import compose  # noqa: E402
from trainer.config import to_config  # noqa: E402
from trainer.errors import CheckpointError, ConfigError  # noqa: E402
from trainer.export.compare import compare  # noqa: E402
from trainer.formats.catalogue import format_of, part_of  # noqa: E402
from trainer.pretrained import open_weights  # noqa: E402

SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


def images(channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


@settings(max_examples=8)
@given(
    patch=st.integers(1, 5),
    tiles=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.sampled_from([1, 3]),
    heads=st.sampled_from([1, 2, 3]),
    d_ff=st.integers(1, 50),
    layers=st.integers(1, 3),
    classes=st.integers(2, 7),
)
def test_logits(patch, tiles, channels, heads, d_ff, layers, classes):
    height, width = patch * tiles[0], patch * tiles[1]
    config = transformers.ViTConfig(
        hidden_size=12 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=d_ff,
        image_size=height if height == width else [height, width],
        patch_size=patch,
        num_channels=channels,
        num_labels=classes,
    )
    pixels = images(channels, height, width)
    theirs = scattered(transformers.ViTForImageClassification(config))
    both_ways(theirs, {"inputs": pixels}, {"pixel_values": pixels})


def test_a_checkpoint_of_the_bare_model_gets_a_new_head(tmp_path):
    theirs = scattered(transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)))
    theirs.save_pretrained(tmp_path)
    part = {**part_of(json.loads((tmp_path / "config.json").read_text())), "num_classes": 5}
    model = build(part, "model")
    weights = open_weights(f"hf:{tmp_path}", "runs", part, {name: p.shape for name, p in model.named_parameters()})
    assert [name for name, _ in model.named_parameters() if weights.values(name) is None] == [
        "head.weight",
        "head.bias",
    ]
    assert torch.equal(weights.values("positions.weight"), theirs.embeddings.position_embeddings.detach().flatten())


def test_an_export_is_compared_on_images(tmp_path):
    theirs = scattered(
        transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))
    )
    ours = ours_of(theirs, tmp_path / "theirs")
    theirs_of(ours, tmp_path / "ours")
    form = format_of(ours.part, None)
    assert compare(ours, form, tmp_path / "ours", torch.float32) < 1e-5
    ours.head.bias.data += 1
    with pytest.raises(CheckpointError, match="the logits of ViTForImageClassification differ"):
        compare(ours, form, tmp_path / "ours", torch.float32)


def test_a_head_for_other_classes_is_refused(tmp_path):
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))
    with pytest.raises(CheckpointError, match=r"classifier\.weight is \[2, 24\], not \[5, 24\]"):
        ours_of(theirs, tmp_path, num_classes=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_bias": False}, "no qkv_bias=false"),
        ({"hidden_act": "relu"}, "no hidden_act=relu"),
        ({"patch_size": [4, 8]}, r"no patch_size=\[4, 8\]"),
    ],
)
def test_what_ours_has_not_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        part_of({**transformers.ViTConfig().to_dict(), **change})


@pytest.mark.parametrize("preset", ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"])
def test_presets_have_as_many_parameters_as_theirs(preset):
    words = [f"model={preset}", "task=image_classification", "tokenizer=none", "data=digits"]
    part = to_config(compose([*words, "name=x", "steps=1", "batch.global_size=1", "task.num_classes=1000"])).model
    with torch.device("meta"):
        ours = build(part, "model")
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**format_of(part, None).config))
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    if preset == "vit_base":
        assert count == 86_567_656
