"""ViT (Dosovitskiy et al. 2021): `ViT` in any shape, as an image classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.formats import Format, Tensor

MODEL_TYPES = ("vit",)


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """None: see `trainer.formats`."""
    return []


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`. Classes have no names; a new head may begin anew."""
    height, width = given["image_size"]
    names = [f"LABEL_{index}" for index in range(given["num_classes"])]
    config = {
        "model_type": "vit",
        "image_size": height if height == width else [height, width],
        "patch_size": given["patch_size"],
        "num_channels": given["in_channels"],
        "hidden_size": given["d_model"],
        "intermediate_size": given["d_ff"],
        "num_hidden_layers": given["num_layers"],
        "num_attention_heads": given["num_heads"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": given["dropout"],
        "attention_probs_dropout_prob": given["attention_dropout"],
        "layer_norm_eps": given["norm_eps"],
        "initializer_range": given["init_std"],
        "qkv_bias": True,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    size = given["d_model"]

    def both(theirs: str, ours: str, begin: int = 0, end: int | None = None) -> Iterator[Tensor]:
        for leaf in ("weight", "bias"):
            yield Tensor(f"{theirs}.{leaf}", f"{ours}.{leaf}", begin, end)

    def tensors() -> Iterator[Tensor]:
        yield from both("vit.embeddings.patch_embeddings.projection", "patches")
        yield Tensor("vit.embeddings.cls_token", "class_token.weight", as_row=True)
        yield Tensor("vit.embeddings.position_embeddings", "positions.weight", as_row=True)
        for index in range(given["num_layers"]):
            ours, theirs = f"layers.{index}", f"vit.encoder.layer.{index}"
            yield from both(f"{theirs}.layernorm_before", f"{ours}.attention_norm")
            for place, name in enumerate(("query", "key", "value")):
                own = f"{ours}.attention.qkv"
                yield from both(f"{theirs}.attention.attention.{name}", own, place * size, (place + 1) * size)
            yield from both(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
            yield from both(f"{theirs}.layernorm_after", f"{ours}.feed_forward_norm")
            yield from both(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.w_in")
            yield from both(f"{theirs}.output.dense", f"{ours}.feed_forward.w_out")
        yield from both("vit.layernorm", "norm")
        yield from both("classifier", "head")

    return Format(
        "ViTForImageClassification",
        config,
        list(tensors()),
        prefix="vit.",
        ignored=[r"^(vit\.)?pooler\."],
        fresh=["head.weight", "head.bias"],
    )


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `trainer.formats`."""
    others = [] if config.get("qkv_bias", True) else ["qkv_bias=false"]
    if config.get("hidden_act", "gelu") != "gelu":
        others.append(f"hidden_act={config['hidden_act']}")
    image_size, patch_size = (_pair(config.get(key, usual)) for key, usual in (("image_size", 224), ("patch_size", 16)))
    if patch_size[0] != patch_size[1]:
        others.append(f"patch_size={patch_size}")
    if others:
        raise ConfigError(f"config.json: our ViT has no {', '.join(others)}; train it with model=hf.")
    return {
        "_target_": "trainer.models.vit.ViT",
        "image_size": image_size,
        "num_classes": len(config.get("id2label") or ()) or 2,  # which transformers does not write
        "in_channels": config.get("num_channels", 3),
        "patch_size": patch_size[0],
        "d_model": config.get("hidden_size", 768),
        "num_heads": config.get("num_attention_heads", 12),
        "d_ff": config.get("intermediate_size", 3072),
        "num_layers": config.get("num_hidden_layers", 12),
        "dropout": config.get("hidden_dropout_prob", 0.0),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.0),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "init_std": config.get("initializer_range", 0.02),
    }


def _pair(value: Any) -> list[int]:
    """A size of a config.json as [height, width]."""
    return [value, value] if isinstance(value, int) else list(value)
