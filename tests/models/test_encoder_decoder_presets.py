"""The sizes that configs/model/ has names for have as many parameters as transformers' models of the published
configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.build import build
from trainer.composition import compose
from trainer.formats.catalogue import format_of

transformers = pytest.importorskip("transformers")


def t5(d_model: int, d_ff: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    shape = {"d_model": d_model, "d_ff": d_ff, "d_kv": 64, "num_layers": layers, "num_heads": heads}
    return {"model_type": "t5", "vocab_size": 32128, **shape, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False, **more}  # fmt: skip


def bart(kind: str, vocab_size: int, d_model: int, d_ff: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder")
             for key, value in (("layers", layers), ("ffn_dim", d_ff), ("attention_heads", heads))}  # fmt: skip
    return {"model_type": kind, "vocab_size": vocab_size, "d_model": d_model, **sides, "pad_token_id": 0, **more}


PUBLISHED = {
    "t5_small": t5(512, 2048, 6, 8, feed_forward_proj="relu", tie_word_embeddings=True),
    "t5_v1_1_small": t5(512, 1024, 8, 6),
    "t5_v1_1_base": t5(768, 2048, 12, 12),
    "t5": t5(768, 2048, 12, 12),
    "t5_v1_1_large": t5(1024, 2816, 24, 16),
    "t5_v1_1_3b": t5(2048, 5120, 24, 32),
    "t5_v1_1_11b": t5(4096, 10240, 24, 64),
    "bart_base": bart("bart", 50265, 768, 3072, 6, 12),
    "bart_large": bart("bart", 50265, 1024, 4096, 12, 16),
    "mbart_large": bart("mbart", 250027, 1024, 4096, 12, 16, scale_embedding=True),
    "marian": bart("marian", 58101, 512, 2048, 6, 8, activation_function="swish", scale_embedding=True,
                   max_position_embeddings=512),
    "pegasus_large": bart("pegasus", 96103, 1024, 4096, 16, 16, activation_function="relu", scale_embedding=True),
}  # fmt: skip


def ours(preset: str, vocab_size: int) -> tuple[dict[str, Any], int]:
    """The model's part of the configuration, and how many parameters it has."""
    words = [f"model={preset}", f"tokenizer.vocab_size={vocab_size}", "name=x", "steps=1", "batch.global_size=1"]
    part = {**compose(words)["model"], "vocab_size": vocab_size}
    with torch.device("meta"):
        model = build(part, "model")
    return part, sum(parameter.numel() for parameter in model.parameters())


def of_theirs(config: dict[str, Any]) -> int:
    """Parameters that are trained, and the bias of the output, which transformers calls a buffer.

    Without the two rows of each learned table of positions that no position uses. (transformers ties the head of T5
    whatever the configuration says, until it loads one that is another.)
    """
    given = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(given)
        if config.get("tie_word_embeddings") is False:
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if config["model_type"] in ("bart", "mbart"):
        count -= 2 * 2 * config["d_model"]
    return count + (model.final_logits_bias.numel() if hasattr(model, "final_logits_bias") else 0)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_parameters_of_the_published_model(preset: str) -> None:
    config = PUBLISHED[preset]
    part, count = ours(preset, config["vocab_size"])
    assert count == of_theirs(config)
    described = format_of(part, None).config
    differing = {key: described.get(key) for key, value in config.items() if described.get(key, value) != value}
    differing.pop("pad_token_id", None)
    assert not differing or differing == {"activation_function": "silu"}, differing  # theirs is called swish


@pytest.mark.parametrize(
    ("preset", "millions"), [("transformer_tiny", 5.7), ("transformer_base", 63.1), ("transformer_big", 214.2)]
)
def test_the_sizes_of_the_first_transformer(preset: str, millions: float) -> None:
    """Vaswani et al. 2017, table 3, at 37,000 entries of the vocabulary: 65 and 213 million, rounded."""
    assert round(ours(preset, 37_000)[1] / 1e6, 1) == millions
