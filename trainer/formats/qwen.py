"""Qwen2 and Qwen3 (Yang et al. 2024, 2025): a Llama with biases of queries, keys and values, or with norms of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.formats import Format, unlike
from trainer.formats.llama import (
    COMMON,
    IGNORED,
    common_arguments,
    common_config,
    common_tensors,
    common_twins,
    refuse,
)

MODEL_TYPES = ("qwen2", "qwen3")

_KINDS = {
    "qwen2": {**COMMON, "bias": "qkv", "qk_norm": False},
    "qwen3": {**COMMON, "bias": "none", "qk_norm": True},
}


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """See `trainer.formats`; those of the nearer of the two."""
    return min((unlike(given, wanted, kind.capitalize()) for kind, wanted in _KINDS.items()), key=len)


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`."""
    kind = "qwen3" if given["qk_norm"] else "qwen2"
    config = {"model_type": kind, **common_config(given), "use_sliding_window": False}
    return Format(
        f"{kind.capitalize()}ForCausalLM",
        config,
        list(common_tensors(given)),
        prefix="model.",
        twins=common_twins(given),
        ignored=IGNORED,
    )


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `trainer.formats`."""
    refuse(["attention_bias=true"] if config.get("attention_bias") else [])
    return {**common_arguments(config), **_KINDS[config["model_type"]]}
