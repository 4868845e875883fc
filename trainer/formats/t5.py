"""T5 (Raffel et al. 2020) and mT5 (Xue et al. 2021), which has its shape.

T5 v1.1 has a gated feed-forward and a head of its own, T5 ReLU and a tied one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.formats import Format, Tensor

MODEL_TYPES = ("t5", "mt5")

_T5 = {
    "positions": "relative",
    "norm": "rms",
    "norm_position": "pre",
    "bias": False,
    "head_bias": False,
    "scale_attention": False,
    "scale_embeddings": False,
    "scale_tied_head": True,
    "embedding_norm": False,
}
"""What makes an encoder-decoder a T5."""

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "geglu": "gated-gelu", "swiglu": "gated-silu"}
"""Ours: theirs."""


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """See `trainer.formats`."""
    return [f"model.{key}={given[key]} (T5: {value})" for key, value in _T5.items() if given[key] != value]


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`."""
    inner = given["num_heads"] * (given["d_kv"] or given["d_model"] // given["num_heads"])
    config = {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": given["vocab_size"],
        "d_model": given["d_model"],
        "d_kv": inner // given["num_heads"],
        "d_ff": given["d_ff"],
        "num_layers": given["encoder_layers"],
        "num_decoder_layers": given["decoder_layers"],
        "num_heads": given["num_heads"],
        "relative_attention_num_buckets": given["relative_buckets"],
        "relative_attention_max_distance": given["relative_max_distance"],
        "dropout_rate": given["dropout"],
        "layer_norm_epsilon": given["norm_eps"],
        "feed_forward_proj": _ACTIVATIONS[given["activation"]],
        "tie_word_embeddings": given["tie_embeddings"],
        "scale_decoder_outputs": given["tie_embeddings"],
    }

    def attention(theirs: str, ours: str, cross: bool) -> Iterator[Tensor]:
        queries, rest = (f"{ours}.q.weight", f"{ours}.kv.weight") if cross else (f"{ours}.qkv.weight",) * 2
        first = 0 if cross else inner
        yield Tensor(f"{theirs}.q.weight", queries, 0, inner)
        yield Tensor(f"{theirs}.k.weight", rest, first, first + inner)
        yield Tensor(f"{theirs}.v.weight", rest, first + inner)
        yield Tensor(f"{theirs}.o.weight", f"{ours}.out.weight")

    def stack(side: str, layers: int) -> Iterator[Tensor]:
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Tensor(bias, f"{side}_positions.table.weight")
        for index in range(layers):
            ours, theirs = f"{side}.{index}", f"{side}.block.{index}.layer"
            yield Tensor(f"{theirs}.0.layer_norm.weight", f"{ours}.self_norm.weight")
            yield from attention(f"{theirs}.0.SelfAttention", f"{ours}.self_attention", cross=False)
            if side == "decoder":
                yield Tensor(f"{theirs}.1.layer_norm.weight", f"{ours}.cross_norm.weight")
                yield from attention(f"{theirs}.1.EncDecAttention", f"{ours}.cross_attention", cross=True)
            last = f"{theirs}.{2 if side == 'decoder' else 1}"
            yield Tensor(f"{last}.layer_norm.weight", f"{ours}.feed_forward_norm.weight")
            gated = given["activation"] in ("geglu", "swiglu")
            names = {"wi_0": "gate", "wi_1": "w_in", "wo": "w_out"} if gated else {"wi": "w_in", "wo": "w_out"}
            for name, own in names.items():
                yield Tensor(f"{last}.DenseReluDense.{name}.weight", f"{ours}.feed_forward.{own}.weight")
        yield Tensor(f"{side}.final_layer_norm.weight", f"{side}_norm.weight")

    def tensors() -> Iterator[Tensor]:
        yield Tensor("shared.weight", "embedding.weight")
        yield from stack("encoder", given["encoder_layers"])
        yield from stack("decoder", given["decoder_layers"])
        if not given["tie_embeddings"]:
            yield Tensor("lm_head.weight", "head.weight")

    twins = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}
    if given["tie_embeddings"]:
        twins["lm_head.weight"] = "shared.weight"
    else:  # one table in both places, as transformers 5 makes it: then it is saved once
        twins["shared.weight"] = "lm_head.weight"
    unused = r"EncDecAttention\.relative_attention_bias\.weight$"  # which the first T5 have saved
    return Format("T5ForConditionalGeneration", config, list(tensors()), twins=twins, ignored=[unused])


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `trainer.formats`."""
    multilingual = config["model_type"] == "mt5"
    activations = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    activation = activations.get(config.get("feed_forward_proj", "gated-gelu" if multilingual else "relu"))
    if activation is None:
        raise ConfigError(
            f"config.json: our EncoderDecoder has no feed_forward_proj={config['feed_forward_proj']}; it has"
            f" {', '.join(activations)}. Train it with model=hf."
        )
    dropout = config.get("dropout_rate", 0.1)
    return {
        "_target_": "trainer.models.encoder_decoder.EncoderDecoder",
        "vocab_size": config["vocab_size"],
        "d_model": config["d_model"],
        "num_heads": config["num_heads"],
        "d_ff": config["d_ff"],
        "encoder_layers": config["num_layers"],
        "decoder_layers": config.get("num_decoder_layers") or config["num_layers"],
        "d_kv": config["d_kv"],
        "dropout": dropout,
        "attention_dropout": dropout,
        "activation_dropout": dropout,
        "activation": activation,
        "relative_buckets": config.get("relative_attention_num_buckets", 32),
        "relative_max_distance": config.get("relative_attention_max_distance", 128),
        "norm_eps": config.get("layer_norm_epsilon", 1e-6),
        # transformers 5 writes tie_word_embeddings=true for all, and scales where the head is tied indeed; mT5 is never
        "tie_embeddings": not multilingual
        and config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
        "max_positions": None,
        **_T5,
    }
