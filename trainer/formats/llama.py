"""Llama (Touvron et al. 2023): `Decoder` with scaled rotary positions or without.

What it shares with its relatives: `common_config`, `common_tensors` and `common_arguments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.formats import Format, Tensor, unlike
from trainer.models.rotary import SCALINGS

MODEL_TYPES = ("llama",)

COMMON = {"positions": "rotary", "norm": "rms", "activation": "swiglu"}
"""What makes a decoder one of this family, to which others add biases or norms of heads."""

_LLAMA = {**COMMON, "bias": "none", "qk_norm": False}

IGNORED = (r"rotary_emb\.inv_freq$",)


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """See `trainer.formats`."""
    return unlike(given, _LLAMA, "Llama")


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`."""
    config = {"model_type": "llama", **common_config(given), "attention_bias": False, "mlp_bias": False}
    return Format(
        "LlamaForCausalLM",
        config,
        list(common_tensors(given)),
        prefix="model.",
        twins=common_twins(given),
        ignored=IGNORED,
    )


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `trainer.formats`."""
    refuse([f"{key}=true" for key in ("attention_bias", "mlp_bias") if config.get(key)])
    return common_arguments(config)


def head_dim(given: Mapping[str, Any]) -> int:
    """Of the arguments of a `Decoder`."""
    size: int = given["head_dim"] or given["d_model"] // given["num_heads"]
    return size


def common_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that all of the family have."""
    rope = {"rope_type": "default", "rope_theta": given["rotary_base"], **(given["rotary_scaling"] or {})}
    as_before = {"rope_scaling": rope} if given["rotary_scaling"] else {}  # as readers before transformers 5 call it
    return {
        "vocab_size": given["vocab_size"],
        "hidden_size": given["d_model"],
        "intermediate_size": given["d_ff"],
        "num_hidden_layers": given["num_layers"],
        "num_attention_heads": given["num_heads"],
        "num_key_value_heads": given["num_kv_heads"] or given["num_heads"],
        "head_dim": head_dim(given),
        "hidden_act": "silu",
        "max_position_embeddings": given["max_positions"],
        "rms_norm_eps": given["norm_eps"],
        "rope_theta": given["rotary_base"],
        "rope_parameters": rope,
        **as_before,
        "attention_dropout": given["attention_dropout"],
        "tie_word_embeddings": given["tie_embeddings"],
        "initializer_range": given["init_std"],
    }


def common_tensors(given: Mapping[str, Any]) -> Iterator[Tensor]:
    """Of all layers, with biases of queries, keys and values and norms of heads where there are some."""
    queries = given["num_heads"] * head_dim(given)
    keys = (given["num_kv_heads"] or given["num_heads"]) * head_dim(given)
    yield Tensor("model.embed_tokens.weight", "embedding.weight")
    for index in range(given["num_layers"]):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        yield Tensor(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        for kind in ("weight", "bias") if given["bias"] == "qkv" else ("weight",):
            qkv = f"{ours}.attention.qkv.{kind}"
            yield Tensor(f"{theirs}.self_attn.q_proj.{kind}", qkv, 0, queries)
            yield Tensor(f"{theirs}.self_attn.k_proj.{kind}", qkv, queries, queries + keys)
            yield Tensor(f"{theirs}.self_attn.v_proj.{kind}", qkv, queries + keys)
        if given["qk_norm"]:
            for name in ("q_norm", "k_norm"):
                yield Tensor(f"{theirs}.self_attn.{name}.weight", f"{ours}.attention.{name}.weight")
        yield Tensor(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight")
        yield Tensor(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight")
        for name, own in (("gate_proj", "gate"), ("up_proj", "w_in"), ("down_proj", "w_out")):
            yield Tensor(f"{theirs}.mlp.{name}.weight", f"{ours}.feed_forward.{own}.weight")
    yield Tensor("model.norm.weight", "norm.weight")
    if not given["tie_embeddings"]:
        yield Tensor("lm_head.weight", "head.weight")


def common_twins(given: Mapping[str, Any]) -> dict[str, str]:
    """The head of a model whose token vectors are the head."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if given["tie_embeddings"] else {}


def common_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of our Decoder, for what all of the family have. Raises ConfigError for what our Decoder has not."""
    others = [] if config.get("hidden_act", "silu") == "silu" else [f"hidden_act={config['hidden_act']}"]
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        others.append("use_sliding_window=true")
    refuse(others)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
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
        "positions": "rotary",
        "rotary_scaling": _scaling(rope, config),
        "norm": "rms",
        "activation": "swiglu",
        "bias": "none",
        "qk_norm": False,
    }


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The argument `rotary_scaling` for their `rope_parameters`, in any of the spellings that files have."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        refuse(["partial_rotary_factor"])
    if kind == "default":
        return None
    if kind not in SCALINGS:
        refuse([f"rope_type={kind} (it has {', '.join(SCALINGS)})"])
    spelling = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in spelling and value is not None}
    if kind != "linear":
        trained_for = config.get("original_max_position_embeddings", config.get("max_position_embeddings", 2048))
        scaling.setdefault("original_max_position_embeddings", trained_for)
    if scaling.get("truncate") is True:
        del scaling["truncate"]
    refuse(
        [f"rope_parameters.{key}={scaling[key]}" for key in ("mscale", "mscale_all_dim", "truncate") if key in scaling]
    )
    return {"rope_type": kind, **scaling}


def refuse(others: list[str]) -> None:
    """Raise ConfigError if there are any: options of a config.json that our Decoder does not have."""
    if others:
        raise ConfigError(f"config.json: our Decoder has no {', '.join(others)}; train it with model=hf.")
