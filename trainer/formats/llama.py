"""Llama (Touvron et al. 2023): `Decoder` in any shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.formats import Format, Tensor

MODEL_TYPES = ("llama",)


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """None: see `trainer.formats`."""
    return []


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`."""
    kv_heads = given["num_kv_heads"] or given["num_heads"]
    head_dim = given["head_dim"] or given["d_model"] // given["num_heads"]
    config = {
        "model_type": "llama",
        "vocab_size": given["vocab_size"],
        "hidden_size": given["d_model"],
        "intermediate_size": given["d_ff"],
        "num_hidden_layers": given["num_layers"],
        "num_attention_heads": given["num_heads"],
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": given["max_positions"],
        "rms_norm_eps": given["norm_eps"],
        "rope_theta": given["rotary_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": given["rotary_base"]},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": given["attention_dropout"],
        "tie_word_embeddings": given["tie_embeddings"],
        "initializer_range": given["init_std"],
    }
    queries, keys = given["num_heads"] * head_dim, kv_heads * head_dim

    def tensors() -> Iterator[Tensor]:
        yield Tensor("model.embed_tokens.weight", "embedding.weight")
        for index in range(given["num_layers"]):
            ours, theirs = f"layers.{index}", f"model.layers.{index}"
            yield Tensor(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
            qkv = f"{ours}.attention.qkv.weight"
            yield Tensor(f"{theirs}.self_attn.q_proj.weight", qkv, 0, queries)
            yield Tensor(f"{theirs}.self_attn.k_proj.weight", qkv, queries, queries + keys)
            yield Tensor(f"{theirs}.self_attn.v_proj.weight", qkv, queries + keys)
            yield Tensor(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight")
            yield Tensor(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight")
            for name, own in (("gate_proj", "gate"), ("up_proj", "w_in"), ("down_proj", "w_out")):
                yield Tensor(f"{theirs}.mlp.{name}.weight", f"{ours}.feed_forward.{own}.weight")
        yield Tensor("model.norm.weight", "norm.weight")
        if not given["tie_embeddings"]:
            yield Tensor("lm_head.weight", "head.weight")

    twins = {"lm_head.weight": "model.embed_tokens.weight"} if given["tie_embeddings"] else {}
    return Format(
        "LlamaForCausalLM", config, list(tensors()), prefix="model.", twins=twins, ignored=[r"rotary_emb\.inv_freq$"]
    )


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `trainer.formats`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    others = [f"{key}=true" for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if kind != "default":
        others.append(f"rope_parameters.rope_type={kind}")
    if config.get("hidden_act", "silu") != "silu":
        others.append(f"hidden_act={config['hidden_act']}")
    if others:
        raise ConfigError(f"config.json: our Decoder has no {', '.join(others)}; train it with model=hf.")
    return {
        "_target_": "trainer.models.decoder.Decoder",
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "d_ff": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "head_dim": config.get("head_dim"),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "rotary_base": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "init_std": config.get("initializer_range", 0.02),
        "max_positions": config.get("max_position_embeddings", 2048),
    }
