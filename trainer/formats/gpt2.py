"""GPT-2 (Radford et al. 2019): `Decoder` with learned positions, LayerNorm, an un-gated GELU and biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.formats import Format, Tensor, unlike

MODEL_TYPES = ("gpt2",)

_GPT2 = {"positions": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": "all", "qk_norm": False}

_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Their names of GELU by tanh."""


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """See `trainer.formats`."""
    others = unlike(given, _GPT2, "GPT-2")
    for key, only in (("num_kv_heads", given["num_heads"]), ("head_dim", given["d_model"] // given["num_heads"])):
        if given[key] not in (None, only):
            others.append(f"model.{key}={given[key]} (GPT-2: {only})")
    return others


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`."""
    config = {
        "model_type": "gpt2",
        "vocab_size": given["vocab_size"],
        "n_positions": given["max_positions"],
        "n_embd": given["d_model"],
        "n_layer": given["num_layers"],
        "n_head": given["num_heads"],
        "n_inner": given["d_ff"],
        "activation_function": _TANH[0],
        "resid_pdrop": given["dropout"],
        "embd_pdrop": given["dropout"],
        "attn_pdrop": given["attention_dropout"],
        "layer_norm_epsilon": given["norm_eps"],
        "initializer_range": given["init_std"],
        "tie_word_embeddings": given["tie_embeddings"],
    }

    def layer(theirs: str, ours: str) -> Iterator[Tensor]:
        names = {
            "ln_1": "attention_norm",
            "attn.c_attn": "attention.qkv",
            "attn.c_proj": "attention.out",
            "ln_2": "feed_forward_norm",
            "mlp.c_fc": "feed_forward.w_in",
            "mlp.c_proj": "feed_forward.w_out",
        }
        for name, own in names.items():
            yield Tensor(f"{theirs}.{name}.weight", f"{ours}.{own}.weight", transposed="c_" in name)
            yield Tensor(f"{theirs}.{name}.bias", f"{ours}.{own}.bias")

    def tensors() -> Iterator[Tensor]:
        yield Tensor("transformer.wte.weight", "embedding.weight")
        yield Tensor("transformer.wpe.weight", "positions.weight")
        for index in range(given["num_layers"]):
            yield from layer(f"transformer.h.{index}", f"layers.{index}")
        for kind in ("weight", "bias"):
            yield Tensor(f"transformer.ln_f.{kind}", f"norm.{kind}")
        if not given["tie_embeddings"]:
            yield Tensor("lm_head.weight", "head.weight")

    twins = {"lm_head.weight": "transformer.wte.weight"} if given["tie_embeddings"] else {}
    masks = [r"\.attn\.bias$", r"\.attn\.masked_bias$"]
    return Format("GPT2LMHeadModel", config, list(tensors()), prefix="transformer.", twins=twins, ignored=masks)


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `trainer.formats`."""
    others = [f"{key}=true" for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention") if config.get(key)]
    if not config.get("scale_attn_weights", True):
        others.append("scale_attn_weights=false")
    if config.get("activation_function", _TANH[0]) not in _TANH:
        others.append(f"activation_function={config['activation_function']}")
    dropouts = {config.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop")}
    if len(dropouts) > 1:
        others.append("resid_pdrop and embd_pdrop that differ")
    if others:
        raise ConfigError(f"config.json: our Decoder has no {', '.join(others)}; train it with model=hf.")
    return {
        "_target_": "trainer.models.decoder.Decoder",
        "vocab_size": config["vocab_size"],
        "d_model": config["n_embd"],
        "num_heads": config["n_head"],
        "num_kv_heads": None,
        "d_ff": config.get("n_inner") or 4 * config["n_embd"],
        "num_layers": config["n_layer"],
        "head_dim": None,
        "dropout": dropouts.pop(),
        "attention_dropout": config.get("attn_pdrop", 0.1),
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "init_std": config.get("initializer_range", 0.02),
        "max_positions": config["n_positions"],
        **_GPT2,
    }
