"""The presets of public decoders: what config.json says of them, and transformers' own number of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from trainer.build import build  # noqa: E402
from trainer.composition import compose, config_directory  # noqa: E402
from trainer.config import to_config  # noqa: E402
from trainer.formats.catalogue import format_of, part_of  # noqa: E402


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, factor: float, tied: bool
) -> dict[str, Any]:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        **_common("llama", 128_256, hidden, inner, layers, heads, kv_heads, tied),
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {**scaling, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }


def _common(
    kind: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


def _qwen(*shape: Any, **more: Any) -> dict[str, Any]:
    return {**_common(*shape), "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, **more}


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


QWEN2 = {"max_position_embeddings": 131_072, "use_sliding_window": False}
QWEN3 = {"max_position_embeddings": 40_960, "head_dim": 128, "attention_bias": False}

PUBLIC: dict[str, dict[str, Any]] = {
    "llama2_7b": {
        **_common("llama", 32_000, 4096, 11_008, 32, 32, 32, False),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "llama32_1b": _llama(2048, 8192, 16, 32, 8, 32.0, True),
    "llama32_3b": _llama(3072, 8192, 28, 24, 8, 32.0, True),
    "llama31_8b": _llama(4096, 14_336, 32, 32, 8, 8.0, False),
    "llama31_70b": _llama(8192, 28_672, 80, 64, 8, 8.0, False),
    "llama31_405b": _llama(16_384, 53_248, 126, 128, 8, 8.0, False),
    "qwen2_05b": _qwen("qwen2", 151_936, 896, 4864, 24, 14, 2, True, **QWEN2),
    "qwen2_7b": _qwen("qwen2", 152_064, 3584, 18_944, 28, 28, 4, False, **QWEN2),
    "qwen3_06b": _qwen("qwen3", 151_936, 1024, 3072, 28, 16, 8, True, **QWEN3),
    "qwen3_8b": _qwen("qwen3", 151_936, 4096, 12_288, 36, 32, 8, False, **QWEN3),
    "qwen3_32b": _qwen("qwen3", 151_936, 5120, 25_600, 64, 64, 8, False, **QWEN3),
    "gpt2_124m": _gpt2(768, 12, 12),
    "gpt2_1558m": _gpt2(1600, 48, 25),
}
"""The numbers of each config.json that say what the model is."""


def part_named(preset: str) -> dict[str, Any]:
    words = ["name=x", "steps=1", "batch.global_size=1", "task=causal_lm", "tokenizer.vocab_size=512"]
    return to_config(compose([*words, f"model={preset}"])).model


@pytest.mark.parametrize("preset", PUBLIC)
def test_a_public_shape_is_that_of_its_config_and_has_transformers_own_number_of_parameters(preset):
    part = part_named(preset)
    kind = PUBLIC[preset]["model_type"]
    numbers = {key: value for key, value in PUBLIC[preset].items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(kind, **numbers)
    assert format_of(part, None).config == format_of(part_of(config.to_dict()), None).config
    with torch.device("meta"):
        ours = build(part, "model")
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    first_line = (config_directory() / "model" / f"{preset}.yaml").read_text().splitlines()[0]
    assert f" {count:,} parameters" in first_line


def test_the_smallest_goes_with_any_tokenizer():
    part = part_named("llama_tiny")
    layers = build(part, "model").layers
    assert part["vocab_size"] == 512 and sum(parameter.numel() for parameter in layers.parameters()) < 120_000
