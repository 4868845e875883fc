"""What a model of ours is elsewhere: the configuration of transformers' counterpart, and the names of its tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.models.decoder import Decoder
from trainer.models.encoder_decoder import EncoderDecoder


@dataclass(frozen=True, slots=True)
class Tensor:
    """One of their tensors: rows [begin, end) of one of our parameters; end None = to its last."""

    theirs: str
    ours: str
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """architecture: the class in transformers; config: its config.json; tensors: in the order of our parameters."""

    architecture: str
    config: Mapping[str, Any]
    tensors: Sequence[Tensor]


def format_of(part: Mapping[str, Any], tokenizer: Tokenizer | None) -> Format:
    """The counterpart of the model that the configuration's `part` describes.

    Raises ConfigError where there is none, with what stands in the way.
    """
    name = part["_target_"].rpartition(".")[2]
    known = {"Decoder": (Decoder, _llama), "EncoderDecoder": (EncoderDecoder, _t5)}
    if name not in known:
        raise ConfigError(
            f"model._target_={part['_target_']} has no counterpart in transformers; those that have one are"
            f" {', '.join(known)}."
        )
    model, describe = known[name]
    given = {key: value for key, value in part.items() if key != "_target_"}
    bound = inspect.signature(model).bind(**given)
    bound.apply_defaults()
    architecture, config, tensors = describe(bound.arguments)
    return Format(
        architecture, {"architectures": [architecture], **config, **_special_tokens(tokenizer)}, list(tensors)
    )


def _special_tokens(tokenizer: Tokenizer | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {**ids, "decoder_start_token_id": tokenizer.bos_id}


Described = tuple[str, dict[str, Any], Iterator[Tensor]]


def _llama(shape: Mapping[str, Any]) -> Described:
    """Llama (Touvron et al. 2023): `Decoder` in any shape."""
    kv_heads = shape["num_kv_heads"] or shape["num_heads"]
    head_dim = shape["head_dim"] or shape["d_model"] // shape["num_heads"]
    config = {
        "model_type": "llama",
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["d_model"],
        "intermediate_size": shape["d_ff"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape["max_positions"],
        "rms_norm_eps": shape["norm_eps"],
        "rope_theta": shape["rotary_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["rotary_base"]},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": shape["attention_dropout"],
        "tie_word_embeddings": shape["tie_embeddings"],
        "initializer_range": shape["init_std"],
    }
    queries, keys = shape["num_heads"] * head_dim, kv_heads * head_dim

    def tensors() -> Iterator[Tensor]:
        yield Tensor("model.embed_tokens.weight", "embedding.weight")
        for index in range(shape["num_layers"]):
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
        if not shape["tie_embeddings"]:
            yield Tensor("lm_head.weight", "head.weight")

    return "LlamaForCausalLM", config, tensors()


_T5 = {
    "positions": "relative",
    "norm": "rms",
    "norm_position": "pre",
    "bias": False,
    "head_bias": False,
    "scale_attention": False,
    "scale_embeddings": False,
}
"""What makes an encoder-decoder a T5."""


def _t5(shape: Mapping[str, Any]) -> Described:
    """T5 (Raffel et al. 2020): v1.1 has a gated feed-forward and a head of its own, T5 ReLU and a tied one.

    Raises ConfigError naming the options that T5 has otherwise.
    """
    others = [f"model.{key}={shape[key]} (T5: {value})" for key, value in _T5.items() if shape[key] != value]
    if shape["activation"] not in ("relu", "geglu"):
        others.append(f"model.activation={shape['activation']} (T5: relu or geglu)")
    if others:
        raise ConfigError(
            f"This encoder-decoder has no counterpart in transformers, of which T5 is the nearest: {', '.join(others)}."
        )
    inner = shape["num_heads"] * (shape["d_kv"] or shape["d_model"] // shape["num_heads"])
    config = {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": shape["vocab_size"],
        "d_model": shape["d_model"],
        "d_kv": inner // shape["num_heads"],
        "d_ff": shape["d_ff"],
        "num_layers": shape["encoder_layers"],
        "num_decoder_layers": shape["decoder_layers"],
        "num_heads": shape["num_heads"],
        "relative_attention_num_buckets": shape["relative_buckets"],
        "relative_attention_max_distance": shape["relative_max_distance"],
        "dropout_rate": shape["dropout"],
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu" if shape["activation"] == "geglu" else "relu",
        "tie_word_embeddings": shape["tie_embeddings"],
        "scale_decoder_outputs": shape["tie_embeddings"],
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
            gated = shape["activation"] == "geglu"
            names = {"wi_0": "gate", "wi_1": "w_in", "wo": "w_out"} if gated else {"wi": "w_in", "wo": "w_out"}
            for name, own in names.items():
                yield Tensor(f"{last}.DenseReluDense.{name}.weight", f"{ours}.feed_forward.{own}.weight")
        yield Tensor(f"{side}.final_layer_norm.weight", f"{side}_norm.weight")

    def tensors() -> Iterator[Tensor]:
        yield Tensor("shared.weight", "embedding.weight")
        yield from stack("encoder", shape["encoder_layers"])
        yield from stack("decoder", shape["decoder_layers"])
        if not shape["tie_embeddings"]:
            yield Tensor("lm_head.weight", "head.weight")

    return "T5ForConditionalGeneration", config, tensors()
