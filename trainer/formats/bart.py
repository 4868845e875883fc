"""BART (Lewis et al. 2020) and its kin, which differ in where the norms stand and how positions are told: Marian
(Junczys-Dowmunt et al. 2018), mBART (Liu et al. 2020) and Pegasus (Zhang et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.formats import Format, Tensor

_COMMON = {"norm": "layer", "norm_eps": 1e-5, "bias": True, "tie_embeddings": True, "scale_attention": True}
"""What all of them have."""

_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BART", {"positions": "learned", "norm_position": "post", "embedding_norm": True}),
    "marian": ("Marian", {"positions": "sinusoidal_halves", "norm_position": "post", "embedding_norm": False}),
    "mbart": ("mBART", {"positions": "learned", "norm_position": "pre", "embedding_norm": True}),
    "pegasus": ("Pegasus", {"positions": "sinusoidal_halves", "norm_position": "pre", "embedding_norm": False}),
}
"""Each `model_type` with its name and what it has for itself."""

MODEL_TYPES = tuple(_KINDS)

_ARCHITECTURES = {
    "bart": "BartForConditionalGeneration",
    "marian": "MarianMTModel",
    "mbart": "MBartForConditionalGeneration",
    "pegasus": "PegasusForConditionalGeneration",
}

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu"}
"""Theirs: ours."""

_UNUSED_POSITIONS = 2
"""Rows with which a learned table of theirs begins, for padding that fairseq once gave positions to."""


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """See `trainer.formats`; those of the nearest of the family."""
    return min((_obstacles(given, kind) for kind in _KINDS), key=len)


def _obstacles(given: Mapping[str, Any], kind: str) -> list[str]:
    title, own = _KINDS[kind]
    has = {**_COMMON, **own}
    others = [f"model.{key}={given[key]} ({title}: {value})" for key, value in has.items() if given[key] != value]
    if given["activation"] not in _ACTIVATIONS.values():
        others.append(f"model.activation={given['activation']} ({title}: relu, gelu or silu)")
    if given["d_kv"] not in (None, given["d_model"] // given["num_heads"]):
        others.append(f"model.d_kv={given['d_kv']} ({title}: d_model / num_heads)")
    if given["scale_tied_head"] and not given["scale_embeddings"]:
        others.append(f"model.scale_tied_head=True ({title}: False)")
    return others


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`."""
    (kind,) = (kind for kind in _KINDS if not _obstacles(given, kind))
    config = {
        "model_type": kind,
        "is_encoder_decoder": True,
        "vocab_size": given["vocab_size"],
        "d_model": given["d_model"],
        **{f"{side}_layers": given[f"{side}_layers"] for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": given["num_heads"] for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": given["d_ff"] for side in ("encoder", "decoder")},
        "activation_function": given["activation"],
        "dropout": given["dropout"],
        "attention_dropout": given["attention_dropout"],
        "activation_dropout": given["activation_dropout"],
        "scale_embedding": given["scale_embeddings"],
        "max_position_embeddings": given["max_positions"] or 1024,
        "tie_word_embeddings": True,
        # None of the defaults of the published vocabularies; those of the run's come over them.
        **{key: None for key in ("pad_token_id", "bos_token_id", "eos_token_id", "forced_eos_token_id")},
        "decoder_start_token_id": 0,
    }
    tied = ("lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens")
    return Format(
        _ARCHITECTURES[kind],
        config,
        list(_tensors(given)),
        prefix="model.",
        twins={f"{name}.weight": "model.shared.weight" for name in tied},
        # What the sinusoidal ones compute, some have saved.
        ignored=[r"(encoder|decoder)\.version$"]
        + ([r"embed_positions\.weight$"] if given["positions"] == "sinusoidal_halves" else []),
        fresh=["embedding.head_bias"],
    )


def _tensors(given: Mapping[str, Any]) -> Iterator[Tensor]:
    size = given["d_model"]

    def whole(theirs: str, ours: str) -> Iterator[Tensor]:
        for leaf in ("weight", "bias"):
            yield Tensor(f"{theirs}.{leaf}", f"{ours}.{leaf}")

    def attention(theirs: str, ours: str, cross: bool) -> Iterator[Tensor]:
        """Theirs are three of [size, size], which lie one below the other in ours."""
        places = (
            {"q": ("q", 0), "k": ("kv", 0), "v": ("kv", 1)} if cross else {x: ("qkv", i) for i, x in enumerate("qkv")}
        )
        for name, (own, place) in places.items():
            for leaf in ("weight", "bias"):
                begin = place * size
                yield Tensor(f"{theirs}.{name}_proj.{leaf}", f"{ours}.{own}.{leaf}", begin, begin + size)
        yield from whole(f"{theirs}.out_proj", f"{ours}.out")

    yield Tensor("model.shared.weight", "embedding.weight")
    if given["head_bias"]:
        yield Tensor("final_logits_bias", "embedding.head_bias", as_row=True)
    for side in ("encoder", "decoder"):
        if given["positions"] == "learned":
            table = f"model.{side}.embed_positions.weight"
            yield Tensor(table, f"{side}_positions.weight", skip=_UNUSED_POSITIONS)
        if given["embedding_norm"]:
            yield from whole(f"model.{side}.layernorm_embedding", f"{side}_embedding_norm")
        for index in range(given[f"{side}_layers"]):
            theirs, ours = f"model.{side}.layers.{index}", f"{side}.{index}"
            yield from whole(f"{theirs}.self_attn_layer_norm", f"{ours}.self_norm")
            yield from attention(f"{theirs}.self_attn", f"{ours}.self_attention", cross=False)
            if side == "decoder":
                yield from whole(f"{theirs}.encoder_attn_layer_norm", f"{ours}.cross_norm")
                yield from attention(f"{theirs}.encoder_attn", f"{ours}.cross_attention", cross=True)
            yield from whole(f"{theirs}.final_layer_norm", f"{ours}.feed_forward_norm")
            yield from whole(f"{theirs}.fc1", f"{ours}.feed_forward.w_in")
            yield from whole(f"{theirs}.fc2", f"{ours}.feed_forward.w_out")
        if given["norm_position"] == "pre":
            yield from whole(f"model.{side}.layer_norm", f"{side}_norm")


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `trainer.formats`."""
    title, own = _KINDS[config["model_type"]]
    others = [
        f"decoder_{key}={config[f'decoder_{key}']} beside encoder_{key}={config[f'encoder_{key}']}"
        for key in ("attention_heads", "ffn_dim")
        if config[f"decoder_{key}"] != config[f"encoder_{key}"]
    ]
    shared = ("tie_word_embeddings", "share_encoder_decoder_embeddings")
    others += [f"{key}=false" for key in shared if not config.get(key, True)]
    if config["activation_function"] not in _ACTIVATIONS:
        others.append(f"activation_function={config['activation_function']} (it has {', '.join(_ACTIVATIONS)})")
    if others:
        raise ConfigError(
            f"config.json: our EncoderDecoder has no {title} with {'; '.join(others)}. Train it with model=hf."
        )
    scaled = config.get("scale_embedding", False)
    return {
        "_target_": "trainer.models.encoder_decoder.EncoderDecoder",
        "vocab_size": config["vocab_size"],
        "d_model": config["d_model"],
        "num_heads": config["encoder_attention_heads"],
        "d_ff": config["encoder_ffn_dim"],
        "encoder_layers": config["encoder_layers"],
        "decoder_layers": config["decoder_layers"],
        "dropout": config.get("dropout", 0.1),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "activation_dropout": config.get("activation_dropout", 0.0),
        "activation": _ACTIVATIONS[config["activation_function"]],
        "head_bias": True,
        "scale_embeddings": scaled,
        "scale_tied_head": scaled,
        "max_positions": config["max_position_embeddings"],
        **_COMMON,
        **own,
    }
